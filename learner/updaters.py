"""Which updater applies an algorithm."""

from __future__ import annotations

from learner.excursions import ExcursionUpdater
from learner.images import ImageUpdater
from learner.trajectories import TrajectoryUpdater
from learner.update import Tools, Updater


def make_updater(tools: Tools) -> Updater:
    """Returns what applies the recipe's algorithm."""
    match tools.recipe.algorithm.content:
        case "trajectories":
            return TrajectoryUpdater(tools)
        case "images":
            return ImageUpdater(tools)
        case "excursions":
            return ExcursionUpdater(tools)
