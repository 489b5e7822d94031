"""Which siblings of a group are learnt from: pairs by reward, the best of n, or one at random (the control)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.algorithms.metrics import Metrics, mean_metric
from protocol.algorithms import Pairs

MIN_GROUP_SIZE = 2


@dataclass(frozen=True)
class ChosenPairs:
    """Q pairs of siblings: group_Q, winner_Q, loser_Q are long, weight_Q is fp64; in the order of groups.

    A worked example, rule `all_pairs`, rewards [[1, 0, 0]]: group [0, 0], winner [0, 0], loser [1, 2], weight
    [1/2, 1/2], 1 pair tied, none below a threshold.
    """

    group_Q: Tensor
    winner_Q: Tensor
    loser_Q: Tensor
    weight_Q: Tensor
    num_tied: int
    num_below_threshold: int

    @property
    def num_units(self) -> int:
        """This rank's part of a pair loss's normaliser: groups with a pair for `all_pairs`, else pairs."""
        return round(self.weight_Q.sum().item())


def make_pairs(reward_PG: Tensor, settings: Pairs) -> ChosenPairs:
    """Pairs siblings by reward (rules in `Pairs`); differences are taken in fp64.

    Weights are 1, but for `all_pairs`, where a group's add up to 1. Of equally good, or bad, siblings `best_worst`
    takes that of the smallest number; a group of one reward is one tied pair. Raises ValueError for fewer than two
    siblings or a non-finite reward.
    """
    _check(reward_PG)
    if reward_PG.shape[1] < MIN_GROUP_SIZE:
        raise ValueError(f"a pair needs a group of at least 2 siblings, these have {reward_PG.shape[1]}")
    first_PQ, second_PQ = _candidates(reward_PG, settings)
    difference_PQ = reward_PG.gather(1, first_PQ).double() - reward_PG.gather(1, second_PQ).double()
    threshold = settings.threshold if settings.rule == "threshold" else 0.0
    tied_PQ, kept_PQ = difference_PQ == 0, difference_PQ.abs() > threshold
    weight_PQ = torch.ones_like(difference_PQ)
    if settings.rule == "all_pairs":
        weight_PQ = weight_PQ / kept_PQ.sum(1, keepdim=True).clamp(min=1)
    first_wins_PQ = difference_PQ > 0
    return ChosenPairs(
        group_Q=kept_PQ.nonzero()[:, 0],
        winner_Q=torch.where(first_wins_PQ, first_PQ, second_PQ)[kept_PQ],
        loser_Q=torch.where(first_wins_PQ, second_PQ, first_PQ)[kept_PQ],
        weight_Q=weight_PQ[kept_PQ],
        num_tied=int(tied_PQ.sum()),
        num_below_threshold=int((~tied_PQ & ~kept_PQ).sum()),
    )


def best_of_n(reward_PG: Tensor) -> Tensor:
    """Returns each group's sibling of the highest reward, (P,) long; of several the smallest number.

    Raises ValueError for a non-finite reward or a group of none.
    """
    _check(reward_PG)
    return reward_PG.argmax(1)


def random_selection(draws_P: Tensor, num_siblings: int) -> Tensor:
    """Returns one sibling of each group, (P,) long, by draws from [0, 1). Raises ValueError for others."""
    if not bool(((draws_P >= 0) & (draws_P < 1)).all()):
        raise ValueError("a draw that selects a sibling must be in [0, 1)")
    return (draws_P.double() * num_siblings).long()


def selection_metrics(reward_PG: Tensor, chosen_P: Tensor) -> Metrics:
    """Returns how far above its group's mean the chosen sibling is."""
    chosen_reward_P = reward_PG.gather(1, chosen_P[:, None])[:, 0]
    return {"select/gap": mean_metric(chosen_reward_P.double() - reward_PG.double().mean(1))}


def _candidates(reward_PG: Tensor, settings: Pairs) -> tuple[Tensor, Tensor]:
    """The siblings that may make a pair: best and worst, (P, 1), or all i < j, (P, G(G-1)/2)."""
    if settings.rule == "best_worst":
        return reward_PG.argmax(1, keepdim=True), reward_PG.argmin(1, keepdim=True)
    num_groups, num_siblings = reward_PG.shape
    first, second = torch.triu_indices(num_siblings, num_siblings, offset=1, device=reward_PG.device)
    return first.expand(num_groups, -1), second.expand(num_groups, -1)


def _check(reward_PG: Tensor) -> None:
    if reward_PG.dim() != 2 or reward_PG.shape[1] == 0:
        raise ValueError(f"rewards must be of groups of siblings, (P, G), but are {tuple(reward_PG.shape)}")
    if not bool(torch.isfinite(reward_PG).all()):
        raise ValueError("selection was given a non-finite reward")
