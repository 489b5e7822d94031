"""Parity: do rollout and learner agree about the log-probability of a step that the rollout drew?

Compared in latent_mean units, like the window (algorithms.md 0.7): a gap of clip_eps would saturate every step
before the first update.
"""

from __future__ import annotations

from protocol.algorithms import Ddpo, PolicyGradient, Prdp
from protocol.errors import TrainingError
from protocol.recipe import Recipe

TOLERANCE_WITHOUT_WINDOW = 1e-5


def tolerance(recipe: Recipe, num_latent_entries: int) -> float:
    """Returns the largest acceptable gap: the recipe's, or a tenth of the window in latent_mean units."""
    if recipe.learner.parity_tolerance is not None:
        return recipe.learner.parity_tolerance
    algorithm = recipe.algorithm
    if not isinstance(algorithm, Prdp | PolicyGradient | Ddpo) or not algorithm.window:
        return TOLERANCE_WITHOUT_WINDOW
    return algorithm.window / 10 / (num_latent_entries if algorithm.latent_reduce == "latent_sum" else 1)


def check(gap: float, limit: float, *, round_: int, workers: str) -> None:
    """Stops the run when the gap is too large, or not a number."""
    if gap <= limit:
        return
    raise TrainingError(
        f"round {round_}: learner and rollouts disagree about log-probabilities",
        value=f"{gap:.3g} (latent_mean, largest of this round's probes; rollouts: {workers})",
        expected=f"at most {limit:.3g}: learner.parity_tolerance, by default a tenth of the proximal window",
        do="give rollouts and learner the same precision, device type and attention kernel; or widen "
        "the algorithm's window (clip_eps or clip_range), or set learner.parity_tolerance if you accept the gap",
    )


def check_start(gap: float, limit: float) -> None:
    """Before the first update the policy is the reference, so every log-ratio must be 0 (0.7 rule 3)."""
    if gap <= limit:
        return
    raise TrainingError(
        "before the first update policy and reference disagree",
        value=f"{gap:.3g} (latent_mean, largest log-ratio)",
        expected=f"at most {limit:.3g}",
        do="this is a defect of the model's code path (dropout on, another dtype or kernel); please report it",
    )
