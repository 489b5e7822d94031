"""Descent: from probe values to one optimizer step, on all ranks together.

    two_pass    all values without a graph, dLoss/dvalues, then micro-batches with a graph: losses that couple values
    one_pass    loss and gradient, micro-batch by micro-batch of whole units: losses that are sums over units

Every rank runs as many forward and backward passes as the one with most items: a collective waits for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion.policy import Denoiser
from learner.algorithms.metrics import Metrics
from learner.batching import items_where, micro_batches
from learner.engine import Engine
from learner.probes import Costs, Probe
from learner.two_pass import Loss, differentiate, surrogate
from protocol.errors import TrainingError

Evaluate = Callable[[Denoiser, Tensor], Tensor]
"""(denoiser, items (N, K)) -> values (N, ...)."""

UnitLoss = Callable[[Tensor, Tensor], tuple[Tensor, Metrics]]
"""(values (N, ...), their units (N,)) -> (loss, metrics)."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: the loss summed over ranks, the gradient's norm before clipping, or None where none was taken
    (no rank had any gradient, or one overflowed in fp16), and means over ranks."""

    loss: float
    grad_norm: float | None
    means: dict[str, float]


@dataclass
class Totals:
    """Losses and metrics of a rank's micro-batches, added up."""

    loss: Tensor
    metrics: Metrics = field(default_factory=dict)

    def add(self, loss: Tensor, metrics: Metrics) -> None:
        """Adds one micro-batch."""
        self.loss = self.loss + loss.detach()
        for name, part in metrics.items():
            self.metrics[name] = self.metrics[name] + part if name in self.metrics else part


class Descent:
    """Evaluates probes and takes optimizer steps. All ranks call it together."""

    def __init__(self, engine: Engine, micro_batch_size: int, after_pass: Callable[[], None]) -> None:
        """`after_pass` is called after every micro-batch, for whoever watches progress."""
        self._engine, self._micro_batch_size, self._after_pass = engine, micro_batch_size, after_pass
        self.costs = Costs()

    def batches(self, probe: Probe, item_NK: Tensor) -> list[Tensor]:
        """Returns micro-batches of items, of at most the recipe's size in network evaluations but for guidance."""
        return micro_batches(item_NK, max(1, self._micro_batch_size // probe.width))

    @torch.no_grad()
    def evaluate(self, probe: Probe, denoiser: Denoiser, item_NK: Tensor, value: Evaluate | None = None) -> Tensor:
        """Returns the probe's values of all items, (N, ...), or those of `value`, without a graph."""
        batches = self.batches(probe, item_NK)
        # Agreed upon first: with ZeRO-3 passes are collectives, and another one must not come between them.
        num_passes = self._most(len(batches))
        values = [self.score(probe, denoiser, items, value) for items in batches]
        for _ in range(num_passes - len(batches)):
            probe(denoiser, probe.filler_1K)
        return torch.cat(values) if values else self._no_values(probe)

    def score(self, probe: Probe, denoiser: Denoiser, item_NK: Tensor, value: Evaluate | None = None) -> Tensor:
        """Returns one micro-batch's values, with a graph unless switched off."""
        self.costs.unet_forward += len(item_NK) * probe.num_evaluations
        values = (value or probe)(denoiser, item_NK)
        self._after_pass()
        return values

    def two_pass(self, probe: Probe, loss: Loss, values: Tensor) -> Step:
        """Takes a step on a loss of all values, (P, G, T) or (P, G, T, channels), which were evaluated before."""
        total, omega, metrics = differentiate(loss, values)
        self._refuse_non_finite(values, omega)
        wanted_PGT = (omega != 0) if omega.dim() == 3 else (omega != 0).any(-1)
        score = functools.partial(self.score, probe, self._engine.denoiser)
        batches = self.batches(probe, items_where(wanted_PGT))
        losses = [functools.partial(surrogate, score, items, omega) for items in batches]
        self.costs.unet_backward += int(wanted_PGT.sum()) * probe.width * probe.num_branches
        norm = self._apply(probe, losses)
        return Step(float(self._engine.sum(total)), norm, self._means(metrics))

    def one_pass(self, probe: Probe, loss: UnitLoss, num_units: int, metrics: Metrics) -> Step:
        """Takes a step on a loss that is a sum over units, which micro-batches hold whole; `metrics` are reported with
        those of the loss."""
        totals = Totals(torch.zeros((), dtype=torch.float64), dict(metrics))

        def part(item_N1: Tensor) -> Tensor:
            value, metrics = loss(self.score(probe, self._engine.denoiser, item_N1), item_N1[:, 0])
            totals.add(value, metrics)
            return value

        items_N1 = torch.arange(num_units)[:, None]
        # Of no unit the loss is 0, but every rank then knows the metrics' names.
        totals.add(*loss(self._no_values(probe), items_N1[:0, 0]))
        norm = self._apply(probe, [functools.partial(part, items) for items in self.batches(probe, items_N1)])
        self.costs.unet_backward += num_units * probe.width * probe.num_branches
        self._refuse_non_finite(totals.loss)
        return Step(float(self._engine.sum(totals.loss)), norm, self._means(totals.metrics))

    def _apply(self, probe: Probe, losses: Sequence[Callable[[], Tensor]]) -> float | None:
        """One optimizer step; None, and none taken, where no rank has a gradient (AdamW would still decay weights), or
        one overflows in fp16."""
        num_passes = self._most(len(losses))
        if num_passes == 0:
            return None

        def idle() -> Tensor:
            return probe(self._engine.denoiser, probe.filler_1K).sum() * 0.0

        norm = self._engine.apply([*losses, *[idle] * (num_passes - len(losses))])
        if norm is not None:
            self._refuse_non_finite(torch.tensor(norm))
        return norm

    def _no_values(self, probe: Probe) -> Tensor:
        return torch.zeros(0, *probe.value_shape, device=self._engine.device)

    def _most(self, number: int) -> int:
        return int(self._engine.max(torch.tensor(float(number))))

    def _means(self, metrics: Metrics) -> dict[str, float]:
        """Divides sums over ranks by counts over ranks; what nothing was counted of has no mean."""
        names = sorted(metrics)
        totals = self._engine.sum(torch.stack([metrics[name] for name in names]))
        return {name: float(total / count) for name, (total, count) in zip(names, totals, strict=True) if count}

    def _refuse_non_finite(self, *numbers: Tensor) -> None:
        finite = torch.stack([torch.isfinite(number).all() for number in numbers]).all()
        if bool(self._engine.max((~finite).float())):
            raise TrainingError(
                "a value of the loss or a gradient is NaN or infinite under the current weights",
                expected="finite numbers; nothing of this round is published or kept",
                do="lower learner.learning_rate, or narrow the algorithm's window, and resume from the last checkpoint",
            )
