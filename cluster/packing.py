"""Whether processes fit on nodes: GPUs are counted one by one, as Ray does, since a share of one is on one GPU.

nodes   [8 CPU, 2 GPU] [4 CPU]        units   (1 CPU, 1 GPU) x 2 on one node, (4 CPU) x 2
--> True: the first node takes the pair and one of the others
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

GRAIN = 10_000
"""Ray counts in ten-thousandths."""

MAX_STEPS = 20_000
"""A search that takes longer is given up: a fraction of a second for dozens of nodes."""

Demand = Mapping[str, float]
"""What one process reserves, by Ray's names."""

Unit = tuple[Demand, ...]
"""Processes that are to be on one node."""


@dataclass(frozen=True)
class Room:
    """What is free on a node, in grains: amounts by name, and of each GPU its free part, the fullest first."""

    amounts: Mapping[str, int]
    gpus: tuple[int, ...]

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Self:
        """Takes what Ray says of a node: {"CPU": 8.0, "GPU": 2.0, "rollout": 1.0}."""
        amounts = {name: round(GRAIN * amount) for name, amount in resources.items() if name != "GPU"}
        return cls(amounts, (GRAIN,) * int(resources.get("GPU", 0)))

    def less(self, unit: Unit) -> Room | None:
        """Returns what is left when a unit is here, or None where it does not fit."""
        room: Room | None = self
        for demand in unit:
            room = room._less_one(demand) if room else None
        return room

    def _less_one(self, demand: Demand) -> Room | None:
        amounts = dict(self.amounts)
        for name, amount in demand.items():
            if name != "GPU":
                amounts[name] = amounts.get(name, 0) - round(GRAIN * amount)
        gpus = _less_gpus(self.gpus, round(GRAIN * demand.get("GPU", 0)))
        return None if gpus is None or min(amounts.values(), default=0) < 0 else Room(amounts, gpus)


def _less_gpus(gpus: tuple[int, ...], wanted: int) -> tuple[int, ...] | None:
    """A part comes from the fullest GPU that has it; whole ones must be free."""
    if wanted >= GRAIN:
        num = wanted // GRAIN
        return gpus[:-num] if gpus[-num:] == (GRAIN,) * num else None
    for position, free in enumerate(gpus):
        if wanted and free >= wanted:
            return tuple(sorted((*gpus[:position], free - wanted, *gpus[position + 1 :])))
    return None if wanted else gpus


def fits(rooms: Sequence[Room], units: Sequence[Unit], max_steps: int = MAX_STEPS) -> bool | None:
    """Tells whether all units find a place together, by a search in depth that tries first what comes first. Returns
    None where it is given up.

    Equal units are interchangeable, so they are put in the order of nodes; so are nodes of which equal parts are free.
    """
    free = list(rooms)
    taken: list[tuple[int, int, Room]] = []  # The first node that was allowed, the one chosen, what it had before.
    first = node = 0
    for _ in range(max_steps):
        if len(taken) == len(units):
            return True
        unit = units[len(taken)]
        while node < len(free) and (free[node] in free[first:node] or free[node].less(unit) is None):
            node += 1
        if left := free[node].less(unit) if node < len(free) else None:
            taken.append((first, node, free[node]))
            free[node] = left
            is_run = len(taken) < len(units) and units[len(taken)] == unit
            first = node = node if is_run else 0
        elif not taken:
            return False
        else:
            first, node, before = taken.pop()
            free[node] = before
            node += 1
    return None
