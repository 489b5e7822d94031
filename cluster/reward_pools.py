"""The reward actors of an attempt, by pool; more or fewer of them at any time.

    resize --> [coming] -- has scored generated images --> [in the pool] -- resize --> [leaving] -- idle --> gone
                  |
                  +-- cannot score, or is not wanted any more --> gone

Rollouts are told of every change of a pool. One that leaves finishes what it was asked; what reaches it too late is
asked of another (cluster/scoring.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.pulse import Services
from cluster.scoring import RewardPool, explain
from protocol.roles import Reward


@dataclass(frozen=True)
class Moving:
    """An actor on its way in or out, and what ends once it is there or free."""

    name: str
    label: str
    actor: Any
    ref: Any


class Pools:
    """Reward actors by label; each has a name of its own, such as `reward/image_reward/0`."""

    def __init__(
        self,
        services: Services,
        start: Callable[[Reward], Any],
        probe: Callable[[Any], Any],
        tell: Callable[[Sequence[RewardPool]], None],
    ) -> None:
        """`services` looks after all that are here; `start` starts one actor, `probe` lets it score for the first
        time, `tell` says to all rollouts who there is."""
        self._services, self._start, self._probe, self._tell = services, start, probe, tell
        self._pools: dict[str, RewardPool] = {}
        self._named: dict[str, Any] = {}
        self._numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
        self._wanted: dict[str, int] = {}
        self._coming: list[Moving] = []
        self._leaving: list[Moving] = []

    def open(self, pools: Sequence[RewardPool]) -> None:
        """Begins with pools whose actors were just started."""
        self._pools = {pool.settings.label: pool for pool in pools}
        self._wanted = {label: len(pool.actors) for label, pool in self._pools.items()}
        for pool in pools:
            for actor in pool.actors:
                self._add(self._name(pool.settings.label), actor)

    @property
    def now(self) -> list[RewardPool]:
        """All pools, with the actors that may be asked."""
        return list(self._pools.values())

    @property
    def actors(self) -> list[Any]:
        """Handles of all that are here."""
        return [*self._named.values(), *(moving.actor for moving in (*self._coming, *self._leaving))]

    def size(self, label: str) -> int:
        """Returns how many actors a pool has, without those that are coming."""
        return len(self._pools[label].actors)

    def resize(self, label: str, num: int) -> bool:
        """Starts or dismisses actors of a pool, unless that was asked already. Returns whether it was not."""
        if self._wanted[label] == num:
            return False
        self._wanted[label] = num
        coming = [moving for moving in self._coming if moving.label == label]
        for moving in coming[max(0, num - self.size(label)) :]:
            self._coming.remove(moving)
            ray.kill(moving.actor)
        num_here = self.size(label) + len([moving for moving in self._coming if moving.label == label])
        for _ in range(num - num_here):
            actor = self._start(self._pools[label].settings)
            self._coming.append(Moving(self._name(label), label, actor, self._probe(actor)))
        self._dismiss(label, self._pools[label].actors[num:])
        return True

    def look(self) -> list[tuple[str, str]]:
        """Lets in who has come and ends who is free. Returns (label, problem) of those that cannot work."""
        problems = []
        for moving in _over(self._coming):
            if problem := self._let_in(moving):
                problems.append(problem)
        for moving in _over(self._leaving):
            ray.kill(moving.actor)
        return problems

    def _let_in(self, moving: Moving) -> tuple[str, str] | None:
        label = moving.label
        try:
            ray.get(moving.ref)
        except RayError as error:
            ray.kill(moving.actor)
            return label, f"a new actor cannot score: {explain(self._pools[label].settings, '', error)}"
        self._add(moving.name, moving.actor)
        self._change(label, (*self._pools[label].actors, moving.actor))
        return None

    def _dismiss(self, label: str, actors: Sequence[Any]) -> None:
        if not actors:
            return
        self._change(label, tuple(actor for actor in self._pools[label].actors if actor not in actors))
        for name in [name for name, actor in self._named.items() if actor in actors]:
            actor = self._named.pop(name)
            self._services.remove(name)
            # Answered in turn: after all that it was asked.
            self._leaving.append(Moving(name, label, actor, actor.__ray_ready__.remote()))

    def _change(self, label: str, actors: tuple[Any, ...]) -> None:
        self._pools[label] = replace(self._pools[label], actors=actors)
        self._tell(self.now)

    def _add(self, name: str, actor: Any) -> None:
        self._named[name] = actor
        self._services.add(name, actor)

    def _name(self, label: str) -> str:
        return f"reward/{label}/{next(self._numbers[label])}"


def _over(moving: list[Moving]) -> list[Moving]:
    """Takes those out of a list whose call has ended, well or not."""
    over = [each for each in moving if ray.wait([each.ref], timeout=0)[0]]
    moving[:] = [each for each in moving if each not in over]
    return over
