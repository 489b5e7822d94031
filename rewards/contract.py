"""What a reward is: images and prompts in, one number an image out.

A reward is a plain function or a class whose instances are called:

    score(images, prompts) -> N numbers      images: uint8 (N, H, W, 3); prompts: N strings

It is a pure function of each (image, prompt): equal input gives equal scores, whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from protocol.errors import RewardError

ScoreFunction = Callable[[np.ndarray, list[str]], Any]


def check_scores(name: str, scores: Any, prompts: Sequence[str]) -> np.ndarray:
    """Returns scores as fp32 (N,). Raises RewardError, naming reward and prompt, unless they are N finite numbers."""
    about = f"reward {name}, on the prompt {prompts[0]!r}," if prompts else f"reward {name}"
    try:
        # A score too large for fp32 becomes infinite, which is refused below by name.
        with np.errstate(over="ignore"):
            array = np.asarray(_to_cpu(scores), dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"{about} did not return numbers: {error}", value=type(scores).__name__, expected="one float an image"
        ) from error
    if array.shape != (len(prompts),):
        raise RewardError(
            f"{about} returned the wrong number of scores",
            value=f"shape {array.shape} for {len(prompts)} images",
            expected=f"shape ({len(prompts)},): one score an image",
        )
    if not np.isfinite(array).all():
        worst = int(np.argmin(np.isfinite(array)))
        raise RewardError(
            f"reward {name}, on the prompt {prompts[worst]!r}, returned a score that is not finite, for image {worst}",
            value=float(array[worst]),
            expected="finite numbers",
            do="clamp the score, or mend the reward",
        )
    return array


def probe_images(num_images: int, size: int) -> np.ndarray:
    """Returns generated images for trying a reward, uint8 (N, size, size, 3): smooth, then ever noisier."""
    generator = np.random.Generator(np.random.Philox(0))
    ramp = np.linspace(0, 255, size)
    smooth = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.full((1, 1), 128.0)), axis=-1)
    strength = np.linspace(0.1, 1.0, num_images)[:, None, None, None]
    noise = generator.uniform(0, 255, (num_images, size, size, 3))
    images: np.ndarray = ((1 - strength) * smooth + strength * noise).round().astype(np.uint8)
    return images


def _to_cpu(scores: Any) -> Any:
    """A torch tensor on a GPU cannot become an array by itself; torch is not imported for those that use none."""
    return scores.detach().cpu() if hasattr(scores, "detach") else scores
