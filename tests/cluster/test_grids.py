"""Sample grids: every image in its place, small ones enlarged without a blur."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.grids import CAPTION_PX, CELL_PX, GAP_PX, grid, save_grid, side_by_side

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [70, 80, 90], [200, 100, 0]], np.uint8)


def plain_rows(size: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Two rows of three images, each of one colour."""
    images = np.broadcast_to(COLOURS[:, None, None], (6, size, size, 3))
    return [("a red seven", images[:3], np.zeros(3)), ("a blue one", images[3:], np.ones(3))]


@pytest.mark.parametrize("size", [8, 32, 96, 200])
@pytest.mark.parametrize("title", ["", "before"])
def test_every_image_fills_the_cell_of_its_row_and_column(size: int, title: str) -> None:
    picture = np.asarray(grid(plain_rows(size), title))
    top = CAPTION_PX + GAP_PX if title else 0
    for number, colour in enumerate(COLOURS):
        row, column = divmod(number, 3)
        y = top + row * (CAPTION_PX + CELL_PX + GAP_PX) + CAPTION_PX
        x = GAP_PX + column * (CELL_PX + GAP_PX)
        assert (picture[y : y + CELL_PX, x : x + CELL_PX] == colour).all()


def test_small_images_are_enlarged_pixel_by_pixel() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    picture = np.asarray(grid([("", image, np.zeros(1))]))
    cell = picture[CAPTION_PX : CAPTION_PX + CELL_PX, GAP_PX : GAP_PX + CELL_PX]
    assert np.array_equal(cell[3::6, 3::6], image[0])


def test_rows_of_different_lengths_stand_under_each_other() -> None:
    (prompt, images, rewards), other = plain_rows(8)
    picture = grid([(prompt, images[:1], rewards[:1]), other])
    assert picture.width == 3 * (CELL_PX + GAP_PX) + GAP_PX


@pytest.mark.parametrize("prompt", ["a red seven", ""])
def test_without_rewards_a_row_has_its_prompt_alone(prompt: str) -> None:
    (_, images, rewards), _ = plain_rows(8)
    bare, scored = (np.asarray(grid([(prompt, images, values)])) for values in (None, rewards))
    assert np.array_equal(bare[CAPTION_PX:], scored[CAPTION_PX:])
    assert not np.array_equal(bare[:CAPTION_PX], scored[:CAPTION_PX])
    assert (bare[:CAPTION_PX] == 255).all() == (prompt == "")


def test_a_grid_is_written_where_no_folder_was(tmp_path: Path) -> None:
    save_grid(plain_rows(8), tmp_path / "samples" / "round-000000.png")
    with Image.open(tmp_path / "samples" / "round-000000.png") as picture:
        assert picture.format == "PNG"


def test_two_pictures_stand_beside_each_other_unchanged(tmp_path: Path) -> None:
    for name, width, colour in (("left", 30, "red"), ("right", 40, "blue")):
        Image.new("RGB", (width, 20), colour).save(tmp_path / f"{name}.png")
    side_by_side(tmp_path / "left.png", tmp_path / "right.png", tmp_path / "both.png")
    both = Image.open(tmp_path / "both.png")
    assert both.size == (30 + 4 * GAP_PX + 40, 20)
    assert both.getpixel((29, 19)) == (255, 0, 0)
    assert both.getpixel((30 + 4 * GAP_PX, 0)) == (0, 0, 255)
