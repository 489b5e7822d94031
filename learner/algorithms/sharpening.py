"""Diffusion-Sharpening: training on the candidate whose excursion scored best (arXiv 2502.12146).

G candidates make a few sampling steps from a noised latent; the states that they visit are scored by a reward.

    SFT   (Algorithm 1, Eq. 9):   L = mean_j w_j e_bj
    RLHF  (Algorithm 2, Eq. 11):  L = -ln sig(logit - margin),  logit = -beta_full ((e_b - ref_b) - (e_a - ref_a))

b is the best candidate, a the worst, e_ij the latent_mean squared error of the noise predicted at state j of
candidate i against the noise that candidate i began with. States come from the group, and no gradient passes through
the steps between them, unless the caller visits them again as the released code does. What the candidates share decides
which way the reward pushes (algorithms.md 4.4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.algorithms.metrics import Metrics, mean_metric

SelectOn = Literal["path_mean", "path_sum", "final_x0"]


@dataclass(frozen=True)
class Selection:
    """Whom to train on, of P groups: sibling numbers (long), and the scores of the two, best first (fp64).

    usable_P is false where best and worst are one sibling, as where all scores are equal: RLHF leaves those groups
    out, SFT trains on them all the same.

        Selection(best_P=[2, 0], worst_P=[0, 0], reward_P2=[[.7, .1], [.5, .5]], usable_P=[True, False], metrics={...})
    """

    best_P: Tensor
    worst_P: Tensor
    reward_P2: Tensor
    usable_P: Tensor
    metrics: Metrics


def sharpening_select(
    state_reward_PGM: Tensor | None,
    final_reward_PG: Tensor | None,
    state_mask_PM: Tensor,
    *,
    select_on: SelectOn,
    selection: Literal["best", "random"],
    draws_P: Tensor,
) -> Selection:
    """Chooses the best and the worst of the G siblings of P groups; the smallest sibling number among equals.

    state_reward_PGM: rewards of the images predicted at the visited states; state_mask_PM (bool) is false where a
    group has fewer than M states, and what stands there is ignored. final_reward_PG: rewards of the clean images
    that the candidates started from. Either is None if it was not asked, but not the one that `select_on` needs.
    A score is the sum over states (Eq. 8), their mean (released code), or the final reward. `random`, the control,
    makes any two different siblings best and worst, by draws_P, one a group from [0, 1). Raises ValueError for
    missing or non-finite rewards, a group without states and draws outside of that.
    """
    score_PG = _scores(state_reward_PGM, final_reward_PG, state_mask_PM, select_on)
    if selection == "random":
        best_P, worst_P = _random_pair(draws_P, score_PG.shape[1])
    else:
        # Of equal values both functions return the first.
        best_P, worst_P = score_PG.argmax(1), score_PG.argmin(1)
    reward_P2 = score_PG.gather(1, torch.stack([best_P, worst_P], dim=1))
    usable_P = best_P != worst_P
    metrics = {
        "sharpening/score_best": mean_metric(reward_P2[:, 0]),
        "sharpening/score_worst": mean_metric(reward_P2[:, 1]),
        "sharpening/score_gap": mean_metric(_first_minus_second(reward_P2)),
        "sharpening/m_mean": mean_metric(state_mask_PM.sum(1)),
        "pairs/tied": mean_metric(~usable_P),
    }
    return Selection(best_P, worst_P, reward_P2, usable_P, metrics)


def sharpening_sft(error_PM: Tensor, weight_PM: Tensor, usable_P: Tensor, *, normaliser: int) -> tuple[Tensor, Metrics]:
    """Returns (loss, metrics) of the chosen candidates' errors (Eq. 9); differentiable in `error_PM`.

    error_PM: latent_mean squared errors at the M visited states of P groups, fp32 or fp64. weight_PM: w_j, 1 as the
    paper leaves them open, and 0 at states that a group does not have; the mean is over the states with a weight.
    usable_P (bool): groups that count; a tied group does, as plain SFT of its first sibling. The loss is summed over
    the groups given and divided by `normaliser`, the number of those that count over all ranks. Raises ValueError
    for shapes that do not fit, weights that are negative or not finite, or a group that counts and has no state.
    """
    _check_weights(weight_PM, usable_P, error_PM[:, None])
    error_P = _mean_over_states(error_PM[:, None], weight_PM, usable_P)[:, 0]
    metrics = {"sharpening/error_selected": mean_metric(error_P[usable_P])}
    return _total(error_P, usable_P, normaliser), metrics


def sharpening_rlhf(
    error_P2M: Tensor,
    error_ref_P2M: Tensor,
    weight_PM: Tensor,
    reward_P2: Tensor,
    usable_P: Tensor,
    *,
    beta: float,
    margin: Literal["none", "inside", "outside"],
    normaliser: int,
) -> tuple[Tensor, Metrics]:
    """Returns (loss, metrics) of the best candidates against the worst (Eq. 11); differentiable in `error_P2M`.

    Column 0 is the best. error_P2M, error_ref_P2M, weight_PM, normaliser: as `sharpening_sft` has them; for the
    released code's ref_times (`first`) the caller expands the reference's errors at the first state over all M, and
    the loss at theta = ref is then no longer ln 2. reward_P2: the scores. beta: in the convention of beta_full.
    The reward difference stands nowhere by default, `inside` the logistic (the paper) or is added `outside`, where
    it has no gradient (released code). Groups with usable_P false are left out and may hold anything. Raises
    ValueError as `sharpening_sft` does and for a non-finite reference error or reward.
    """
    _check_weights(weight_PM, usable_P, error_P2M)
    if error_ref_P2M.shape != error_P2M.shape:
        raise ValueError(f"errors {tuple(error_P2M.shape)} and reference's {tuple(error_ref_P2M.shape)} do not fit")
    error_P2 = _mean_over_states(error_P2M, weight_PM, usable_P)
    ref_P2 = _finite(_mean_over_states(error_ref_P2M.detach(), weight_PM, usable_P), "reference error")
    reward_P2 = _finite(torch.where(usable_P[:, None], reward_P2.double(), 0.0), "reward")
    logit_P = -beta * _first_minus_second(error_P2 - ref_P2)
    gap_P = _first_minus_second(reward_P2)
    loss_P = -logsigmoid(logit_P - gap_P if margin == "inside" else logit_P)
    if margin == "outside":
        loss_P = loss_P + gap_P
    metrics = {
        "sharpening/error_selected": mean_metric(error_P2[usable_P, 0]),
        "sharpening/margin": mean_metric(logit_P[usable_P]),
    }
    return _total(loss_P, usable_P, normaliser), metrics


def plain_error(error_PM: Tensor, weight_PM: Tensor) -> Tensor:
    """Returns the errors of candidates that were not selected, as `sharpening_sft` takes those that were: (P,) fp64.

    A reward that prefers easy noise lowers the selected candidates' error with no weight changed (algorithms.md 4.6);
    this one it does not lower. Raises ValueError as `sharpening_sft` does.
    """
    everyone_P = torch.ones(len(error_PM), dtype=torch.bool, device=error_PM.device)
    _check_weights(weight_PM, everyone_P, error_PM[:, None])
    return _mean_over_states(error_PM[:, None], weight_PM, everyone_P)[:, 0]


def _scores(
    state_reward_PGM: Tensor | None, final_reward_PG: Tensor | None, state_mask_PM: Tensor, select_on: SelectOn
) -> Tensor:
    if not bool(state_mask_PM.any(1).all()):
        raise ValueError("sharpening was given a group without a visited state")
    if select_on == "final_x0":
        score_PG = _asked(final_reward_PG, "final", select_on).double()
    else:
        state_reward_PGM = _asked(state_reward_PGM, "state", select_on)
        score_PG = torch.where(state_mask_PM[:, None], state_reward_PGM.double(), 0.0).sum(2)
    if select_on == "path_mean":
        score_PG = score_PG / state_mask_PM.sum(1, keepdim=True)
    return _finite(score_PG, "reward")


def _first_minus_second(value_P2: Tensor) -> Tensor:
    return value_P2[:, 0] - value_P2[:, 1]


def _finite(value: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"sharpening was given a non-finite {name}")
    return value


def _asked(reward: Tensor | None, kind: str, select_on: SelectOn) -> Tensor:
    if reward is None:
        raise ValueError(f"sharpening selects on {select_on}, but its groups have no {kind} rewards")
    return reward


def _random_pair(draws_P: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Each of the G(G-1) ordered pairs has an equal part of [0, 1); a lone sibling is paired with itself."""
    if not bool(((draws_P >= 0) & (draws_P < 1)).all()):
        raise ValueError("a draw that selects siblings must be in [0, 1)")
    num_others = max(group_size - 1, 1)
    pair_P = (draws_P.double() * group_size * num_others).long()
    best_P = pair_P // num_others
    return best_P, (best_P + 1 + pair_P % num_others) % group_size


def _check_weights(weight_PM: Tensor, usable_P: Tensor, error_PNM: Tensor) -> None:
    num_groups, _, num_states = error_PNM.shape
    if weight_PM.shape != (num_groups, num_states) or usable_P.shape != (num_groups,):
        raise ValueError(
            f"sharpening has errors of {num_groups} groups at {num_states} states, but weights of shape "
            f"{tuple(weight_PM.shape)} and {len(usable_P)} flags"
        )
    if not bool((torch.isfinite(weight_PM) & (weight_PM >= 0)).all()):
        raise ValueError("sharpening was given a weight that is negative or not finite")
    if not bool((weight_PM > 0).any(1)[usable_P].all()):
        raise ValueError("sharpening was given a group without a visited state")


def _mean_over_states(error_PNM: Tensor, weight_PM: Tensor, usable_P: Tensor) -> Tensor:
    """Returns the mean of w_j e_j over the states with a weight, (P, N) fp64; 0 for groups that do not count."""
    valid_P1M = (weight_PM > 0)[:, None] & usable_P[:, None, None]
    weighted_PNM = torch.where(valid_P1M, error_PNM.double(), 0.0) * weight_PM[:, None]
    return weighted_PNM.sum(2) / valid_P1M.sum(2).clamp(min=1)


def _total(loss_P: Tensor, usable_P: Tensor, normaliser: int) -> Tensor:
    if normaliser < int(usable_P.sum()):
        raise ValueError(f"the normaliser counts usable groups over all ranks, but is {normaliser}")
    # Where no rank has a usable group the loss is 0.
    return torch.where(usable_P, loss_P, 0.0).sum() / max(normaliser, 1)
