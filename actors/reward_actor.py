"""A reward actor: one reward, built once, scoring one group at a time."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

ScoreFunction = Callable[[np.ndarray, list[str]], Any]
CheckScores = Callable[[str, object, list[str]], np.ndarray]


class RewardActor:
    """Scores whole groups: a reward's batch is the group, so scores do not depend on who else is scored."""

    def __init__(self, label: str, score: ScoreFunction, check: CheckScores) -> None:
        self._label, self._score, self._check = label, score, check
        self._runner: asyncio.Runner | None = None

    @property
    def is_pure(self) -> bool:
        """False if equal images may get other scores when they are scored again."""
        return bool(getattr(self._score, "is_pure", True))

    @property
    def group_wise(self) -> bool:
        """True if a score depends on the siblings."""
        return bool(getattr(self._score, "group_wise", False))

    def score(self, images: np.ndarray, prompt: str, num_states: int = 1) -> np.ndarray:
        """Returns (G M,) fp32 scores of uint8 images (G M, H, W, 3): G siblings at `num_states` M states each, of which
        a group-wise reward sees one state's at a time. Raises RewardError naming the prompt."""
        if not self.group_wise or num_states == 1:
            return self._ask(images, prompt)
        scores_MG = [self._ask(images[state::num_states], prompt) for state in range(num_states)]
        return np.stack(scores_MG, axis=1).ravel()

    def close(self) -> None:
        """Ends the event loop of an asynchronous reward."""
        if self._runner:
            self._runner.close()

    def _ask(self, images: np.ndarray, prompt: str) -> np.ndarray:
        prompts = [prompt] * len(images)
        # A copy, since what Ray hands out cannot be written to, and rewards may well do so.
        scores = self._score(np.array(images), prompts)
        if inspect.iscoroutine(scores):
            # One loop for all calls: clients that a reward keeps belong to the loop that they were made in.
            self._runner = self._runner or asyncio.Runner()
            scores = self._runner.run(scores)
        return self._check(self._label, scores, prompts)
