"""Datasets of all formats: what is used, what is skipped and why, and which pixels come out.

Images are of one colour or of few, so that each can be told by its pixels.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from actors.datasets import Images, Seen, absolute_winners, scan
from protocol.datasets import Dataset, Manifest, Skipped
from protocol.errors import RecipeError, TrainingError
from protocol.paths import ROOT

RED, GREEN, BLUE, WHITE = (200, 20, 20), (20, 200, 20), (20, 20, 200), (255, 255, 255)
SIDE = 16


@pytest.fixture(autouse=True)
def library_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the library for each test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "library-cache"))
    return tmp_path / "library-cache"


def stripes(*colours: tuple[int, int, int], size: tuple[int, int] = (24, 24)) -> Image.Image:
    """An image of (width, height) with vertical stripes of equal width."""
    parts = np.array_split(np.arange(size[0]), len(colours))
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for columns, colour in zip(parts, colours, strict=True):
        pixels[:, columns] = colour
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def noise(number: int) -> bytes:
    """A JPEG that no other number has."""
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


PNG_RED, PNG_GREEN = encoded(stripes(RED)), encoded(stripes(GREEN))
BROKEN_PNG = PNG_RED[:40] + b"\0" * 10 + PNG_RED[50:]
TRUNCATED_JPEG = noise(0)[:-100]


def write_folder(folder: Path, rows: Sequence[dict[str, Any]]) -> Dataset:
    """An image folder. A row's `file_name` keys may hold (name, bytes), which are written."""
    folder.mkdir(exist_ok=True)
    lines = []
    for row in rows:
        for name, data in (value for value in row.values() if isinstance(value, tuple)):
            (folder / name).write_bytes(data)
        lines.append(json.dumps({key: value[0] if isinstance(value, tuple) else value for key, value in row.items()}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return Dataset(path=str(folder))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """A tar shard of members in the given order."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


def write_pairs(path: Path, rows: Sequence[tuple[Any, ...]], **settings: Any) -> Dataset:
    """A parquet file in Pick-a-Pic's layout of (jpg_0, jpg_1, label_0, caption, created_at, ...)."""
    names = ("jpg_0", "jpg_1", "label_0", "caption", "created_at")
    columns = dict(zip(names, zip(*rows, strict=True), strict=False))
    pq.write_table(pa.table({name: list(column) for name, column in columns.items()}), path)
    return Dataset(path=str(path), kind="pairs", **settings)


def captions(manifest: Manifest) -> list[str]:
    """The captions of the usable rows, in order."""
    return [item.caption for item in manifest.items]


def reasons(manifest: Manifest) -> dict[int, str]:
    """Why each skipped row is skipped."""
    return {skipped.row: skipped.reason for skipped in manifest.skipped}


def load(settings: Dataset, row: int = 0, side: int = SIDE, flipped: bool = False) -> np.ndarray:
    """The pixels of one row."""
    return Images(settings, scan(settings), side).load(row, flipped=flipped)


def assert_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> None:
    """All pixels are of one colour, up to JPEG's and the filter's rounding."""
    np.testing.assert_allclose(pixels, np.broadcast_to(colour, pixels.shape), atol=3)


# --- what is used and what is skipped -----------------------------------------------------------------------


def test_bad_rows_of_a_folder_are_skipped_and_listed_with_their_reasons(tmp_path: Path) -> None:
    settings = write_folder(
        tmp_path / "images",
        [
            {"file_name": ("0.png", PNG_RED), "text": "a red field"},
            {"file_name": ("1.png", BROKEN_PNG), "text": "broken"},
            {"file_name": ("2.jpg", TRUNCATED_JPEG), "text": "truncated"},
            {"file_name": ("3.png", b"not an image"), "text": "no image"},
            {"file_name": ("4.png", b""), "text": "an empty file"},
            {"file_name": "5.png", "text": "a file that is not there"},
            {"file_name": ("6.png", PNG_RED)},
            {"file_name": ("7.png", PNG_RED), "text": "  \n"},
            {"text": "no file named"},
            {"file_name": ("9.png", PNG_GREEN), "text": " a green field "},
        ],
    )
    manifest = scan(settings)
    assert captions(manifest) == ["a red field", "a green field"]
    assert [item.row for item in manifest.items] == [0, 9]
    assert reasons(manifest) == {
        **dict.fromkeys((1, 2, 3), "unreadable_image"),
        **dict.fromkeys((4, 5, 8), "no_image"),
        **dict.fromkeys((6, 7), "no_caption"),
    }
    assert manifest.skipped_counts == {"no_caption": 2, "no_image": 3, "unreadable_image": 3}
    details = {skipped.row: skipped.detail for skipped in manifest.skipped}
    assert "truncated" in details[2]
    assert details[3] == "no known image format"
    assert "5.png" in details[5]


def test_samples_of_tar_shards_may_lack_a_caption_or_have_another_image_format(tmp_path: Path) -> None:
    """The first sample too, which others take the columns from."""
    write_tar(tmp_path / "tars" / "b.tar", {"3.jpg": noise(3), "3.txt": b"three", "3.json": b'{"a": 1}'})
    first = {"0.jpg": noise(0), "1.png": PNG_RED, "1.txt": "rot, größer".encode(), "2.jpg": TRUNCATED_JPEG}
    write_tar(tmp_path / "tars" / "a.tar", {**first, "2.txt": b"two", "4.txt": b"four"})
    manifest = scan(Dataset(path=str(tmp_path / "tars" / "*.tar")))
    assert captions(manifest) == ["rot, größer", "three"]
    assert [item.row for item in manifest.items] == [1, 4]
    assert reasons(manifest) == {0: "no_caption", 2: "unreadable_image", 3: "no_image"}


def test_parquet_holds_images_as_bytes_as_structs_or_as_the_library_writes_them(tmp_path: Path) -> None:
    cells = [{"bytes": PNG_RED, "path": "0.png"}, None, {"bytes": BROKEN_PNG, "path": None}]
    columns = {"image": cells, "text": ["red", "none", "broken"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": [PNG_RED, None, BROKEN_PNG], "text": columns["text"]}), tmp_path / "c.parquet")
    for name in "abc":
        settings = Dataset(path=str(tmp_path / f"{name}.parquet"))
        manifest = scan(settings)
        assert captions(manifest) == ["red"]
        assert reasons(manifest) == {1: "no_image", 2: "unreadable_image"}
        assert_colour(load(settings), RED)


def test_undecided_pairs_are_dropped_and_counted_and_never_a_win(tmp_path: Path) -> None:
    labels = (1.0, 0.0, 0.5, None, 0.7, float("nan"), 1.0)
    rows: list[tuple[Any, ...]] = [
        (noise(2 * n), noise(2 * n + 1), label, f"prompt {n}") for n, label in enumerate(labels)
    ]
    rows[6] = (rows[6][0], None, 1.0, "one image only")
    manifest = scan(write_pairs(tmp_path / "pairs.parquet", rows))
    assert captions(manifest) == ["prompt 0", "prompt 1"]
    assert reasons(manifest) == {**dict.fromkeys((2, 3, 4, 5), "undecided"), 6: "no_image"}


def test_the_winner_comes_first_by_label(tmp_path: Path) -> None:
    rows = [(PNG_RED, PNG_GREEN, 1, "red wins"), (PNG_RED, PNG_GREEN, 0, "green wins")]
    settings = write_pairs(tmp_path / "pairs.parquet", rows)
    for row, (winner, loser) in enumerate([(RED, GREEN), (GREEN, RED)]):
        pixels = load(settings, row)
        assert pixels.shape == (2, SIDE, SIDE, 3)
        assert_colour(pixels[0], winner)
        assert_colour(pixels[1], loser)


@pytest.mark.parametrize("layout", ["folder", "tar"])
def test_pairs_may_be_in_folders_and_tar_shards_too(tmp_path: Path, layout: str) -> None:
    if layout == "folder":
        files = {"jpg_0_file_name": ("0.png", PNG_RED), "jpg_1_file_name": ("1.png", PNG_GREEN)}
        rows = [{**files, "caption": "green wins", "label_0": 0}, {**files, "caption": "a tie", "label_0": 0.5}]
        settings = write_folder(tmp_path / "pairs", rows).model_copy(update={"kind": "pairs"})
    else:
        won = {"0.jpg_0": PNG_RED, "0.jpg_1": PNG_GREEN, "0.label_0": b"0", "0.caption": b"green wins"}
        tied = {"1.jpg_0": PNG_RED, "1.jpg_1": PNG_GREEN, "1.label_0": b"0.5", "1.caption": b"a tie"}
        write_tar(tmp_path / "0.tar", {**won, **tied})
        settings = Dataset(path=str(tmp_path / "0.tar"), kind="pairs")
    manifest = scan(settings)
    assert captions(manifest) == ["green wins"]
    assert reasons(manifest) == {1: "undecided"}
    assert_colour(load(settings)[0], GREEN)


# --- absolute winners ---------------------------------------------------------------------------------------


def comparisons(*results: tuple[str, str, float | None], latest: Sequence[Any] = ()) -> list[Seen]:
    """Rows of the caption `c`: (first image, second image, label)."""
    times = latest or [None] * len(results)
    return [
        Seen(row, "c", (first, second), label, times[row], None) for row, (first, second, label) in enumerate(results)
    ]


def test_an_absolute_winner_meets_its_latest_loser_only() -> None:
    assert absolute_winners(comparisons(("a", "b", 1.0), ("c", "a", 0.0), ("a", "d", 1.0))) == {2}


@pytest.mark.parametrize(
    ("results", "why"),
    [
        ([("a", "b", 1.0)], "one win"),
        ([("a", "b", 1.0), ("a", "c", 1.0), ("a", "d", 0.0), ("d", "e", 0.5)], "a loss"),
        ([("a", "b", 1.0), ("c", "a", 0.0), ("a", "d", 0.5)], "a tie as first"),
        ([("a", "b", 1.0), ("c", "a", 0.0), ("d", "a", 0.5)], "a tie as second"),
        ([("a", "a", 1.0), ("a", "a", 1.0)], "against itself"),
    ],
)
def test_one_win_a_loss_or_a_tie_is_not_absolute(results: list[tuple[str, str, float]], why: str) -> None:
    assert absolute_winners(comparisons(*results)) == set(), why


def test_an_unlabelled_comparison_is_neither_win_nor_loss() -> None:
    assert absolute_winners(comparisons(("a", "b", 1.0), ("a", "c", None), ("a", "d", 1.0), ("e", "a", None))) == {2}


@pytest.mark.parametrize(("caption", "rows"), [("another", {1}), ("c", set())])
def test_a_loss_counts_under_its_own_caption(caption: str, rows: set[int]) -> None:
    lost = Seen(2, caption, ("a", "b"), 0.0, None, None)
    assert absolute_winners([*comparisons(("a", "b", 1.0), ("a", "c", 1.0)), lost]) == rows


def test_latest_is_by_the_column_where_one_is_named() -> None:
    results = [("a", "b", 1.0), ("a", "c", 1.0), ("a", "d", 1.0)]
    assert absolute_winners(comparisons(*results, latest=["2023-05", "2023-04", None])) == {0}
    assert absolute_winners(comparisons(*results, latest=[7, 7, 3])) == {1}


def test_a_win_in_an_unreadable_row_counts_but_the_row_is_not_used() -> None:
    won = comparisons(("a", "b", 1.0), ("a", "c", 1.0))
    broken = Seen(2, "c", ("a", "d"), 1.0, None, Skipped(2, "unreadable_image", "truncated"))
    assert absolute_winners([*won, broken]) == {1}
    assert absolute_winners([won[0], broken]) == {0}


def test_the_filter_works_on_a_dataset_and_lists_what_it_leaves_out(tmp_path: Path) -> None:
    a, b, c, d = (noise(number) for number in range(4))
    rows = [
        (a, b, 1.0, "p", "2023-03"),
        (c, a, 0.0, "p", "2023-01"),
        (b, c, 1.0, "p", "2023-02"),
        (a, b, 0.5, "q", "2023-01"),
        (d, b, 1.0, "q", "2023-02"),
        (d, a, 1.0, "q", "2023-03"),
    ]
    by_row = scan(write_pairs(tmp_path / "pairs.parquet", rows, pair_filter="absolute_winners"))
    assert [item.row for item in by_row.items] == [1, 5]
    assert reasons(by_row) == {0: "filtered", 2: "filtered", 3: "undecided", 4: "filtered"}
    by_time = write_pairs(
        tmp_path / "pairs.parquet", rows, pair_filter="absolute_winners", latest_by="created_at", max_items=1
    )
    assert [item.row for item in scan(by_time).items] == [0]


# --- pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(72, 24), (36, 12), (720, 240)])
def test_a_wide_image_is_cropped_at_its_centre_and_not_squeezed(tmp_path: Path, size: tuple[int, int]) -> None:
    """Three squares side by side: the middle one remains, larger or smaller."""
    image = encoded(stripes(RED, GREEN, BLUE, size=size))
    pixels = load(write_folder(tmp_path / "wide", [{"file_name": ("0.png", image), "text": "three"}]))
    assert pixels.shape == (1, SIDE, SIDE, 3)
    assert pixels.dtype == np.uint8
    assert_colour(pixels[0, :, 3:-3], GREEN)


def test_a_tall_image_is_cropped_at_its_centre(tmp_path: Path) -> None:
    image = encoded(stripes(RED, GREEN, BLUE, size=(72, 24)).transpose(Image.Transpose.ROTATE_90))
    pixels = load(write_folder(tmp_path / "tall", [{"file_name": ("0.png", image), "text": "three"}]))
    assert_colour(pixels[0, 3:-3], GREEN)


def test_a_circle_stays_a_circle(tmp_path: Path) -> None:
    y, x = np.mgrid[:90, :150]
    disc = ((x - 74.5) ** 2 + (y - 44.5) ** 2 < 30**2)[..., None] * np.array([255, 255, 255])
    image = encoded(Image.fromarray(disc.astype(np.uint8)))
    pixels = load(write_folder(tmp_path / "disc", [{"file_name": ("0.png", image), "text": "disc"}]), side=45)[0]
    inside = pixels[..., 0] > 127
    assert abs(int(inside.any(0).sum()) - 30) <= 1
    assert abs(int(inside.any(1).sum()) - 30) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright_as_its_exif_says(tmp_path: Path, orientation: int) -> None:
    """What a camera stores in each orientation, written down so that a viewer shows red left and green right."""
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    upright = stripes(RED, GREEN, size=(48, 24))
    image = upright if orientation == 1 else upright.transpose(Image.Transpose(stored[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = ("0.jpg", encoded(image, "JPEG", exif=exif, quality=95, subsampling=0))
    pixels = load(write_folder(tmp_path / "camera", [{"file_name": file, "text": "turned"}]))[0]
    assert_colour(pixels[:, : SIDE // 2 - 1], RED)
    assert_colour(pixels[:, SIDE // 2 + 1 :], GREEN)


def test_modes_become_rgb_and_transparency_white(tmp_path: Path) -> None:
    clear = stripes(RED, GREEN, size=(24, 24)).convert("RGBA")
    alpha = np.zeros((24, 24), np.uint8)
    alpha[:, :12] = 255
    clear.putalpha(Image.fromarray(alpha))
    palette = stripes(BLUE).quantize(4)
    modes = {
        "rgba.png": (encoded(clear), (RED, WHITE)),
        "palette.png": (encoded(palette, transparency=bytes([255] * 4)), (BLUE, BLUE)),
        "grey.png": (encoded(Image.new("L", (24, 24), 100)), ((100,) * 3,) * 2),
        "cmyk.jpg": (encoded(Image.new("CMYK", (24, 24), (0, 0, 0, 0)), "JPEG"), (WHITE, WHITE)),
        "one_bit.png": (encoded(Image.new("1", (24, 24), 1)), (WHITE, WHITE)),
    }
    settings = write_folder(
        tmp_path / "modes", [{"file_name": (name, data), "text": name} for name, (data, _) in modes.items()]
    )
    images = Images(settings, scan(settings), SIDE)
    for row, (_, (left, right)) in enumerate(modes.values()):
        pixels = images.load(row, flipped=False)[0]
        assert_colour(pixels[:, : SIDE // 2 - 2], left)
        assert_colour(pixels[:, SIDE // 2 + 2 :], right)


def test_both_members_of_a_pair_are_flipped_and_named_so(tmp_path: Path) -> None:
    pair = (encoded(stripes(RED, GREEN)), encoded(stripes(BLUE, WHITE)), 1, "pair")
    settings = write_pairs(tmp_path / "pairs.parquet", [pair])
    images = Images(settings, scan(settings), SIDE)
    plain, flipped = images.load(0, flipped=False), images.load(0, flipped=True)
    assert np.array_equal(flipped, plain[:, :, ::-1])
    assert_colour(flipped[0, :, : SIDE // 2 - 1], GREEN)
    assert_colour(flipped[1, :, : SIDE // 2 - 1], WHITE)
    names = [*images.keys(0, flipped=False), *images.keys(0, flipped=True)]
    assert len(set(names)) == 4


def test_a_name_belongs_to_the_image_and_not_to_its_row(tmp_path: Path) -> None:
    a, b, c = (noise(number) for number in range(3))
    settings = write_pairs(tmp_path / "pairs.parquet", [(a, b, 1, "one"), (c, a, 0, "two")])
    images = Images(settings, scan(settings), SIDE)
    first, second = images.keys(0, flipped=False), images.keys(1, flipped=False)
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert Images(settings, scan(settings), 2 * SIDE).description != images.description


# --- the same rows, always ----------------------------------------------------------------------------------

PROGRAM = """
import hashlib, sys
from pathlib import Path
from actors.datasets import Images, scan
from protocol.datasets import Dataset, Manifest
settings = Dataset(path=sys.argv[1])
manifest = scan(settings)
images = Images(settings, Manifest.read(Path(sys.argv[2])), 16)
pixels = [images.load(item.row, flipped=False).tobytes() for item in manifest.items]
print(manifest.digest, hashlib.sha256(b"".join(pixels)).hexdigest())
"""


def many_tars(folder: Path) -> Dataset:
    """Shards written in another order than their names'."""
    for shard in (3, 0, 2, 1):
        members = {
            f"{shard}{n}.{ending}": data
            for n in range(10)
            for ending, data in (("jpg", noise(10 * shard + n)), ("txt", f"{shard}-{n}".encode()))
        }
        write_tar(folder / f"{shard}.tar", members)
    return Dataset(path=str(folder))


def test_two_processes_at_once_and_a_third_have_the_same_rows_and_pixels(tmp_path: Path) -> None:
    """All of them fill one empty cache of the library; hashes of strings differ between them."""
    settings = many_tars(tmp_path / "tars")
    manifest = scan(settings)
    manifest.write(tmp_path / "manifest.jsonl")
    arguments = [sys.executable, "-c", PROGRAM, settings.path, str(tmp_path / "manifest.jsonl")]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "their-cache"), "HF_HUB_OFFLINE": "1"}
    processes = [
        subprocess.Popen(
            arguments, cwd=ROOT, env={**environment, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, text=True
        )
        for seed in ("1", "2")
    ]
    printed = {process.communicate(timeout=300)[0] for process in processes}
    assert len(printed) == 1
    assert printed.pop().split()[0] == manifest.digest
    assert captions(manifest) == [f"{shard}-{n}" for shard in range(4) for n in range(10)]


def test_rows_keep_the_order_of_the_metadata_whatever_files_are_called(tmp_path: Path) -> None:
    """Names that the library would take for splits, and a folder that it would take for a pattern."""
    names = ["b-test.png", "train_1.png", "a.png", "validation.png", "0.png"]
    rows = [{"file_name": (name, noise(number)), "text": name} for number, name in enumerate(names)]
    assert captions(scan(write_folder(tmp_path / "odd [x] *?", rows))) == names


def test_the_most_items_are_the_first_usable_ones(tmp_path: Path) -> None:
    rows = [{"file_name": (f"{n}.png", PNG_RED if n % 2 else BROKEN_PNG), "text": f"{n}"} for n in range(10)]
    settings = write_folder(tmp_path / "images", rows)
    read: list[tuple[int, int]] = []
    limited = scan(settings.model_copy(update={"max_items": 2}), lambda done, num_rows: read.append((done, num_rows)))
    assert limited.items == scan(settings).items[:2]
    assert read == [(10, 10)]


def test_reading_stops_once_there_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.datasets.ROWS_AT_ONCE", 3)
    rows = [{"file_name": (f"{n}.png", BROKEN_PNG if n == 1 else PNG_RED), "text": f"{n}"} for n in range(10)]
    settings = write_folder(tmp_path / "images", rows).model_copy(update={"max_items": 3})
    read: list[int] = []
    assert captions(scan(settings, lambda done, _: read.append(done))) == ["0", "2", "3"]
    assert read == [3, 6]


def test_a_manifest_from_a_file_reads_the_same_images(tmp_path: Path) -> None:
    settings = write_pairs(tmp_path / "pairs.parquet", [(PNG_RED, PNG_GREEN, 0.5, "t"), (PNG_RED, PNG_GREEN, 0, "g")])
    scan(settings).write(tmp_path / "items.jsonl")
    again = Images(settings, Manifest.read(tmp_path / "items.jsonl"), SIDE)
    assert np.array_equal(again.load(1, flipped=False), load(settings, 1))


@pytest.mark.parametrize("change", ["another image", "no file", "fewer rows"])
def test_a_dataset_that_changed_under_a_run_is_not_trained_on(tmp_path: Path, change: str) -> None:
    rows = [{"file_name": (f"{n}.png", noise(n)), "text": f"{n}"} for n in range(3)]
    settings = write_folder(tmp_path / "images", rows)
    manifest = scan(settings)
    if change == "another image":
        (tmp_path / "images" / "2.png").write_bytes(noise(9))
    elif change == "no file":
        (tmp_path / "images" / "2.png").unlink()
    else:
        write_folder(tmp_path / "images", rows[:2])
    images = Images(settings, manifest, SIDE)
    assert images.load(1, flipped=False).shape == (1, SIDE, SIDE, 3)
    with pytest.raises(TrainingError, match="row 2 of the dataset is no longer the one"):
        images.load(2, flipped=False)


def test_images_of_a_folder_are_not_copied(tmp_path: Path, library_cache: Path) -> None:
    rows = [{"file_name": (f"{n}.png", noise(n)), "text": f"{n}"} for n in range(20)]
    settings = write_folder(tmp_path / "images", rows)
    scan(settings)
    copied = sum(file.stat().st_size for file in library_cache.rglob("*.arrow"))
    assert copied < len(noise(0)) * 5


# --- errors -------------------------------------------------------------------------------------------------


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    settings = write_folder(tmp_path / "images", [{"file_name": ("0.png", PNG_RED), "caption": "red"}])
    with pytest.raises(RecipeError, match=r"lacks the column text.*\['caption', 'image'\].*caption_column"):
        scan(settings)
    assert captions(scan(settings.model_copy(update={"caption_column": "caption"}))) == ["red"]


def test_a_dataset_without_a_usable_row_says_what_it_has_and_what_is_needed(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a/0.bmp": b"x", "a/0.alt": b"y", "a/1.bmp": b"x"})
    with pytest.raises(RecipeError, match=r"2 rows, columns \['alt', 'bmp'\], skipped {'no_image': 2}.*'jpg'.*'txt'"):
        scan(Dataset(path=str(tmp_path)))
    with pytest.raises(RecipeError, match=r"no usable row.*'undecided': 1.*labels 0 or 1"):
        scan(write_pairs(tmp_path / "ties.parquet", [(PNG_RED, PNG_GREEN, 0.5, "a tie")]))


def test_files_that_cannot_be_read_are_a_recipe_error(tmp_path: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but nothing more")
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name": \n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metadata.jsonl").touch()
    for name in ("broken.parquet", "broken.tar", "broken", "empty"):
        with pytest.raises(RecipeError, match=r"cannot be read|no usable row|lacks the column"):
            scan(Dataset(path=str(tmp_path / name)))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library believes that there is no network."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_hub_name_that_cannot_be_reached_says_so(offline: None) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read.*nobody/nothing.*needs the network or a filled cache"):
        scan(Dataset(path="nobody/nothing"))
