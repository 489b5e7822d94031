"""Sample grids: a row a prompt, with its prompt and mean reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL_PX = 96
GAP_PX = 6
CAPTION_PX = 18

Row = tuple[str, np.ndarray, np.ndarray | None]
"""(prompt, images uint8 (N, H, W, 3), rewards (N,) or None)."""


def grid(rows: Sequence[Row], title: str = "") -> Image.Image:
    """Returns a picture of all rows. Small images are enlarged pixel by pixel, large ones smoothly reduced."""
    num_columns = max(len(images) for _, images, _ in rows)
    top = CAPTION_PX + GAP_PX if title else 0
    row_px = CAPTION_PX + CELL_PX + GAP_PX
    canvas = Image.new("RGB", (num_columns * (CELL_PX + GAP_PX) + GAP_PX, top + len(rows) * row_px + GAP_PX), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    draw.text((GAP_PX, GAP_PX // 2), title, fill="black", font=ImageFont.load_default(size=14))
    for number, (prompt, images, rewards) in enumerate(rows):
        y = top + number * row_px
        caption = prompt if rewards is None else f"{prompt} | reward {np.mean(rewards):.2f}"
        draw.text((GAP_PX, y + 2), caption, fill="black", font=font)
        for column, image in enumerate(images):
            canvas.paste(_cell(image), (GAP_PX + column * (CELL_PX + GAP_PX), y + CAPTION_PX))
    return canvas


def save_grid(rows: Sequence[Row], path: Path) -> None:
    """Writes a grid as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, title=path.stem).save(path)


def _cell(image: np.ndarray) -> Image.Image:
    small = image.shape[0] < CELL_PX
    return Image.fromarray(image).resize(
        (CELL_PX, CELL_PX), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    )


def side_by_side(left: Path, right: Path, path: Path) -> None:
    """Writes two pictures beside each other."""
    pictures = [Image.open(left).convert("RGB"), Image.open(right).convert("RGB")]
    width, height = sum(p.width for p in pictures) + 4 * GAP_PX, max(p.height for p in pictures)
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(pictures[0], (0, 0))
    canvas.paste(pictures[1], (pictures[0].width + 4 * GAP_PX, 0))
    canvas.save(path)
