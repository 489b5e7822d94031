"""DDPO's advantages: rewards standardised by their prompt's own statistics (Black et al., arXiv 2305.13301).

    A_i = clip((r_i - mean_prompt) / (std_prompt + 1e-8), -max_advantage, max_advantage)

The loss is `policy_gradient`. The statistics are of a prompt's newest rewards, the round's own included, as in
ddpo-pytorch's stat_tracking.py. We differ: it adds 1e-6 to the std, and equal rewards give exactly 0 here.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learner.algorithms.metrics import Metrics, mean_metric
from protocol.algorithms import Ddpo

STD_OFFSET = 1e-8


@dataclass(frozen=True)
class RewardTracker:
    """The newest rewards of each prompt, oldest first: `RewardTracker({"a red fox": (0.25, 0.5)})`. Every rank keeps
    the same one; it is part of a checkpoint."""

    newest: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def with_round(self, prompts: Sequence[str], reward_PG: Tensor, buffer_size: int) -> RewardTracker:
        """Returns the tracker after a round; it keeps the newest `buffer_size` rewards of a prompt."""
        newest = dict(self.newest)
        for prompt, reward_G in zip(prompts, reward_PG.tolist(), strict=True):
            newest[prompt] = (*newest.get(prompt, ()), *reward_G)[-buffer_size:]
        return RewardTracker(newest)

    def to_json(self) -> dict[str, list[float]]:
        """Returns what JSON writes and reads back bit for bit."""
        return {prompt: list(rewards) for prompt, rewards in self.newest.items()}

    @classmethod
    def from_json(cls, saved: Mapping[str, Sequence[float]]) -> RewardTracker:
        """Returns the tracker that `to_json` was called on."""
        return cls({prompt: tuple(rewards) for prompt, rewards in saved.items()})


def per_prompt_advantage(
    reward_PG: Tensor, prompts: Sequence[str], tracker: RewardTracker, settings: Ddpo
) -> tuple[Tensor, RewardTracker, Metrics]:
    """Returns (advantage_PG fp64, the tracker after the round, metrics), once a round.

    `reward_PG` and `prompts`, one a group, are the whole round's, gathered over ranks and sorted by ticket_id: every
    rank computes the same and takes its own rows. The rewards enter the tracker first; a prompt with fewer than
    `min_count` there is standardised by the round's mean and std. Stds are population stds. Where the std is 0, as
    for a new prompt's only sample in a round of one, the advantage is exactly 0. Raises ValueError for non-finite
    rewards or a wrong number of prompts.
    """
    if len(prompts) != len(reward_PG):
        raise ValueError(f"ddpo was given {len(prompts)} prompts for {len(reward_PG)} groups")
    if not bool(torch.isfinite(reward_PG).all()):
        raise ValueError("ddpo was given a non-finite reward")
    tracker = tracker.with_round(prompts, reward_PG, settings.buffer_size)
    newest_P = [tracker.newest[prompt] for prompt in prompts]
    rare_P = [len(newest) < settings.min_count for newest in newest_P]
    of_round = _mean_and_std(reward_PG.flatten().tolist())
    moments_P2 = [of_round if rare else _mean_and_std(newest) for newest, rare in zip(newest_P, rare_P, strict=True)]
    mean_P1, std_P1 = torch.tensor(moments_P2, dtype=torch.float64, device=reward_PG.device)[..., None].unbind(1)
    score_PG = torch.where(std_P1 == 0, 0.0, (reward_PG.double() - mean_P1) / (std_P1 + STD_OFFSET))
    metrics = {
        "pg/fallback_fraction": mean_metric(torch.tensor(rare_P)),
        "pg/advantage_clipped": mean_metric(score_PG.abs() > settings.max_advantage),
    }
    return score_PG.clamp(-settings.max_advantage, settings.max_advantage), tracker, metrics


def _mean_and_std(rewards: Sequence[float]) -> tuple[float, float]:
    """Population moments. `pstdev` is exact before its last rounding: 0 for equal rewards, the same in any order."""
    return statistics.fmean(rewards), statistics.pstdev(rewards)
