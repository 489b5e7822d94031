"""Real handwritten digits, coloured: what the base model and the classifier are trained on.

The strokes are scikit-learn's 1,797 digits of 8 by 8 pixels (UCI Optical Recognition of Handwritten Digits). One is
placed on a ground of 32 by 32 pixels by bicubic interpolation, and its darkness mixes the digit's colour into the
ground's. Colours vary a little, so that a colour is a region and not a point.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Generator, Tensor
from torch.nn import functional

from rewards.digit_alignment import COLOURS, DIGITS, IMAGE_SIZE, Said

ASSETS = Path(__file__).resolve().parent
SPLIT_SEED = 0
HELD_OUT_FRACTION = 0.2
NUM_HELD_OUT_PROMPTS = 72

RGB = {
    "red": (0.84, 0.15, 0.16),
    "orange": (0.96, 0.52, 0.10),
    "yellow": (0.97, 0.85, 0.22),
    "green": (0.16, 0.60, 0.27),
    "blue": (0.15, 0.33, 0.80),
    "purple": (0.46, 0.20, 0.62),
    "pink": (0.97, 0.62, 0.76),
    "black": (0.07, 0.07, 0.08),
    "white": (0.95, 0.95, 0.94),
}


@dataclass(frozen=True)
class Strokes:
    """Handwritten digits: `ink_N88` [N=1437, 8, 8] float32 from 0 (paper) to 1 (ink), `digit_N` [N] int64."""

    ink_N88: Tensor
    digit_N: Tensor


@dataclass(frozen=True)
class Variation:
    """How far a rendered digit may stray from the middle of the ground; lengths in pixels of the 32.

    height: least and greatest height; shift: greatest distance on each axis; colour: standard deviation of each
    channel from 0 to 1; turn: greatest angle in radians; blur: greatest radius; noise: greatest standard deviation.
    """

    height: tuple[float, float] = (24.0, 27.0)
    shift: float = 1.5
    colour: float = 0.015
    turn: float = 0.0
    blur: float = 0.0
    noise: float = 0.0


@cache
def load_strokes(training: bool) -> Strokes:
    """The training split (80 %, fixed seed, equal shares of each digit) or the held-out rest."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=HELD_OUT_FRACTION, random_state=SPLIT_SEED, stratify=labels)
    ink, digit = (parts[0], parts[2]) if training else (parts[1], parts[3])
    return Strokes(torch.from_numpy(ink / 16.0).float().reshape(-1, 8, 8), torch.from_numpy(digit).long())


def render(strokes_N88: Tensor, colour_N: Tensor, ground_N: Tensor, how: Variation, noise: Generator) -> Tensor:
    """Images (N, 3, 32, 32) float32 from 0 to 1 of strokes in the colours numbered `colour_N` on `ground_N`."""
    ink_N1HW = _place(strokes_N88, how, noise)
    images = torch.lerp(_tint(ground_N, how, noise), _tint(colour_N, how, noise), ink_N1HW)
    return _degrade(images, how, noise).clamp(0.0, 1.0)


def random_scene(num_images: int, training: bool, how: Variation, noise: Generator) -> tuple[Tensor, Tensor]:
    """Random digits in random pairs of different colours: images (N, 3, 32, 32) and what they show (N, 3)."""
    strokes = load_strokes(training)
    pick_N = torch.randint(len(strokes.digit_N), (num_images,), generator=noise)
    colour_N = torch.randint(len(COLOURS), (num_images,), generator=noise)
    step_N = torch.randint(1, len(COLOURS), (num_images,), generator=noise)
    ground_N = (colour_N + step_N) % len(COLOURS)
    images = render(strokes.ink_N88[pick_N], colour_N, ground_N, how, noise)
    return images, torch.stack([strokes.digit_N[pick_N], colour_N, ground_N], dim=1)


def to_uint8(images_N3HW: Tensor) -> np.ndarray:
    """Images from 0 to 1 as uint8 (N, H, W, 3)."""
    pixels: np.ndarray = (images_N3HW * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


def write_prompt(said: Said) -> str:
    """`Said(7, 1, 4)` as `an orange seven on a blue ground`."""
    return f"{_with_article(COLOURS[said.colour])} {DIGITS[said.digit]} on {_with_article(COLOURS[said.ground])} ground"


def split_scenes(seed: int = SPLIT_SEED) -> tuple[list[Said], list[Said]]:
    """Training (648) and held-out (72) combinations of digit, colour and ground.

    Each of the 72 ordered pairs of different colours is held out once, with a digit of its own: so every colour is
    held out 8 times as digit and 8 times as ground, and every digit 7 or 8 times.
    """
    pairs = [pair for pair in product(range(len(COLOURS)), repeat=2) if pair[0] != pair[1]]
    order = np.random.default_rng(seed).permutation(NUM_HELD_OUT_PROMPTS)
    held_out = {Said(int(turn) % len(DIGITS), *pair) for turn, pair in zip(order, pairs, strict=True)}
    scenes = [Said(digit, *pair) for digit in range(len(DIGITS)) for pair in pairs]
    return [scene for scene in scenes if scene not in held_out], sorted(held_out)


def _place(strokes_N88: Tensor, how: Variation, noise: Generator) -> Tensor:
    """Ink (N, 1, 32, 32) from 0 to 1: strokes scaled, shifted and turned on an empty ground."""
    num = len(strokes_N88)
    height = _uniform((num,), *how.height, noise)
    angle = _uniform((num,), -how.turn, how.turn, noise)
    shift_N2 = _uniform((num, 2), -how.shift, how.shift, noise) * (2.0 / IMAGE_SIZE)
    cos, sin = torch.cos(angle), torch.sin(angle)
    turn_N22 = torch.stack([cos, -sin, sin, cos], dim=1).reshape(num, 2, 2)
    theta_N23 = torch.cat([turn_N22, shift_N2[:, :, None]], dim=2) * (IMAGE_SIZE / height)[:, None, None]
    grid = functional.affine_grid(theta_N23, [num, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    ink = functional.grid_sample(strokes_N88[:, None], grid, mode="bicubic", align_corners=False)
    # Bicubic interpolation of 8 pixels is soft; a steeper middle makes strokes plain without jagged edges.
    soft = ((ink - 0.2) / 0.55).clamp(0.0, 1.0)
    return soft * soft * (3.0 - 2.0 * soft)


def _tint(colour_N: Tensor, how: Variation, noise: Generator) -> Tensor:
    palette = torch.tensor([RGB[name] for name in COLOURS])
    jitter = how.colour * torch.randn(len(colour_N), 3, generator=noise)
    return (palette[colour_N] + jitter)[:, :, None, None]


def _degrade(images: Tensor, how: Variation, noise: Generator) -> Tensor:
    if how.blur:
        radius = _uniform((len(images), 1, 1, 1), 0.0, how.blur, noise)
        # A mixture of the image and its 3x3 mean costs one pooling for a whole batch of different blurs.
        padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
        images = torch.lerp(images, functional.avg_pool2d(padded, 3, stride=1), radius)
    if how.noise:
        spread = _uniform((len(images), 1, 1, 1), 0.0, how.noise, noise)
        images = images + spread * torch.randn(images.shape, generator=noise)
    return images


def _uniform(shape: tuple[int, ...], low: float, high: float, noise: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=noise)


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
