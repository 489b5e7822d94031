"""Share of its siblings that an image beats by another reward: ranks within the group instead of marks.

Ranks are what preference-based comparisons within a group come to (Pref-GRPO, arXiv 2508.20751): tiny differences that
a model's marks make too much of, outliers and drifting scales no longer count. Pref-GRPO asks a model that sees two
images at once; we compare the marks that a point-wise reward gives, which costs N scores and not N (N - 1) / 2.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from protocol.errors import RewardError
from rewards.contract import check_scores
from rewards.loading import build


class PairwiseWinRate:
    """(siblings with a lower score + half of those with the same) / (N - 1), from 0 to 1.

    Its mean over a group is 1/2, always: to see a run's progress, report the other reward beside it with weight 0.

    of: the other reward's name, as in a recipe. of_kwargs: its keyword arguments. Where its file has PINS, the recipe
    must repeat them as this reward's `pins`.
    """

    group_wise = True

    def __init__(self, of: str, of_kwargs: Mapping[str, Any] | None = None, device: str = "cpu") -> None:
        self._name, self.of = of, build(of, of_kwargs or {}, device)
        self.is_pure: bool = getattr(self.of, "is_pure", True)

    async def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Returns (N,) float64. A coroutine, whether the other reward is one or not."""
        if len(prompts) < 2:
            raise RewardError(
                "pairwise_win_rate compares siblings, and an image has none",
                value=f"a group of {len(prompts)}, on the prompts {prompts}",
                expected="group_size of at least 2",
            )
        scores = self.of(images_NHW3, prompts)
        if inspect.isawaitable(scores):
            scores = await scores
        return win_rate(check_scores(self._name, scores, prompts))


def win_rate(scores_N: np.ndarray) -> np.ndarray:
    """Returns (N,) float64, the share of other entries that each is above; ties count half."""
    above_NN = np.sign(scores_N[:, None] - scores_N[None, :])
    rate_N: np.ndarray = 0.5 + above_NN.sum(axis=1, dtype=np.float64) / (2 * (len(scores_N) - 1))
    return rate_N
