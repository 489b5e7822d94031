"""Checkpoints: the durable state of a run, complete or not there at all.

checkpoints/round-000010/     written as .tmp-round-000010, then renamed
    meta.json                 rounds done, steps, digests, what the state fits
    state/                    DeepSpeed's files: for *resume* with the same number of ranks, bit for bit
    consolidated.safetensors  fp32 masters and moments, whole: for *resume* with any other layout
    versions/000010.safetensors   published bytes of the last lag + 1 versions: for resume and *inference*
    average.safetensors       their moving average at the newest version, fp32, if one is kept: for both as well
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from protocol.errors import RunDirError

PREFIX = "round-"
CONSOLIDATED = "consolidated.safetensors"
AVERAGE = "average.safetensors"

Weights = Literal["live", "average"]
"""The weights as last trained, or their moving average."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint is of: `Meta(round=10, step=40, skipped_updates=0, world_size=2, zero_stage=1,
    precision="fp32", digests={"9": "ab...", "10": "cd..."}, algorithm_state={})`: 10 rounds done, version 10 is next.
    `algorithm_state` is what the algorithm keeps between rounds besides the weights, `reward_state` what running means
    of rewards do, `firewall_state` what the firewall has seen; `average_digest` and `average_steps` are of the moving
    average of the weights, if one is kept."""

    round: int
    step: int
    skipped_updates: int
    world_size: int
    zero_stage: int
    precision: str
    digests: dict[str, str]
    algorithm_state: dict[str, Any]
    reward_state: dict[str, Any] = field(default_factory=dict)
    firewall_state: dict[str, Any] = field(default_factory=dict)
    average_digest: str | None = None
    average_steps: int = 0

    def result(self, *, live: bool = False) -> Weights:
        """Returns which of its weights are evaluated, sampled and exported: the moving average, if one is kept and
        `live` does not ask for the newest version itself."""
        return "live" if live or self.average_digest is None else "average"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    meta: Meta

    def version_bytes(self, version: int) -> bytes:
        """Returns the packed weights of one of its versions."""
        return (self.folder / "versions" / f"{version:06d}.safetensors").read_bytes()

    def result_bytes(self, *, live: bool = False) -> bytes:
        """Returns those weights, packed."""
        if self.meta.result(live=live) == "live":
            return self.version_bytes(self.meta.round)
        return (self.folder / AVERAGE).read_bytes()


def checkpoints_in(run_dir: Path) -> list[Checkpoint]:
    """Returns the complete checkpoints of a run, oldest first; what a crash left half deleted is passed over."""
    return [
        Checkpoint(folder, Meta(**json.loads((folder / "meta.json").read_text())))
        for folder in sorted((run_dir / "checkpoints").glob(f"{PREFIX}*"))
        if (folder / "meta.json").is_file()
    ]


def latest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """Returns the newest complete checkpoint, or None."""
    found = checkpoints_in(run_dir)
    return found[-1] if found else None


def newest_up_to(run_dir: Path, round_: int | None) -> Checkpoint | None:
    """Returns the newest complete checkpoint, or that of a round; None if there is none such."""
    found = [one for one in checkpoints_in(run_dir) if round_ is None or one.meta.round <= round_]
    return found[-1] if found else None


def newest_common(run_dirs: Sequence[Path]) -> int:
    """Returns the newest round of which every run directory has a checkpoint; 0, the start, if there is none."""
    rounds = [{found.meta.round for found in checkpoints_in(run_dir)} for run_dir in run_dirs]
    return max(set.intersection(*rounds), default=0)


def drop_newer(run_dir: Path, round_: int) -> None:
    """Deletes checkpoints of later rounds, which a run that goes on from this one makes again."""
    for found in checkpoints_in(run_dir):
        if found.meta.round > round_:
            _remove(found.folder)


def begin(run_dir: Path, round_: int) -> Path:
    """Returns an empty folder to write a checkpoint into; nobody takes it for a checkpoint yet."""
    folder = run_dir / "checkpoints" / f".tmp-{PREFIX}{round_:06d}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "versions").mkdir(parents=True)
    return folder


def commit(folder: Path, meta: Meta, versions: Mapping[int, bytes], keep_last: int) -> Checkpoint:
    """Completes a checkpoint in one rename, then deletes all but the newest `keep_last`."""
    for version, data in versions.items():
        (folder / "versions" / f"{version:06d}.safetensors").write_bytes(data)
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1))
    for path in [*folder.rglob("*"), folder]:
        _flush(path)
    final = folder.parent / f"{PREFIX}{meta.round:06d}"
    if final.exists():
        _remove(final)
    folder.rename(final)
    _flush(final.parent)
    for old in sorted(final.parent.glob(f"{PREFIX}*"))[:-keep_last]:
        _remove(old)
    return Checkpoint(final, meta)


def is_native(meta: Meta, *, world_size: int, zero_stage: int, precision: str) -> bool:
    """True if DeepSpeed can read the state with this layout; otherwise the consolidated one is to be used.

    Raises RunDirError for another precision: rollouts compute in it too, so it is another run.
    """
    if meta.precision != precision:
        raise RunDirError(
            "the checkpoint was made with another learner.precision",
            value=precision,
            expected=meta.precision,
            do="resume with the value that the run was started with",
        )
    return (meta.world_size, meta.zero_stage) == (world_size, zero_stage)


def _remove(checkpoint: Path) -> None:
    """Takes the name away first: half a checkpoint must never look like one."""
    doomed = checkpoint.with_name(f".tmp-old-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
