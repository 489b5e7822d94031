"""An engine's state in a checkpoint, and going on from it: the weights must be those that were published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.weights import weights_digest
from learner.checkpoint import AVERAGE, CONSOLIDATED, Checkpoint, Meta, is_native
from learner.engine import Engine
from protocol.errors import RunDirError, TrainingError
from protocol.roles import Learner


def save_engine(engine: Engine, folder: Path) -> str | None:
    """Writes an engine's state in all its forms. Returns the digest of the average, on rank 0 if one is kept. Every
    rank calls it."""
    engine.save(folder / "state")
    whole = engine.consolidated()
    average = engine.average.whole() if engine.average else None
    engine.barrier()
    if whole is not None:
        save_file(whole, folder / CONSOLIDATED)
    if average is None:
        return None
    save_file(average, folder / AVERAGE)
    return weights_digest(average)


def restore_engine(engine: Engine, learner: Learner, found: Checkpoint, reach_all: Callable[[], Tensor]) -> None:
    """Loads DeepSpeed's own files where they fit, bit for bit; else the whole state. `reach_all` makes a graph of every
    trained parameter."""
    layout = {"world_size": learner.world_size, "zero_stage": learner.zero_stage}
    if is_native(found.meta, **layout, precision=learner.precision):
        engine.load(found.folder / "state")
    elif learner.optimizer == "adamw_8bit":
        raise RunDirError(
            "moments of 8 bits cannot be taken up by another layout of the learner",
            value=f"world_size {learner.world_size}, zero_stage {learner.zero_stage}",
            expected=f"world_size {found.meta.world_size}, zero_stage {found.meta.zero_stage}",
            do="resume with these, or start a new run with learner.optimizer: adamw",
        )
    else:
        engine.load_consolidated(load_file(found.folder / CONSOLIDATED), found.meta.step, reach_all)
    if engine.average:
        engine.average.load(load_file(found.folder / AVERAGE), found.meta.average_steps)


def check_restored(meta: Meta, digests: Mapping[int, str]) -> None:
    """Raises TrainingError unless the weights that were loaded, by version, are those that were published."""
    for version, digest in meta.digests.items():
        if digests[int(version)] != digest:
            raise TrainingError(
                f"checkpoint round {meta.round} is damaged: its version {version} has other weights",
                value=digests[int(version)],
                expected=digest,
                do="delete this checkpoint and resume from the one before it",
            )
