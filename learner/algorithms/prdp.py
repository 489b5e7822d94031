"""PRDP: proximal reward difference prediction (Deng et al., arXiv 2402.08714).

Regresses the difference of two siblings' log-ratios, against the pretrained model, onto their reward difference:

    l_ij = ((rho_i - rho_j) - (r_i - r_j) / w)^2,     L = mean over groups and pairs of max(l_ij, l_ij_clip)

l_ij_clip is the same with each step's log-ratio clipped to a window around its value at the round's start
(Eq. 14-21 and Algorithm 1). We differ from the paper's listing as algorithms.md 1.7 says: reductions are named
settings, tied pairs are kept by default, and the loss may be scaled by w/4 so that its on-policy gradient is
minus that of the regularised reward for every w.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.algorithms.metrics import Metrics, mean_metric
from protocol.algorithms import Prdp

MIN_GROUP_SIZE = 2


@dataclass(frozen=True)
class Window:
    """The proximal window in force: log-ratios before and after clipping, (P, G, T) in the latent reduction."""

    log_ratio_PGT: Tensor
    clipped_PGT: Tensor
    outside_PGT: Tensor


def prdp(
    log_prob_PGT: Tensor,
    log_prob_old_PGT: Tensor,
    log_prob_ref_PGT: Tensor,
    scored_PT: Tensor,
    reward_PG: Tensor,
    *,
    settings: Prdp,
    num_latent_entries: int,
    normaliser: int,
) -> tuple[Tensor, Metrics]:
    """Returns (loss, metrics) of P groups of G siblings over T steps; differentiable in `log_prob_PGT`.

    Log-probabilities are fp64, latent_sum; `old` is the window's centre, `ref` the pretrained model. The loss
    is summed over the groups given and divided by `normaliser`, the number of groups over all ranks. Raises
    ValueError for fewer than two siblings, a group without scored steps, or a non-finite frozen input.
    """
    _check(log_prob_old_PGT, log_prob_ref_PGT, scored_PT, reward_PG)
    window = _window(log_prob_PGT, log_prob_old_PGT, log_prob_ref_PGT, scored_PT, settings, num_latent_entries)
    num_scored_P1 = scored_PT.sum(1, keepdim=True)
    rho_PG = _reduce_time(window.log_ratio_PGT, num_scored_P1, settings.time_reduce)
    rho_clipped_PG = _reduce_time(window.clipped_PGT, num_scored_P1, settings.time_reduce)
    reward_difference_PQ = _pair_differences(reward_PG.double())
    target_PQ = reward_difference_PQ / settings.kl_weight
    error_PQ = (_pair_differences(rho_PG) - target_PQ).square()
    clipped_error_PQ = (_pair_differences(rho_clipped_PG) - target_PQ).square()
    kept_PQ = torch.ones_like(target_PQ, dtype=torch.bool)
    if settings.tie_policy == "drop":
        kept_PQ = reward_difference_PQ != 0
    loss_P = _masked_mean(torch.maximum(error_PQ, clipped_error_PQ), kept_PQ)
    scale = settings.kl_weight / 4 if settings.loss_scale == "quarter_beta" else 1.0
    loss = scale * loss_P.sum() / normaliser
    metrics = _metrics(window, scored_PT, _pair_differences(rho_PG), target_PQ, error_PQ, clipped_error_PQ)
    return loss, metrics


def _check(old_PGT: Tensor, ref_PGT: Tensor, scored_PT: Tensor, reward_PG: Tensor) -> None:
    if reward_PG.shape[1] < MIN_GROUP_SIZE:
        raise ValueError(f"prdp compares siblings: a group needs at least 2, these have {reward_PG.shape[1]}")
    if not bool(scored_PT.any(1).all()):
        raise ValueError("prdp needs a step with a density in every group; a deterministic sampler has none")
    for name, tensor in (("old", old_PGT), ("ref", ref_PGT), ("reward", reward_PG)):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"prdp was given a non-finite {name}")


def _window(
    log_prob_PGT: Tensor,
    old_PGT: Tensor,
    ref_PGT: Tensor,
    scored_PT: Tensor,
    settings: Prdp,
    num_latent_entries: int,
) -> Window:
    divisor = num_latent_entries if settings.latent_reduce == "latent_mean" else 1
    mask_P1T = scored_PT[:, None, :]
    zero = torch.zeros((), dtype=log_prob_PGT.dtype, device=log_prob_PGT.device)
    ratio_PGT = torch.where(mask_P1T, (log_prob_PGT - ref_PGT) / divisor, zero)
    center_PGT = torch.where(mask_P1T, (old_PGT - ref_PGT) / divisor, zero)
    if settings.clip_eps is None:
        return Window(ratio_PGT, ratio_PGT, torch.zeros_like(ratio_PGT, dtype=torch.bool))
    low_PGT, high_PGT = center_PGT - settings.clip_eps, center_PGT + settings.clip_eps
    outside_PGT = (ratio_PGT < low_PGT) | (ratio_PGT > high_PGT)
    return Window(ratio_PGT, torch.clamp(ratio_PGT, low_PGT, high_PGT), outside_PGT)


def _reduce_time(value_PGT: Tensor, num_scored_P1: Tensor, time_reduce: str) -> Tensor:
    total_PG = value_PGT.sum(2)
    return total_PG / num_scored_P1 if time_reduce == "time_mean" else total_PG


def _pair_differences(value_PG: Tensor) -> Tensor:
    """Returns value_i - value_j of the Q = G(G-1)/2 pairs i < j, (P, Q)."""
    first, second = torch.triu_indices(value_PG.shape[1], value_PG.shape[1], offset=1)
    return value_PG[:, first] - value_PG[:, second]


def _masked_mean(value_PQ: Tensor, kept_PQ: Tensor) -> Tensor:
    """Mean over kept pairs; exactly 0, with zero gradient, where none is kept."""
    return torch.where(kept_PQ, value_PQ, 0.0).sum(1) / kept_PQ.sum(1).clamp(min=1)


def _metrics(
    window: Window,
    scored_PT: Tensor,
    rho_difference_PQ: Tensor,
    target_PQ: Tensor,
    error_PQ: Tensor,
    clipped_error_PQ: Tensor,
) -> Metrics:
    scored_PGT = scored_PT[:, None, :].expand_as(window.outside_PGT)
    return {
        "prdp/saturated_fraction": mean_metric(window.outside_PGT[scored_PGT]),
        "prdp/pair_clipped_fraction": mean_metric(clipped_error_PQ > error_PQ),
        "prdp/rho_difference_abs_mean": mean_metric(rho_difference_PQ.abs()),
        "prdp/target_abs_mean": mean_metric(target_PQ.abs()),
        "prdp/product_mean": mean_metric(rho_difference_PQ * target_PQ),
        "prdp/rho_difference_square_mean": mean_metric(rho_difference_PQ.square()),
        "prdp/target_square_mean": mean_metric(target_PQ.square()),
        "pairs/tied": mean_metric(target_PQ == 0),
    }


def summarise(means: dict[str, float]) -> dict[str, float]:
    """Returns the metrics that people read, from means over all ranks: correlation and regime need both moments."""
    square = means["prdp/rho_difference_square_mean"] * means["prdp/target_square_mean"]
    target = means["prdp/target_abs_mean"]
    return {
        "prdp/pair_correlation": means["prdp/product_mean"] / square**0.5 if square > 0 else 0.0,
        "prdp/regime_ratio": means["prdp/rho_difference_abs_mean"] / target if target > 0 else 0.0,
        "prdp/target_abs_mean": target,
        "prdp/saturated_fraction": means["prdp/saturated_fraction"],
        "prdp/pair_clipped_fraction": means["prdp/pair_clipped_fraction"],
        "pairs/tied": means["pairs/tied"],
    }
