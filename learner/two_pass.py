"""The exact two-pass gradient (algorithms.md 0.8).

Pass A evaluates all log-probabilities without a graph; the loss is differentiated in that small array alone,
omega = dLoss/dlogp. Pass B evaluates micro-batches with a graph and back-propagates sum(omega * logp). The
gradient is that of the whole loss, up to rounding, for any micro-batching, in the memory of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learner.algorithms.metrics import Metrics

Loss = Callable[[Tensor], tuple[Tensor, Metrics]]


def differentiate(loss: Loss, value: Tensor) -> tuple[Tensor, Tensor, Metrics]:
    """Returns (loss, omega, metrics): the loss of a value array and its gradient there, both detached."""
    leaf = value.detach().requires_grad_()
    total, metrics = loss(leaf)
    (omega,) = torch.autograd.grad(total, leaf)
    return total.detach(), omega, metrics


def surrogate(score: Callable[[Tensor], Tensor], item_N3: Tensor, omega: Tensor) -> Tensor:
    """Returns sum(stop(omega) * logp) over items, whose gradient in the weights is the loss's share of them.

    item_N3: (N, 3) indices (group, sibling, step) into omega (P, G, T). `score` evaluates their log-probabilities
    with a graph, (N,) fp64.
    """
    omega_N = omega[tuple(item_N3.unbind(1))]
    return (omega_N.detach() * score(item_N3)).sum()
