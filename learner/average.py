"""The moving average of the trained weights, for evaluation and export: never what samples, nor ref, old or opponent.

    average <- average + (1 - d) (master - average),   d = min(decay, (1 + n) / (10 + n)) at the n-th step, from 0

as in diffusers' EMAModel: over fewer steps at first, so that a short run's is not mostly its base.

Each rank keeps the average of its own part of the fp32 masters, beside it: whole on every rank in ZeRO-0, parted from
ZeRO-1 on, in the CPU's memory where the optimizer is. That costs 4 bytes a parameter over all ranks, and a step sends
nothing. An element goes through the same three roundings wherever it lies: equal masters have equal averages, on any
number of ranks and in any stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from learner.engine import Engine

CHUNK = 2**24
"""Elements that are averaged at a time, so that differences take little memory."""


class Average:
    """The average that an engine keeps. `num_steps` is how many optimizer steps it is over."""

    def __init__(self, engine: Engine, decay: float) -> None:
        """Starts from the masters as they are."""
        self._engine, self._decay = engine, decay
        self.restart()

    def restart(self) -> None:
        """Makes it the masters as they are, over no step."""
        self._shards = [shard.clone() for shard in self._engine.master_shards()]
        self.num_steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the masters after an optimizer step."""
        weight = 1 - min(self._decay, (1 + self.num_steps) / (10 + self.num_steps))
        for own, masters in zip(self._shards, self._engine.master_shards(), strict=True):
            for start in range(0, own.numel(), CHUNK):
                part, master = (flat.view(-1)[start : start + CHUNK] for flat in (own, masters))
                # One rounding an operation: a fused one would round differently at the end of a shard.
                part += (master - part).mul_(weight)
        self.num_steps += 1

    def each(self, take: Callable[[str, Tensor], object]) -> None:
        """Calls `take` with every trained parameter's name and its average, whole and fp32. Every rank calls it."""
        with self._as_masters():
            for name, tensor in self._engine.masters():
                take(name, tensor)

    def whole(self) -> dict[str, Tensor] | None:
        """Returns the average on the CPU, fp32, by the parameters' names; None but on rank 0. Every rank calls it."""
        found: dict[str, Tensor] = {}

        def take(name: str, tensor: Tensor) -> None:
            if self._engine.rank == 0:
                found[name] = tensor.detach().to("cpu", copy=True)

        self.each(take)
        return found if self._engine.rank == 0 else None

    def load(self, whole: Mapping[str, Tensor], num_steps: int) -> None:
        """Takes up what `whole` returned after so many steps. Every rank calls it."""
        with self._as_masters():
            self._engine.write_masters(whole)
        self.num_steps = num_steps

    @contextmanager
    def _as_masters(self) -> Iterator[None]:
        """Within it the masters' memory holds the average, which DeepSpeed can then read and write whole."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for own, master in zip(self._shards, self._engine.master_shards(), strict=True):
            kept = master.clone()
            master.copy_(own)
            own.copy_(kept)
