"""The rollout actors of an attempt: started, replaced when they are lost, and more or fewer of them at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.scoring import RewardPool

STOP_TIMEOUT_S = 30.0


class Crew:
    """Rollout actors by name.

    hire --> [pending] -- there is room --> [building] --> [running] -- lost --> replace, under the same name
                 |                                            |
                 +-- dismiss --> gone                         +-- dismiss --> delivers what is in hand --> gone

    A pending actor waits for as long as it takes the cluster to have room: what Ray's autoscaler starts nodes for.
    """

    def __init__(self, start: Callable[[str], Any]) -> None:
        """`start` starts an actor of a name."""
        self._start = start
        self._placed: dict[str, Any] = {}
        self._names: Iterator[str] = map(str, count())
        self._actors: dict[str, Any] = {}
        self._runs: dict[Any, str] = {}
        self._leaving: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Those that are to stay."""
        return [name for name in self._actors if name not in self._leaving]

    @property
    def placed(self) -> list[str]:
        """Those that are to stay and have a process; others wait for a node."""
        return [name for name in self.names if self._is_placed(name)]

    def _is_placed(self, name: str) -> bool:
        return bool(ray.wait([self._placed[name]], timeout=0)[0])

    @property
    def actors(self) -> list[Any]:
        """Handles of all that are here."""
        return list(self._actors.values())

    @property
    def runs(self) -> list[Any]:
        """What ends when an actor is lost, or done."""
        return list(self._runs)

    def hire(self, num: int) -> list[Any]:
        """Starts actors; returns what is ready when they are built."""
        names = [next(self._names) for _ in range(num)]
        for name in names:
            self._place(name)
        return [self._actors[name].build.remote() for name in names]

    def run(self) -> None:
        """Lets all that were hired answer tickets. They are built, so that what says that they have a process has come,
        or does at any moment."""
        if placed := list(self._placed.values()):
            ray.wait(placed, num_returns=len(placed), timeout=STOP_TIMEOUT_S)
        self._runs = {actor.run.remote(): name for name, actor in self._actors.items()}

    def resize(self, num: int) -> None:
        """Hires or dismisses so that `num` actors stay; those hired begin by themselves when they are built, and those
        go first that have no process yet."""
        placed = self.placed
        for name in [*placed, *(name for name in self.names if name not in placed)][num:]:
            self._leaving.add(name)
            if name in placed:
                self._actors[name].stop.remote()
            else:
                ray.kill(self._actors[name])
        for name in [next(self._names) for _ in range(num - len(self.names))]:
            self._begin(name)

    def ended(self, run: Any) -> tuple[str, RayError | None]:
        """Takes note that an actor's run has ended; returns its name and what it was lost to, if it was."""
        name = self._runs.pop(run)
        actor = self._actors.pop(name)
        del self._placed[name]
        was_leaving = name in self._leaving
        self._leaving.discard(name)
        try:
            ray.get(run)
            ray.kill(actor)
        except RayError as error:
            return name, None if was_leaving else error
        return name, None

    def replace(self, name: str) -> None:
        """Starts an actor anew that was lost."""
        self._begin(name)

    def kill(self, name: str) -> None:
        """Kills an actor that stands still; its run then ends as lost."""
        ray.kill(self._actors[name])

    def tell(self, pools: Sequence[RewardPool]) -> None:
        """Lets all know which reward actors there are by now."""
        for actor in self.actors:
            actor.use_pools.remote(pools)

    def stop(self) -> list[Any]:
        """Lets all finish what is in hand; returns those that have, and are free to draw."""
        at_work = {run: name for run, name in self._runs.items() if self._is_placed(name)}
        stops = [self._actors[name].stop.remote() for name in at_work.values()]
        if not stops:
            return []
        ray.wait(stops, num_returns=len(stops), timeout=STOP_TIMEOUT_S)
        done, _ = ray.wait(list(at_work), num_returns=len(at_work), timeout=STOP_TIMEOUT_S)
        return [self._actors[at_work[run]] for run in done if _has_ended_well(run)]

    def _begin(self, name: str) -> None:
        self._place(name)
        self._runs[self._actors[name].build_and_run.remote()] = name

    def _place(self, name: str) -> None:
        self._actors[name] = self._start(name)
        self._placed[name] = self._actors[name].__ray_ready__.remote()


def _has_ended_well(run: Any) -> bool:
    try:
        ray.get(run)
    except RayError:
        return False
    return True
