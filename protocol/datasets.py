"""Datasets: what a recipe says of one, where its files are, and the manifest of its usable rows.

    scan [actors/datasets.py, once a run] -> Manifest -> run directory -> tickets [rows] -> Images [rollout workers]

A resumed run reads its manifest instead of scanning again, so its tickets name the same rows.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from protocol.errors import RecipeError, RunDirError
from protocol.paths import ROOT
from protocol.section import PositiveFloat, PositiveInt, Section

METADATA = "metadata.jsonl"
TAR_IMAGES = "jpg;jpeg;png;webp"

Format = Literal["imagefolder", "webdataset", "parquet", "hub"]
SUFFIXES: dict[str, Format] = {".tar": "webdataset", ".parquet": "parquet"}

Reason = Literal["no_image", "unreadable_image", "no_caption", "undecided", "filtered"]
"""Why a row is skipped: an empty image cell or missing file, bytes that do not decode, no text, a label that is not a
win, or a pair that the filter leaves out."""


class Dataset(Section):
    """Images with captions, or preference pairs, in a folder, tar shards, parquet files or on the Hugging Face hub."""

    path: str
    """A folder with metadata.jsonl, .tar or .parquet files in it; one such file or a glob of them; or a hub name."""
    kind: Literal["images", "pairs"] = "images"
    """Images with captions, or pairs of images of one caption with a label that says which was preferred."""
    split: str = "train"
    """Split of a hub dataset; files on disk are taken as they are."""
    image_column: str | None = None
    """Column of the image, or several joined by `;` of which the first filled one counts. null: `image`, in tar files
    `jpg;jpeg;png;webp`."""
    pair_columns: tuple[str, str] = ("jpg_0", "jpg_1")
    """Columns of a pair's images. In metadata.jsonl column jpg_0 is the key jpg_0_file_name."""
    label_column: str = "label_0"
    """A pair's label: 1 where the first image won, 0 where the second, anything else is undecided and dropped."""
    caption_column: str | None = None
    """Column of the caption. null: `text`, in tar files `txt`, of pairs `caption`."""
    pair_filter: Literal["none", "absolute_winners"] = "none"
    """`absolute_winners`: of each caption only images with more than one win and no loss or tie, each against its
    latest loser (arXiv 2406.17636)."""
    latest_by: str | None = None
    """Column by which an absolute winner's comparisons are ordered, such as created_at; null: the order of rows."""
    flip: bool = False
    """Mirror images, drawn by key with even odds; a pair's members alike."""
    max_items: PositiveInt | None = None
    """Only the first so many usable rows; null: all."""
    weight: PositiveFloat = 1.0
    """Share of tickets, relative to the other sources'."""

    @model_validator(mode="after")
    def _filter_has_pairs(self) -> Self:
        if self.pair_filter != "none" and self.kind != "pairs":
            raise ValueError(f"pair_filter: {self.pair_filter} needs kind: pairs, but it is {self.kind}")
        if self.latest_by is not None and self.pair_filter != "absolute_winners":
            raise ValueError("latest_by orders an absolute winner's comparisons; set pair_filter: absolute_winners")
        return self

    def columns(self, format_: Format) -> Columns:
        """Returns the columns that are read."""
        tar = format_ == "webdataset"
        if self.kind == "pairs":
            first, second = (tuple(names.split(";")) for names in self.pair_columns)
            return Columns((first, second), self.caption_column or "caption", self.label_column, self.latest_by)
        images = self.image_column or (TAR_IMAGES if tar else "image")
        return Columns((tuple(images.split(";")),), self.caption_column or ("txt" if tar else "text"), None, None)


@dataclass(frozen=True)
class Columns:
    """Names of columns: `Columns(images=(("jpg_0",), ("jpg_1",)), caption="caption", label="label_0", latest=None)`;
    of each image the names that it may stand under."""

    images: tuple[tuple[str, ...], ...]
    caption: str
    label: str | None
    latest: str | None

    @property
    def others(self) -> tuple[str, ...]:
        """Names of the columns that hold no image."""
        return tuple(name for name in (self.caption, self.label, self.latest) if name is not None)

    @property
    def all(self) -> tuple[str, ...]:
        """All names, images first."""
        return (*(name for names in self.images for name in names), *self.others)


@dataclass(frozen=True)
class Location:
    """Where a dataset is: `Location(format="webdataset", files=("/data/000.tar", "/data/001.tar"))`, absolute and
    sorted, so that rows have one order; or `Location("hub", ("owner/name",))`."""

    format: Format
    files: tuple[str, ...]


def locate(path: str) -> Location:
    """Finds a dataset, looked up from the working directory, then from our own root. Raises RecipeError."""
    for candidate in (Path(path).expanduser(), ROOT / path):
        files = _files(candidate)
        if candidate.is_dir() and candidate / METADATA in files:
            return Location("imagefolder", (str((candidate / METADATA).absolute()),))
        for suffix, format_ in SUFFIXES.items():
            chosen = sorted(str(file.absolute()) for file in files if file.suffix == suffix)
            if chosen:
                return Location(format_, tuple(chosen))
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists():
        return Location("hub", (path,))
    raise RecipeError(
        "there is no dataset here",
        value=path,
        expected=f"a folder with {METADATA}, .tar or .parquet files; one such file, or a glob of them; or a hub name "
        "such as owner/name",
        do=f"correct its path, which is looked up from {Path.cwd()} and from {ROOT}",
    )


def _files(candidate: Path) -> list[Path]:
    if candidate.is_file():
        return [candidate]
    if candidate.is_dir():
        return list(candidate.iterdir())
    return [Path(name) for name in glob.glob(str(candidate))]


@dataclass(frozen=True)
class Item:
    """A usable row: `Item(row=41, caption="a red seven", digests=("3b1f...", "c07a..."))`.

    Digests are those of the encoded images (32 hex digits), of a pair the winner's first: they name the images, and
    tell when a dataset is no longer the one that was scanned.
    """

    row: int
    caption: str
    digests: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A row that is not used: `Skipped(row=42, reason="unreadable_image", detail="image file is truncated")`."""

    row: int
    reason: Reason
    detail: str


@dataclass(frozen=True)
class Manifest:
    """The usable rows of a dataset, in order, and those left out.

    Made by `scan`, kept in the run directory, eaten by the ticket plan (rows, captions) and by `Images` (digests).
    """

    items: tuple[Item, ...]
    skipped: tuple[Skipped, ...]

    @cached_property
    def digest(self) -> str:
        """Digest of the items: two manifests with one digest give the same training data, 64 hex digits."""
        return hashlib.sha256(_lines(self.items).encode()).hexdigest()

    @property
    def skipped_counts(self) -> dict[str, int]:
        """How many rows were skipped for each reason, in the reasons' alphabetical order."""
        return dict(sorted(Counter(skipped.reason for skipped in self.skipped).items()))

    def write(self, path: Path) -> None:
        """Writes one item a line, and what was skipped into `<stem>.skipped.jsonl` beside it. The file of items comes
        last and all at once: where it is, both are whole."""
        for file, records in ((_skipped_path(path), self.skipped), (path, self.items)):
            draft = file.with_name(f".tmp-{file.name}")
            draft.write_text(_lines(records), encoding="utf-8")
            os.replace(draft, file)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads what `write` wrote. Raises RunDirError."""
        try:
            items = tuple(Item(o["row"], o["caption"], tuple(o["digests"])) for o in _records(path))
            skipped = tuple(Skipped(o["row"], o["reason"], o["detail"]) for o in _records(_skipped_path(path)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunDirError(
                f"the dataset's manifest {path} cannot be read: {error}",
                expected="a JSON object a line, as it was written",
                do="put the file back, or start a new run, which scans the dataset again",
            ) from error
        return cls(items, skipped)


def _skipped_path(path: Path) -> Path:
    return path.with_suffix(".skipped.jsonl")


def _lines(records: Iterable[Item | Skipped]) -> str:
    return "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)


def _records(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
