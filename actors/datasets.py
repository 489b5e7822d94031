"""Datasets as rows and images, and prompts of the hub. The only home of the `datasets` library, which reads them.

Rows are read by number and keep the order of the files. What the library does of itself and would hurt here is off:
decoding images (a broken one would end the pass), guessing splits from file names, listing folders (several metadata
files come in random order), inferring the columns of tar shards (a sample without a caption would end it), and
reporting its use. It copies tar and parquet files into its cache (HF_DATASETS_CACHE); a folder's images stay where
they are.
"""

from __future__ import annotations

import glob
import hashlib
import io
import math
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from protocol.datasets import Columns, Dataset, Item, Location, Manifest, Reason, Skipped, locate
from protocol.errors import ModelError, RecipeError, TrainingError
from protocol.prompt_files import pick_column, read_cells
from protocol.prompt_sets import Hub

datasets.disable_progress_bars()
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

ROWS_AT_ONCE = 256
DIGEST_BYTES = 16
FIRST_WINS, SECOND_WINS, TIE = 1.0, 0.0, 0.5
"""Labels of a pair, after Pick-a-Pic's label_0."""

Report = Callable[[int, int], None]
"""(rows read, rows in all), now and then."""


class Table:
    """The rows of a dataset, by number; only the columns that are needed. Threads may share one."""

    def __init__(self, settings: Dataset) -> None:
        """Opens it. Raises RecipeError if it is not there, cannot be read, or lacks a column."""
        self._location = locate(settings.path)
        self.columns = settings.columns(self._location.format)
        try:
            table = _load(self._location, self.columns, settings.split)
        except Exception as error:  # the library and what it reads with raise many types
            raise RecipeError(
                f"the dataset cannot be read: {_first_line(error.__cause__ or error)}",
                value=settings.path,
                expected=f"what `datasets` reads as {self._location.format}",
                do="check the files; a hub name needs the network or a filled cache",
            ) from error
        _check_columns(self.columns, table.column_names)
        self._table = _undecoded(table, self.columns)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Returns a row's cells by column, images as they are encoded."""
        cells: dict[str, Any] = self._table[row]
        return cells

    def encoded_images(self, cells: dict[str, Any]) -> list[bytes]:
        """Returns a row's image files, in the order of columns. Raises OSError or ValueError where there is none."""
        return [_encoded_image(cells, names) for names in self.columns.images]

    def columns_found(self) -> list[str]:
        """Returns the columns there are. Tar shards are read by the names wanted; theirs are some members' endings."""
        if self._location.format != "webdataset":
            return sorted(self._table.column_names)
        with tarfile.open(self._location.files[0]) as shard:
            return sorted({Path(member.name).name.partition(".")[2] for member in islice(shard, ROWS_AT_ONCE)})


def _load(location: Location, columns: Columns, split: str) -> Any:
    if location.format == "hub":
        return datasets.load_dataset(location.files[0], split=split)
    # The library takes names for patterns.
    files = {"train": [glob.escape(file) for file in location.files]}
    features = _tar_features(columns) if location.format == "webdataset" else None
    return datasets.load_dataset(location.format, data_files=files, features=features, split="train")


def read_column(hub: Hub) -> list[Any]:
    """Returns the cells of a hub dataset's column of prompts, in its order: from a folder of its name in the working
    directory, from the library's cache, or from the hub. Raises ModelError."""
    try:
        if hub.files:
            paths = [_hub_file(hub.id, file) for file in hub.files]
        else:
            table = datasets.load_dataset(hub.id, hub.config, split=hub.split)
    except Exception as error:  # the library and what it reads with raise many types
        raise ModelError(
            f"the prompt set {hub.id} cannot be fetched: {type(error).__name__}: {_first_line(error)}",
            value=hub,
            expected="a dataset of the Hugging Face hub, its configuration and split, and the hub within reach",
            do=f"check its name; without a network here, run `{hub.download}` where there is one, and start from the "
            "folder that then holds it",
        ) from error
    if hub.files:
        return [cell for path in paths for cell in read_cells(path, hub.column)]
    name = pick_column(hub.column, table.column_names, hub.id)
    return list(table.select_columns([name])[name])


def _hub_file(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    local = Path(repository) / file
    return local if local.is_file() else Path(hf_hub_download(repository, file, repo_type="dataset"))


def _tar_features(columns: Columns) -> datasets.Features:
    images = {name: datasets.Image(decode=False) for names in columns.images for name in names}
    return datasets.Features({**images, **{name: datasets.Value("binary") for name in columns.others}})


def _undecoded(table: Any, columns: Columns) -> Any:
    table = table.select_columns([name for name in columns.all if name in table.column_names])
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def _check_columns(columns: Columns, found: Sequence[str]) -> None:
    wanted = [*columns.images, *((name,) for name in columns.others)]
    missing = [";".join(names) for names in wanted if not {*names} & {*found}]
    if missing:
        raise RecipeError(
            f"the dataset lacks the column {', '.join(missing)}",
            value=sorted(found),
            expected=f"columns {', '.join(';'.join(names) for names in wanted)}",
            do="set image_column, pair_columns, caption_column, label_column or latest_by to the names it has",
        )


def _encoded_image(cells: dict[str, Any], names: Sequence[str]) -> bytes:
    cell = next((cells[name] for name in names if cells.get(name) is not None), None)
    if isinstance(cell, dict):
        cell = Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]
    if not isinstance(cell, bytes) or not cell:
        raise ValueError(f"no image in {';'.join(names)}")
    return cell


def _decode(encoded: bytes) -> Image.Image:
    """Returns an image in RGB, upright by its EXIF orientation, on white where it is transparent."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


@dataclass(frozen=True)
class Seen:
    """A row as the scan saw it. A tie of two readable images:

    Seen(row=7, caption="a red seven", digests=("3b1f...", "c07a...") [in the order of columns], label=0.5,
         latest=None, problem=Skipped(row=7, reason="undecided", detail="label 0.5"))
    """

    row: int
    caption: str
    digests: tuple[str, ...]
    label: float | None
    latest: Any
    problem: Skipped | None


def scan(settings: Dataset, report: Report = lambda _read, _all: None) -> Manifest:
    """Reads every row once, decoding images in threads, and returns the usable ones in order.

    Rows without captions, with images that are missing or do not decode, and undecided pairs are skipped and listed;
    no undecided label is read as a win. Raises RecipeError if no row can be used.
    """
    table = Table(settings)
    seen: list[Seen] = []
    num_usable = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(table), ROWS_AT_ONCE):
            rows = range(start, min(start + ROWS_AT_ONCE, len(table)))
            seen += pool.map(partial(_examine, table), rows)
            num_usable += sum(one.problem is None for one in seen[start:])
            report(rows.stop, len(table))
            if settings.pair_filter == "none" and settings.max_items and num_usable >= settings.max_items:
                break
    manifest = _manifest(settings, seen)
    if not manifest.items:
        raise _nothing_usable(table, manifest)
    return manifest


def _examine(table: Table, row: int) -> Seen:
    cells = table[row]
    columns = table.columns
    caption, latest = _text(cells[columns.caption]), cells[columns.latest] if columns.latest else None
    label = _number(cells[columns.label]) if columns.label else None
    try:
        images = table.encoded_images(cells)
    except (OSError, ValueError) as error:
        return Seen(row, caption, (), label, latest, Skipped(row, "no_image", _first_line(error)))
    problem = _problem(caption, images, label, is_pair=columns.label is not None)
    skipped = Skipped(row, *problem) if problem else None
    return Seen(row, caption, tuple(map(_digest, images)), label, latest, skipped)


def _problem(caption: str, images: Sequence[bytes], label: float | None, *, is_pair: bool) -> tuple[Reason, str] | None:
    if not caption:
        return "no_caption", "empty, or not text"
    if is_pair and label not in (FIRST_WINS, SECOND_WINS):
        return "undecided", f"label {label}"
    try:
        for encoded in images:
            _decode(encoded)
    except UnidentifiedImageError:
        return "unreadable_image", "no known image format"
    except Exception as error:  # Pillow's readers raise many types for broken files
        return "unreadable_image", _first_line(error)
    return None


def _text(cell: Any) -> str:
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", errors="replace")
    return cell.strip() if isinstance(cell, str) else ""


def _number(cell: Any) -> float | None:
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _digest(encoded: bytes) -> str:
    return hashlib.blake2b(encoded, digest_size=DIGEST_BYTES).hexdigest()


def _manifest(settings: Dataset, seen: Sequence[Seen]) -> Manifest:
    usable = [one for one in seen if one.problem is None]
    skipped = [one.problem for one in seen if one.problem]
    if settings.pair_filter == "absolute_winners":
        chosen = absolute_winners(seen)
        skipped += [Skipped(one.row, "filtered", settings.pair_filter) for one in usable if one.row not in chosen]
        usable = [one for one in usable if one.row in chosen]
    items = [Item(one.row, one.caption, _winner_first(one)) for one in usable[: settings.max_items]]
    return Manifest(tuple(items), tuple(sorted(skipped, key=lambda one: one.row)))


def _winner_first(seen: Seen) -> tuple[str, ...]:
    return seen.digests[::-1] if seen.label == SECOND_WINS else seen.digests


def absolute_winners(seen: Iterable[Seen]) -> set[int]:
    """Returns the rows in which an absolute winner meets its latest loser.

    An absolute winner has more than one win and no loss or tie under its caption (Gambashidze et al., arXiv
    2406.17636). Images are told apart by their bytes. Rows whose images do not decode count as comparisons, but are
    not returned. Latest is by `latest`, then by row.
    """
    wins, spoiled = defaultdict(list), set()
    for one in seen:
        if not one.caption or not one.digests or one.label not in (FIRST_WINS, SECOND_WINS, TIE):
            continue
        winner, loser = ((one.caption, digest) for digest in _winner_first(one))
        spoiled |= {winner, loser} if one.label == TIE else {loser}
        wins[winner].append(one)
    latest = set()
    for winner, ones in wins.items():
        usable = [one for one in ones if one.problem is None]
        if winner not in spoiled and len(ones) > 1 and usable:
            latest.add(max(usable, key=lambda one: (one.latest is not None, one.latest, one.row)).row)
    return latest


def _nothing_usable(table: Table, manifest: Manifest) -> RecipeError:
    return RecipeError(
        "the dataset has no usable row",
        value=f"{len(table)} rows, columns {table.columns_found()}, skipped {manifest.skipped_counts}",
        expected=f"columns {table.columns.all} with images that decode, captions that are not empty, "
        "and of pairs labels 0 or 1",
        do="check the dataset's columns and the reasons for which rows are skipped",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Images:
    """The images of a manifest's rows, cut to the model's side: what a rollout worker reads."""

    def __init__(self, settings: Dataset, manifest: Manifest, side: int) -> None:
        """Opens the dataset; `side` in pixels. Raises RecipeError."""
        self._table, self._side = Table(settings), side
        self._digests = {item.row: item.digests for item in manifest.items}

    @property
    def description(self) -> str:
        """What turns an encoded image into pixels: part of the name of whatever is computed from them."""
        return f"{self._side} px, LANCZOS, centre, Pillow {PIL.__version__}"

    def keys(self, row: int, *, flipped: bool) -> tuple[str, ...]:
        """Returns a name for each image that `load` returns, without reading any."""
        return tuple(f"{digest}{'-flipped' * flipped}" for digest in self._digests[row])

    def load(self, row: int, *, flipped: bool) -> np.ndarray:
        """Returns a row's image, or its pair with the winner first, uint8 (N, H, W, 3).

        The short side is fitted and the long one cropped at its centre; nothing is squeezed. Raises TrainingError if
        the images are not those that were scanned.
        """
        found = self._read(row)
        if not found.keys() >= {*self._digests[row]}:
            raise TrainingError(
                f"row {row} of the dataset is no longer the one that the run started with",
                value=sorted(found),
                expected=f"images with the digests {self._digests[row]}",
                do="put the dataset back as it was, or start a new run",
            )
        images = [self._fit(found[digest]) for digest in self._digests[row]]
        pixels = np.stack(images)
        return np.ascontiguousarray(pixels[:, :, ::-1]) if flipped else pixels

    def _read(self, row: int) -> dict[str, bytes]:
        """Returns digest -> encoded image; nothing where the row or its files are gone."""
        if row >= len(self._table):
            return {}
        try:
            images = self._table.encoded_images(self._table[row])
        except (OSError, ValueError):
            return {}
        return {_digest(encoded): encoded for encoded in images}

    def _fit(self, encoded: bytes) -> np.ndarray:
        image = ImageOps.fit(_decode(encoded), (self._side, self._side), Image.Resampling.LANCZOS)
        return np.asarray(image)
