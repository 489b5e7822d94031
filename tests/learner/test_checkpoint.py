"""A checkpoint is complete or not there at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from learner import checkpoint
from learner.checkpoint import Checkpoint, Meta, checkpoints_in, latest_checkpoint
from protocol.errors import RunDirError

ALGORITHM_STATE = {"tracker": {"a red seven": [0.1, 1 / 3, 2.0**-1074]}}
"""What an algorithm keeps, with numbers that only exact text gives back."""


def write(run_dir: Path, round_: int, *, keep_last: int = 10) -> Checkpoint:
    folder = checkpoint.begin(run_dir, round_)
    (folder / "state").mkdir()
    (folder / "state" / "optimizer.pt").write_bytes(b"moments")
    digests = {str(round_ - 1): "ab", str(round_): "cd"}
    layout = {"world_size": 2, "zero_stage": 1}
    meta = Meta(round_, 4 * round_, 0, **layout, precision="fp32", digests=digests, algorithm_state=ALGORITHM_STATE)
    return checkpoint.commit(folder, meta, {round_ - 1: b"before", round_: b"now"}, keep_last)


def test_what_was_committed_is_read_back(tmp_path: Path) -> None:
    written = write(tmp_path, 10)
    found = latest_checkpoint(tmp_path)
    assert found == written
    assert found.meta.step == 40
    assert found.meta.algorithm_state == ALGORITHM_STATE
    assert (found.version_bytes(9), found.version_bytes(10)) == (b"before", b"now")
    assert (found.folder / "state" / "optimizer.pt").read_bytes() == b"moments"


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    checkpoint.begin(tmp_path, 1)
    assert latest_checkpoint(tmp_path) is None


def test_one_that_was_begun_is_not_taken_for_one(tmp_path: Path) -> None:
    done = write(tmp_path, 2)
    half = checkpoint.begin(tmp_path, 3)
    (half / "versions" / "000003.safetensors").write_bytes(b"half")
    assert checkpoints_in(tmp_path) == [done]


def test_beginning_again_forgets_what_was_half_written(tmp_path: Path) -> None:
    half = checkpoint.begin(tmp_path, 3)
    (half / "versions" / "000099.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoint.begin(tmp_path, 3).rglob("*")] == ["versions"]


def test_the_newest_ones_are_kept_by_number_not_by_time(tmp_path: Path) -> None:
    for round_ in (9, 10, 100, 2):
        write(tmp_path, round_, keep_last=2)
    assert [found.meta.round for found in checkpoints_in(tmp_path)] == [10, 100]


def test_a_round_that_is_done_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / "checkpoints" / "round-000004" / "leftover").touch()
    again = write(tmp_path, 4)
    assert checkpoints_in(tmp_path) == [again]
    assert not (again.folder / "leftover").exists()


def test_one_that_a_crash_left_half_deleted_does_not_hide_the_others(tmp_path: Path) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    (tmp_path / "checkpoints" / "round-000001" / "meta.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "round-000001" / "state")
    assert latest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize(("world_size", "zero_stage"), [(1, 1), (2, 2), (1, 0)])
def test_state_of_another_layout_is_read_from_the_consolidated_file(
    tmp_path: Path, world_size: int, zero_stage: int
) -> None:
    meta = write(tmp_path, 1).meta
    assert checkpoint.is_native(meta, world_size=2, zero_stage=1, precision="fp32")
    assert not checkpoint.is_native(meta, world_size=world_size, zero_stage=zero_stage, precision="fp32")


def test_state_of_another_precision_is_refused(tmp_path: Path) -> None:
    meta = write(tmp_path, 1).meta
    with pytest.raises(RunDirError, match=r"another learner.precision. Got: 'bf16'. Expected: fp32"):
        checkpoint.is_native(meta, world_size=2, zero_stage=1, precision="bf16")
