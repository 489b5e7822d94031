"""Makes the two small datasets that recipes on data use: `python -m assets.make_data`.

    digits-images.parquet   real digits in the colours that their captions say: columns image, text
    digits-pairs.parquet    Pick-a-Pic's columns jpg_0, jpg_1, label_0, caption: the scene as said against the one with
                            its colours exchanged, which is what the base model gets wrong; every 16th is a draw

Captions are training prompts only; strokes are the training split's. Seeds are fixed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from assets.digits import ASSETS, Variation, load_strokes, render, split_scenes, to_uint8, write_prompt
from rewards.digit_alignment import Said

NUM_IMAGES = NUM_PAIRS = 384
DRAW_EVERY = 16
IMAGES_FILE, PAIRS_FILE = ASSETS / "digits-images.parquet", ASSETS / "digits-pairs.parquet"


def main() -> None:
    """Writes both files."""
    noise = torch.Generator().manual_seed(1)
    said = _draw_scenes(NUM_IMAGES, noise)
    _write({"image": _encode(_draw(said, noise)), "text": [write_prompt(scene) for scene in said]}, IMAGES_FILE)
    _write(_pairs(_draw_scenes(NUM_PAIRS, noise), noise), PAIRS_FILE)


def _pairs(said: Sequence[Said], noise: torch.Generator) -> dict[str, list[object]]:
    right = _encode(_draw(said, noise))
    wrong = _encode(_draw([Said(scene.digit, scene.ground, scene.colour) for scene in said], noise))
    first_wins = torch.rand(len(said), generator=noise) < 0.5
    labels = [0.5 if i % DRAW_EVERY == 0 else float(first) for i, first in enumerate(first_wins.tolist())]
    pairs = zip(right, wrong, first_wins.tolist(), strict=True)
    in_order = [(one, other) if first else (other, one) for one, other, first in pairs]
    return {
        "jpg_0": [one for one, _ in in_order],
        "jpg_1": [other for _, other in in_order],
        "label_0": list(labels),
        "caption": [write_prompt(scene) for scene in said],
    }


def _draw_scenes(number: int, noise: torch.Generator) -> list[Said]:
    training, _ = split_scenes()
    return [training[i] for i in torch.randint(len(training), (number,), generator=noise).tolist()]


def _draw(said: Sequence[Said], noise: torch.Generator) -> np.ndarray:
    """Returns uint8 (N, 32, 32, 3): each scene with a stroke of its digit, in flat colours."""
    strokes = load_strokes(training=True)
    picks = [_pick(strokes.digit_N, scene.digit, noise) for scene in said]
    colour_N, ground_N = (torch.tensor([getattr(scene, name) for scene in said]) for name in ("colour", "ground"))
    return to_uint8(render(strokes.ink_N88[torch.tensor(picks)], colour_N, ground_N, Variation(), noise))


def _pick(digit_N: Tensor, digit: int, noise: torch.Generator) -> int:
    candidates = (digit_N == digit).nonzero()[:, 0]
    return int(candidates[int(torch.randint(len(candidates), (1,), generator=noise))])


def _encode(images: np.ndarray) -> list[object]:
    encoded: list[object] = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", optimize=True)
        encoded.append(file.getvalue())
    return encoded


def _write(columns: dict[str, list[object]], path: object) -> None:
    parquet.write_table(pa.table(columns), path, compression="zstd")


if __name__ == "__main__":
    main()
