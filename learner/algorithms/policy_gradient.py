"""Policy gradients over denoising steps: the clipped loss that DDPO shares, and advantages within a group.

    q = exp(ln pi_theta - ln pi_old), in the latent reduction, of one step
    L = mean over scored entries of max(-A q, -A clip(q, 1 - clip_range, 1 + clip_range)) + kl_coef * mean KL to ref

(Black et al., arXiv 2305.13301, as ddpo-pytorch's scripts/train.py; Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv
2505.07818.) With latent_mean q is the true ratio to the power 1/D, hence windows as small as 1e-4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from learner.algorithms.metrics import Metrics, mean_metric
from protocol.algorithms import PolicyGradient

MAX_ADVANTAGE = 5.0
"""Advantages that were divided by a std are clipped to plus and minus this."""


def policy_gradient(
    log_prob_PGT: Tensor,
    log_prob_old_PGT: Tensor,
    advantage_PG: Tensor,
    scored_PT: Tensor,
    *,
    clip_range: float | None,
    latent_reduce: Literal["latent_mean", "latent_sum"],
    num_latent_entries: int,
    normaliser: int,
    kernel_kl_PGT: Tensor | None = None,
    kl_coef: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Returns (loss, metrics) of P groups of G siblings over T steps; differentiable in `log_prob_PGT` and
    `kernel_kl_PGT`.

    Log-probabilities are fp64, latent_sum; `old` is the window's centre. `kernel_kl_PGT` is each step's exact KL to
    the pretrained model, latent_mean. The loss is summed over the scored entries given and divided by `normaliser`,
    the number of scored entries over all ranks. Raises ValueError for shapes that do not fit, a group without scored
    steps, a non-finite frozen input, or a `kl_coef` without a KL.
    """
    _check(log_prob_PGT, log_prob_old_PGT, advantage_PG, scored_PT, kernel_kl_PGT, kl_coef)
    scored_PGT = scored_PT[:, None, :].expand_as(log_prob_PGT)
    divisor = num_latent_entries if latent_reduce == "latent_mean" else 1
    ratio_PGT = torch.where(scored_PGT, (log_prob_PGT - log_prob_old_PGT) / divisor, 0.0).exp()
    clipped_PGT = ratio_PGT if clip_range is None else ratio_PGT.clamp(1 - clip_range, 1 + clip_range)
    advantage_PG1 = advantage_PG[..., None]
    loss_PGT = torch.maximum(-advantage_PG1 * ratio_PGT, -advantage_PG1 * clipped_PGT)
    loss = torch.where(scored_PGT, loss_PGT, 0.0).sum() / normaliser
    metrics = _metrics(ratio_PGT[scored_PGT], clipped_PGT[scored_PGT], advantage_PG)
    if kernel_kl_PGT is not None:
        loss = loss + kl_coef * torch.where(scored_PGT, kernel_kl_PGT, 0.0).sum() / normaliser
        metrics["pg/kernel_kl"] = mean_metric(kernel_kl_PGT[scored_PGT])
    return loss, metrics


def group_advantage(reward_PG: Tensor, settings: PolicyGradient) -> Tensor:
    """Returns advantage_PG, fp64: rewards minus their group's mean, scaled as `settings.advantage` says.

    `reward_PG` is the whole round's, gathered over ranks, since `global_std` divides by the std of all its rewards;
    the caller takes its own rows. Stds are population stds. A group of equal rewards gets exactly 0. Flow-GRPO adds
    1e-4 to the std; we add nothing. Raises ValueError for fewer than two siblings or a non-finite reward.
    """
    num_siblings = reward_PG.shape[1]
    if num_siblings < settings.min_group_size:
        raise ValueError(f"a group's mean is a baseline for at least {settings.min_group_size}, not {num_siblings}")
    _check_finite(reward=reward_PG)
    reward_PG = reward_PG.double()
    # Differences to one sibling are exactly 0 in a group of equal rewards; differences to a rounded mean may not be.
    difference_PG = reward_PG - reward_PG[:, :1]
    centred_PG = difference_PG - difference_PG.mean(1, keepdim=True)
    if settings.advantage == "centred":
        return centred_PG
    if settings.advantage == "leave_one_out":
        return centred_PG * num_siblings / (num_siblings - 1)
    of_group_P1, of_round = centred_PG.std(1, correction=0, keepdim=True), reward_PG.std(correction=0)
    std = of_group_P1 if settings.advantage == "group_std" else of_round
    return torch.where(centred_PG == 0, 0.0, centred_PG / std).clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)


def _check(
    log_prob_PGT: Tensor,
    old_PGT: Tensor,
    advantage_PG: Tensor,
    scored_PT: Tensor,
    kernel_kl_PGT: Tensor | None,
    kl_coef: float,
) -> None:
    groups, siblings, steps = log_prob_PGT.shape
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "log_prob_old_PGT": (old_PGT, (groups, siblings, steps)),
        "advantage_PG": (advantage_PG, (groups, siblings)),
        "scored_PT": (scored_PT, (groups, steps)),
    }
    if kernel_kl_PGT is not None:
        expected["kernel_kl_PGT"] = (kernel_kl_PGT, (groups, siblings, steps))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"policy_gradient was given {name} of shape {tuple(tensor.shape)}, expected {shape}")
    if not bool(scored_PT.any(1).all()):
        raise ValueError("policy_gradient needs a step with a density in every group; a deterministic sampler has none")
    if kl_coef > 0 and kernel_kl_PGT is None:
        raise ValueError(f"policy_gradient was given kl_coef {kl_coef} but no kernel_kl_PGT")
    _check_finite(old=old_PGT, advantage=advantage_PG)


def _check_finite(**frozen: Tensor) -> None:
    for name, tensor in frozen.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"policy_gradient was given a non-finite {name}")


def _metrics(ratio_N: Tensor, clipped_N: Tensor, advantage_PG: Tensor) -> Metrics:
    return {
        "pg/ratio_abs_minus_1": mean_metric((ratio_N - 1).abs()),
        "pg/clip_fraction": mean_metric(ratio_N != clipped_N),
        "pg/advantage_abs_mean": mean_metric(advantage_PG.abs()),
        "pg/advantage_square": mean_metric(advantage_PG.square()),
        "pg/zero_advantage_groups": mean_metric((advantage_PG == 0).all(1)),
    }
