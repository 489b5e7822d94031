"""Prompt sets: what a recipe says of its prompts, and how lists of prompts come of it.

    text, JSON, CSV, parquet, builtin:NAME   read by prompt_files     } cells -> PromptSet -> split by hash -> Lists
    hub:NAME                                 read by actors/datasets  }    prompts.txt, held_out.txt [run directory]

A set becomes lists once in the life of a run: a source that changes later changes nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from protocol.animals import BUILTIN
from protocol.errors import ModelError
from protocol.paths import find_file, spread
from protocol.prompt_files import read_cells
from protocol.section import PositiveFloat, PositiveInt, Section

HUB_PREFIX, BUILTIN_PREFIX = "hub:", "builtin:"


class Prompts(Section):
    """Sets of prompts: text files (one prompt a line; empty lines and those starting with # are skipped), .jsonl,
    .json, .csv, .tsv (each also as .gz), .parquet, builtin:animals, hub:owner/name[:config][:split][:column]."""

    train: str | None = None
    """Prompts that tickets are made from; null where all come from `data`."""
    weight: PositiveFloat = 1.0
    """Share of tickets that start from a prompt, relative to the weights in `data`."""
    column: str | None = None
    """Column of the prompts, where a set has columns; null: prompt, prompts, caption or text, upper case or lower."""
    max_prompts: PositiveInt | None = None
    """At most so many training prompts, spread evenly; null: all."""
    held_out: str | None = None
    """Prompts never trained on, for evaluation, sample grids and the firewall."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of held_out: this share of train is held out. A prompt's own hash decides, whatever the others are."""

    @model_validator(mode="after")
    def _held_out_in_one_way(self) -> Self:
        if self.held_out_share is not None and self.held_out is not None:
            raise ValueError("held_out_share splits train, but held_out names a set of its own; keep one of the two")
        if self.held_out_share is not None and self.train is None:
            raise ValueError("held_out_share splits train, which is null")
        return self


@dataclass(frozen=True)
class Hub:
    """A dataset on the Hugging Face hub: `Hub("nateraw/parti-prompts", config=None, split="train", column="Prompt")`.
    With `files`, JSON files of it are read instead, as `Hub("ymhao/HPDv2", None, "train", "prompt", ("train.json",))`:
    the library cannot read a repository that is a script."""

    id: str
    config: str | None
    split: str
    column: str | None
    files: tuple[str, ...] = ()

    @property
    def download(self) -> str:
        """The command that fetches it into a folder of its name, which is then read instead of the hub."""
        files = "".join(f"{file} " for file in self.files)
        return f"hf download {self.id} {files}--repo-type dataset --local-dir {self.id}"


@dataclass(frozen=True)
class KnownSet:
    """A set with a short name: its dataset, its column, and of each split the files, if these are read by name. The
    first split is the default."""

    id: str
    column: str
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


STYLES = ("anime", "concept-art", "paintings", "photo")
KNOWN_SETS = {
    "HPDv2": KnownSet("ymhao/HPDv2", "prompt", {"train": ("train.json",), "test": ("test.json",)}),
    "HPDv2-benchmark": KnownSet(
        "zhwang/HPDv2",
        "text",
        {
            "all": tuple(f"benchmark/{style}.json" for style in STYLES),
            **{style: (f"benchmark/{style}.json",) for style in STYLES},
        },
    ),
    "Pick-a-Pic-v1": KnownSet("yuvalkirstain/pickapic_v1_no_images", "caption"),
    "Pick-a-Pic-v2": KnownSet("yuvalkirstain/pickapic_v2_no_images", "caption"),
    "PartiPrompts": KnownSet("nateraw/parti-prompts", "Prompt"),
    "DrawBench": KnownSet("sayakpaul/drawbench", "Prompts"),
}
"""HPS v2 (arXiv 2306.09341), Pick-a-Pic (2305.01569), Parti (2206.10789), Imagen (2205.11487)."""

Fetch = Callable[[Hub], Iterable[Any]]
"""Reads the cells of a hub dataset's column."""


@dataclass(frozen=True)
class PromptSet:
    """A set as it is used: `PromptSet(("a cat", "an ant"), num_empty=1, num_duplicates=3)`, in the source's order."""

    prompts: tuple[str, ...]
    num_empty: int
    num_duplicates: int

    @classmethod
    def of(cls, cells: Iterable[Any]) -> PromptSet:
        """Makes a set of cells: in NFC, with line breaks and other white space folded to one space, each prompt once.
        What is no text, or empty, is dropped and counted."""
        texts = [_fold(cell) if isinstance(cell, str) else "" for cell in cells]
        filled = [text for text in texts if text]
        prompts = tuple(dict.fromkeys(filled))
        return cls(prompts, len(texts) - len(filled), len(filled) - len(prompts))


def _fold(text: str) -> str:
    folded = " ".join(unicodedata.normalize("NFC", text).split())
    return folded.encode("utf-8", errors="replace").decode("utf-8")  # Half a character from JSON cannot be written.


@dataclass(frozen=True)
class Lists:
    """The lists of a run: `Lists(train=("a cat",), held_out=("an ant",), num_empty=0, num_duplicates=3)`; None for what
    the recipe does not name, or where nobody may ask the hub."""

    train: tuple[str, ...] | None
    held_out: tuple[str, ...] | None
    num_empty: int
    num_duplicates: int

    @property
    def dropped(self) -> str:
        """What was left out, in words; empty if nothing was."""
        counts = {"duplicates": self.num_duplicates, "empty": self.num_empty}
        return ", ".join(f"{name} {count}" for name, count in counts.items() if count)

    @property
    def shared(self) -> str:
        """How many of those held out are trained on as well, in words; empty if none are."""
        num_shared = len({*(self.held_out or ())} & {*(self.train or ())})
        return f", {num_shared} of them trained on as well" if num_shared else ""


def make_lists(settings: Prompts, fetch: Fetch | None = None) -> Lists:
    """Reads what a recipe names and splits it. Without `fetch`, hub sets are left out. Raises ModelError."""
    train = read_set(settings.train, settings.column, fetch) if settings.train is not None else None
    held_out = read_set(settings.held_out, settings.column, fetch) if settings.held_out is not None else None
    read = [found for found in (train, held_out) if found is not None]
    training, holding = (train.prompts if train else None), (held_out.prompts if held_out else None)
    if training is not None and settings.held_out_share is not None:
        training, holding = split_by_hash(training, settings.held_out_share)
    if training is not None:
        training = tuple(spread(training, settings.max_prompts))
    num_empty, num_duplicates = (sum(getattr(one, name) for one in read) for name in ("num_empty", "num_duplicates"))
    return Lists(training, holding, num_empty, num_duplicates)


def split_by_hash(prompts: Sequence[str], share: float) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns (train, held out), each in order. A prompt is held out if the first 8 bytes of its SHA-256, as a fraction
    of 2^64, are below `share`: so it stays, whatever comes and goes beside it, and a larger share only adds.

    Raises ModelError if either is empty.
    """
    held_out = tuple(prompt for prompt in prompts if _fraction(prompt) < share)
    taken = set(held_out)
    train = tuple(prompt for prompt in prompts if prompt not in taken)
    if not train or not held_out:
        raise ModelError(
            f"prompts.held_out_share leaves {len(train)} prompts to train on and {len(held_out)} held out",
            value=share,
            expected="some of each",
            do="change the share, bring more prompts, or name a set of its own in prompts.held_out",
        )
    return train, held_out


def _fraction(prompt: str) -> float:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64


def check_exists(name: str) -> None:
    """Raises ModelError unless there is such a file or built-in set, or, of the hub, such a form of name."""
    if name.startswith(BUILTIN_PREFIX):
        _builtin(name)
    elif name.startswith(HUB_PREFIX):
        parse_hub(name)
    else:
        find_file(name)


def read_set(name: str, column: str | None = None, fetch: Fetch | None = None) -> PromptSet | None:
    """Returns a set, or None if it is on the hub and `fetch` is not given. Raises ModelError if it cannot be read,
    lacks the column or has no prompts."""
    if name.startswith(BUILTIN_PREFIX):
        return PromptSet.of(_builtin(name))
    if not name.startswith(HUB_PREFIX):
        found = PromptSet.of(read_cells(find_file(name), column))
    elif fetch is None:
        return None
    else:
        found = PromptSet.of(fetch(parse_hub(name, column)))
    if not found.prompts:
        raise ModelError(
            f"the prompt set {name} has no prompts",
            value=f"{found.num_empty} rows, all empty or no text",
            do="check its column, or give another set",
        )
    return found


def _builtin(name: str) -> list[str]:
    short = name.removeprefix(BUILTIN_PREFIX)
    if short not in BUILTIN:
        raise _unknown(name, BUILTIN_PREFIX, BUILTIN)
    return BUILTIN[short]()


def parse_hub(name: str, column: str | None = None) -> Hub:
    """Returns what `hub:owner/name[:config][:split][:column]`, or a short name in the place of owner/name, means. Parts
    may be empty. `column` is what the recipe says for sets that say nothing themselves. Raises ModelError."""
    id_, *parts = name.removeprefix(HUB_PREFIX).split(":")
    config, split, own_column = (part or None for part in [*parts, "", "", ""][:3])
    if len(parts) > 3 or (id_ not in KNOWN_SETS and (id_.count("/") != 1 or not all(id_.split("/")))):
        raise _unknown(name, HUB_PREFIX, KNOWN_SETS)
    known = KNOWN_SETS.get(id_)
    if known is None:
        return Hub(id_, config, split or "train", own_column or column)
    if not known.files:
        return Hub(known.id, config, split or "train", own_column or known.column)
    chosen = split or next(iter(known.files))
    if chosen not in known.files:
        raise ModelError(f"{id_} has no split {chosen}", value=name, expected=f"one of {', '.join(known.files)}")
    return Hub(known.id, config, chosen, own_column or known.column, known.files[chosen])


def _unknown(name: str, prefix: str, known: Iterable[str]) -> ModelError:
    names = [f"{prefix}{short}" for short in known]
    close = difflib.get_close_matches(name, names, n=1)
    form = ", or hub:owner/name[:config][:split][:column]" if prefix == HUB_PREFIX else ""
    hint = f"did you mean {close[0]}?" if close else "correct the name"
    return ModelError("there is no prompt set of that name", value=name, expected=f"{', '.join(names)}{form}", do=hint)
