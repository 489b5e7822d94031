"""Diffusion-CPO: preference without a reference, held by the winner's own error.

    L = mean of -ln sig( -beta [ e_theta(w) - e_theta(l) ] ) + sft_weight * e_theta(w)

(Gambashidze et al., arXiv 2406.17636, Eq. 11, there also with errors between features: NCP-CPO). We differ from the
authors' code, which leaves the second term out: without it nothing bounds the loser's error.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.algorithms.metrics import Metrics
from learner.algorithms.preference import check_pairs, pair_metrics
from learner.algorithms.sft import kept_units, weighted_mean


def cpo(
    error_Q2: Tensor, weight_Q: Tensor, *, beta: float, sft_weight: float, normaliser: float
) -> tuple[Tensor, Metrics]:
    """Returns (loss, metrics) of Q pairs, winner first; differentiable in `error_Q2`.

    error_Q2: (Q, 2), fp32 or fp64; weight_Q: (Q,), 0 for a pair to leave out. beta is in the convention of
    `beta_full`. The loss, fp64, is the weighted sum divided by `normaliser`, as in `preference`. Raises ValueError
    for errors not in pairs, and as `kept_units` does.
    """
    check_pairs(error_Q2)
    kept_Q = kept_units(error_Q2, weight_Q, normaliser)
    error_Q2 = error_Q2[kept_Q].double()
    loss_Q = cpo_losses(error_Q2, beta=beta, sft_weight=sft_weight)
    identical_Q = error_Q2[:, 0] == error_Q2[:, 1]
    metrics = pair_metrics(_logit(error_Q2, beta), error_Q2, identical_Q)
    return weighted_mean(loss_Q, weight_Q[kept_Q], normaliser), metrics


def cpo_losses(error_Q2: Tensor, *, beta: float, sft_weight: float) -> Tensor:
    """Returns each pair's own loss, (Q,) fp64."""
    error_Q2 = error_Q2.double()
    return -logsigmoid(_logit(error_Q2, beta)) + sft_weight * error_Q2[:, 0]


def _logit(error_Q2: Tensor, beta: float) -> Tensor:
    return -beta * (error_Q2[:, 0] - error_Q2[:, 1])
