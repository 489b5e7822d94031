"""Evaluation: images of fixed prompts at fixed seeds, scored. The rollout's sampler without tickets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffusion.chain import Chain
from protocol.tickets import evaluation_seeds

ScoreImages = Callable[[np.ndarray, str], Mapping[str, np.ndarray]]
"""(images uint8 (N, H, W, 3), prompt) -> label -> (N,) scores."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its standard error; the error is over prompts, whose images are not independent."""

    mean: float
    standard_error: float


def draw_images(chain: Chain, prompt: str, num_images: int, seed: int) -> np.ndarray:
    """Returns uint8 (N, H, W, 3), at the evaluation's fixed seeds."""
    latents = chain.sample(prompt, evaluation_seeds(seed, prompt, num_images)).latents_GSCHW[:, -1].float()
    return chain.policy.decode(latents)


def score_prompts(
    chain: Chain, prompts: Sequence[str], num_images: int, seed: int, score: ScoreImages
) -> dict[str, np.ndarray]:
    """Returns label -> (prompts, images) scores."""
    rows = [score(draw_images(chain, prompt, num_images, seed), prompt) for prompt in prompts]
    return {label: np.stack([row[label] for row in rows]) for label in rows[0]}


def estimate(score_PN: np.ndarray) -> Estimate:
    """Returns the mean over prompts of the mean over images, with its standard error."""
    mean_P = score_PN.astype(np.float64).mean(axis=1)
    error = mean_P.std(ddof=1) / np.sqrt(len(mean_P)) if len(mean_P) > 1 else float("nan")
    return Estimate(float(mean_P.mean()), float(error))


def win_rate(score_PN: np.ndarray, base_PN: np.ndarray) -> Estimate:
    """Returns the share of images that score above the base's of the same prompt and seed; ties count half."""
    return estimate((score_PN > base_PN) + 0.5 * (score_PN == base_PN))
