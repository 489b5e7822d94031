"""The rollout actors of an attempt: started, replaced when they are lost, and more or fewer of them at any time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import ray
from ray.exceptions import RayError

STOP_TIMEOUT_S = 30.0


class Crew:
    """Rollout actors by name.

    hire --> built --> [running] -- lost --> replace, under the same name
                          |
                          +-- dismiss --> finishes the ticket in hand --> gone
    """

    def __init__(self, start: Callable[[str], Any]) -> None:
        """`start` starts an actor of a name."""
        self._start = start
        self._names: Iterator[str] = map(str, count())
        self._actors: dict[str, Any] = {}
        self._runs: dict[Any, str] = {}
        self._leaving: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Those that are to stay."""
        return [name for name in self._actors if name not in self._leaving]

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
        self._actors |= {name: self._start(name) for name in names}
        return [self._actors[name].build.remote() for name in names]

    def run(self) -> None:
        """Lets all that were hired answer tickets."""
        self._runs = {actor.run.remote(): name for name, actor in self._actors.items()}

    def resize(self, num: int) -> None:
        """Hires or dismisses so that `num` actors stay; those hired begin by themselves when they are built."""
        surplus = self.names[num:]
        for name in surplus:
            self._leaving.add(name)
            self._actors[name].stop.remote()
        for name in [next(self._names) for _ in range(num - len(self.names))]:
            self._begin(name)

    def ended(self, run: Any) -> tuple[str, RayError | None]:
        """Takes note that an actor's run has ended; returns its name and what it was lost to, if it was."""
        name = self._runs.pop(run)
        actor = self._actors.pop(name)
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

    def stop(self) -> None:
        """Lets all finish what is in hand, so that one of them is free to draw."""
        ray.wait([actor.stop.remote() for actor in self.actors], num_returns=len(self.actors), timeout=STOP_TIMEOUT_S)
        ray.wait(self.runs, num_returns=len(self.runs), timeout=STOP_TIMEOUT_S)

    def _begin(self, name: str) -> None:
        self._actors[name] = self._start(name)
        self._runs[self._actors[name].build_and_run.remote()] = name
