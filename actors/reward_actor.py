"""A reward actor: one reward, built once, scoring one group at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

ScoreFunction = Callable[[np.ndarray, list[str]], Sequence[float]]
CheckScores = Callable[[str, object, list[str]], np.ndarray]


class RewardActor:
    """Scores whole groups: a reward's batch is the group, so scores do not depend on who else is scored."""

    def __init__(self, label: str, score: ScoreFunction, check: CheckScores) -> None:
        self._label, self._score, self._check = label, score, check

    def score(self, images: np.ndarray, prompt: str) -> np.ndarray:
        """Returns (G,) fp32 scores of uint8 images (G, H, W, 3). Raises RewardError naming the prompt."""
        prompts = [prompt] * len(images)
        return self._check(self._label, self._score(images, prompts), prompts)
