"""What a recipe may say of a dataset, where its files are found, and that a manifest outlives its process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.datasets import Dataset, Item, Location, Manifest, Skipped, locate
from protocol.errors import RecipeError, RunDirError
from protocol.paths import ROOT

MANIFEST = Manifest(
    items=(Item(0, "a red seven", ("aa",)), Item(2, "zwei\nZeilen, \u2028 und ein ❄", ("bb", "cc"))),
    skipped=(Skipped(1, "unreadable_image", "image file is truncated"), Skipped(3, "undecided", "label 0.5")),
)


def test_a_filter_without_pairs_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"absolute_winners needs kind: pairs"):
        Dataset(path="x", pair_filter="absolute_winners")


def test_an_order_without_the_filter_that_uses_it_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"set pair_filter: absolute_winners"):
        Dataset(path="x", kind="pairs", latest_by="created_at")


@pytest.mark.parametrize("wrong", [{"weight": 0.0}, {"max_items": 0}, {"kind": "videos"}, {"captions": "text"}])
def test_what_means_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Dataset.model_validate({"path": "x", **wrong})


def test_default_columns_are_those_of_each_formats_custom() -> None:
    images, pairs = Dataset(path="x"), Dataset(path="x", kind="pairs")
    assert images.columns("imagefolder").all == images.columns("hub").all == ("image", "text")
    assert images.columns("webdataset").all == ("jpg", "jpeg", "png", "webp", "txt")
    assert pairs.columns("parquet").all == pairs.columns("webdataset").all == ("jpg_0", "jpg_1", "caption", "label_0")


def test_columns_that_are_named_replace_the_defaults() -> None:
    images = Dataset(path="x", image_column="photo;scan", caption_column="alt")
    assert images.columns("webdataset").images == (("photo", "scan"),)
    assert images.columns("webdataset").others == ("alt",)
    winners = Dataset(path="x", kind="pairs", label_column="y", pair_filter="absolute_winners", latest_by="when")
    assert winners.columns("hub").all == ("jpg_0", "jpg_1", "caption", "y", "when")


@pytest.mark.parametrize(("suffix", "format_"), [(".tar", "webdataset"), (".parquet", "parquet")])
def test_files_are_found_by_folder_glob_and_name_in_one_order(tmp_path: Path, suffix: str, format_: str) -> None:
    for name in ("b", "c", "a"):
        (tmp_path / f"{name}{suffix}").touch()
    (tmp_path / "notes.txt").touch()
    all_files = tuple(str(tmp_path / f"{name}{suffix}") for name in "abc")
    assert locate(str(tmp_path)) == Location(format_, all_files)  # type: ignore[arg-type]
    assert locate(str(tmp_path / "[ab]*")).files == all_files[:2]
    assert locate(str(tmp_path / f"c{suffix}")).files == all_files[2:]


def test_a_folder_with_captions_is_an_image_folder_whatever_else_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").touch()
    (tmp_path / "000.tar").touch()
    assert locate(str(tmp_path)) == Location("imagefolder", (str(tmp_path / "metadata.jsonl"),))


def test_a_path_is_looked_up_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "0.tar").touch()
    monkeypatch.chdir(tmp_path)
    assert locate("shards").files == locate("shards/*.tar").files == (str(tmp_path / "shards" / "0.tar"),)


def test_a_name_with_an_owner_is_the_hubs() -> None:
    assert locate("yuvalkirstain/pickapic_v2") == Location("hub", ("yuvalkirstain/pickapic_v2",))


@pytest.mark.parametrize("path", ["nowhere", "./not/here", "/not/here/*.tar", "~/not-here", "."])
def test_what_is_no_dataset_is_refused_with_what_would_be(path: str, tmp_path: Path) -> None:
    path = str(tmp_path) if path == "." else path
    with pytest.raises(RecipeError, match=r"metadata\.jsonl, \.tar or \.parquet.*hub name"):
        locate(path)


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    MANIFEST.write(tmp_path / "dataset-0.jsonl")
    again = Manifest.read(tmp_path / "dataset-0.jsonl")
    assert again == MANIFEST
    assert again.digest == MANIFEST.digest
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dataset-0.jsonl", "dataset-0.skipped.jsonl"]
    assert len((tmp_path / "dataset-0.jsonl").read_text(encoding="utf-8").split("\n")) == 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**40), st.text(st.characters(codec="utf-8")))))
def test_any_caption_survives_the_file(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, str]]) -> None:
    path = tmp_path_factory.mktemp("manifest") / "items.jsonl"
    manifest = Manifest(tuple(Item(row, caption, ("d",)) for row, caption in rows), ())
    manifest.write(path)
    assert Manifest.read(path) == manifest


@pytest.mark.parametrize(
    "change",
    [{"row": 5}, {"caption": "another"}, {"digests": ("ab",)}, {"digests": ("aa", "aa")}],
)
def test_the_digest_tells_any_change_of_an_item(change: dict[str, Any]) -> None:
    first, second = MANIFEST.items
    changed = replace(MANIFEST, items=(replace(first, **change), second))
    assert changed.digest != MANIFEST.digest
    assert replace(MANIFEST, items=(second, first)).digest != MANIFEST.digest
    assert replace(MANIFEST, skipped=()).digest == MANIFEST.digest


def test_skipped_rows_are_counted_by_reason() -> None:
    twice = replace(MANIFEST, skipped=(*MANIFEST.skipped, Skipped(9, "undecided", "label None")))
    assert twice.skipped_counts == {"undecided": 2, "unreadable_image": 1}


@pytest.mark.parametrize("text", ["{", "[]\n", '{"row": 0}\n', '{"row": 0, "caption": "a", "digests": 3}\n'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    MANIFEST.write(tmp_path / "items.jsonl")
    (tmp_path / "items.jsonl").write_text(text)
    with pytest.raises(RunDirError, match=r"manifest .*items\.jsonl cannot be read"):
        Manifest.read(tmp_path / "items.jsonl")


def test_a_manifest_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"manifest .*items\.jsonl cannot be read"):
        Manifest.read(tmp_path / "items.jsonl")


def test_settings_and_manifests_need_no_library() -> None:
    program = "import sys, protocol.datasets; print([m for m in ('datasets', 'torch', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
