"""Two small datasets on disk, of random images of 16 pixels: real files that the `datasets` library reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

SIDE = 16
CAPTIONS = ("a red seven", "a blue one", "a green two", "a red two", "a blue seven", "a green one")
LABELS = (1, 0, 0.5, 1, 0, 0.5)
"""Of two images of a pair the first wins, the second, or neither."""


def random_image(seed: int) -> np.ndarray:
    """Pixels that no other seed has, uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def write_images(folder: Path) -> str:
    """Writes six images with captions; row i holds `random_image(i)`."""
    for row in range(len(CAPTIONS)):
        _save(random_image(row), folder, f"{row}.png")
    return write_rows(folder, [{"file_name": f"{row}.png", "text": text} for row, text in enumerate(CAPTIONS)])


def write_pairs(folder: Path) -> str:
    """Writes six pairs of which the third and the sixth are undecided; row i holds `random_image(100 + i)` and, second,
    `random_image(200 + i)`."""
    for row in range(len(CAPTIONS)):
        _save(random_image(100 + row), folder, f"{row}-0.png")
        _save(random_image(200 + row), folder, f"{row}-1.png")
    rows = [
        {"jpg_0_file_name": f"{row}-0.png", "jpg_1_file_name": f"{row}-1.png", "label_0": label, "caption": caption}
        for row, (label, caption) in enumerate(zip(LABELS, CAPTIONS, strict=True))
    ]
    return write_rows(folder, rows)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Writes what an image folder says of its images. Returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@contextmanager
def library_cache(folder: Path) -> Iterator[None]:
    """Within it the library keeps its copies in a folder of the test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
        yield


def _save(pixels: np.ndarray, folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
