"""The Diffusion-DPO loss, of DPO, NCP-DPO and SPIN alike: logistic regression on error differences of pairs.

    L = mean of -ln sig( -beta [ (e_theta(w) - e_ref(w)) - (e_theta(l) - e_ref(l)) ] )

(Wallace et al., arXiv 2311.12908, Eq. 14, with T and the SNR weight folded into beta; NCP, arXiv 2406.17636, with
errors between features). SPIN-Diffusion (Yuan et al., arXiv 2402.10210) is this loss with a real image for w, the
opponent's for l, and the opponent for ref. We differ from the equation in that beta is diffusers', half the paper's,
on errors that are means over latent entries; whether both members share their noise is for the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.algorithms.metrics import Metrics, mean_metric
from learner.algorithms.sft import kept_units, weighted_mean


def preference(
    error_Q2: Tensor, error_ref_Q2: Tensor, weight_Q: Tensor, *, beta: float, normaliser: float
) -> tuple[Tensor, Metrics]:
    """Returns (loss, metrics) of Q pairs, winner (or real image) first; differentiable in `error_Q2`.

    Errors are (Q, 2), fp32 or fp64; `ref` are the reference's, or the opponent's. weight_Q: (Q,), 0 for a pair to
    leave out. beta is in the convention of `beta_full`. The loss, fp64, is the weighted sum divided by `normaliser`,
    the number over all ranks of what weights of 1 stand for: pairs, or groups whose pairs' weights add up to 1.
    Raises ValueError for shapes that do not fit, a non-finite reference error, and as `kept_units` does.
    """
    check_pairs(error_Q2)
    if error_ref_Q2.shape != error_Q2.shape:
        raise ValueError(f"errors {tuple(error_Q2.shape)} and reference's {tuple(error_ref_Q2.shape)} do not fit")
    kept_Q = kept_units(error_Q2, weight_Q, normaliser)
    error_Q2, ref_Q2 = error_Q2[kept_Q].double(), error_ref_Q2[kept_Q].detach().double()
    if not bool(torch.isfinite(ref_Q2).all()):
        raise ValueError("preference was given a non-finite error of the reference")
    loss = weighted_mean(preference_losses(error_Q2, ref_Q2, beta=beta), weight_Q[kept_Q], normaliser)
    identical_Q = (error_Q2[:, 0] == error_Q2[:, 1]) & (ref_Q2[:, 0] == ref_Q2[:, 1])
    metrics = {
        **pair_metrics(_logit(error_Q2, ref_Q2, beta), error_Q2, identical_Q),
        "pairs/error_ref_winner": mean_metric(ref_Q2[:, 0]),
        "pairs/error_ref_loser": mean_metric(ref_Q2[:, 1]),
    }
    return loss, metrics


def preference_losses(error_Q2: Tensor, error_ref_Q2: Tensor, *, beta: float) -> Tensor:
    """Returns each pair's own loss, (Q,) fp64."""
    return -logsigmoid(_logit(error_Q2.double(), error_ref_Q2.double(), beta))


def check_pairs(error_Q2: Tensor) -> None:
    """Raises ValueError unless there are two errors a pair."""
    if error_Q2.dim() != 2 or error_Q2.shape[1] != 2:
        raise ValueError(f"a pair has two errors, (Q, 2), but these are {tuple(error_Q2.shape)}")


def pair_metrics(logit_Q: Tensor, error_Q2: Tensor, identical_Q: Tensor) -> Metrics:
    """Returns what all losses on pairs report; a tie is half a hit. The margin's std needs both its moments."""
    return {
        "pairs/margin": mean_metric(logit_Q),
        "pairs/margin_square": mean_metric(logit_Q.square()),
        "pairs/accuracy": mean_metric((logit_Q.sign() + 1) / 2),
        "pairs/error_winner": mean_metric(error_Q2[:, 0]),
        "pairs/error_loser": mean_metric(error_Q2[:, 1]),
        "pairs/identical": mean_metric(identical_Q),
    }


def _logit(error_Q2: Tensor, ref_Q2: Tensor, beta: float) -> Tensor:
    winner_Q, loser_Q = (error_Q2 - ref_Q2).unbind(1)
    return -beta * (winner_Q - loser_Q)
