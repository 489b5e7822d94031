"""Going on from a checkpoint: the engine takes up its state, and the weights are those that were published."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from safetensors.torch import load_file
from torch import Tensor

from learner.checkpoint import CONSOLIDATED, Checkpoint, Meta, is_native
from learner.engine import Engine
from protocol.errors import TrainingError
from protocol.roles import Learner


def restore_engine(engine: Engine, learner: Learner, found: Checkpoint, reach_all: Callable[[], Tensor]) -> None:
    """Loads DeepSpeed's own files where they fit, bit for bit; else the whole state. `reach_all` makes a graph of every
    trained parameter."""
    layout = {"world_size": learner.world_size, "zero_stage": learner.zero_stage}
    if is_native(found.meta, **layout, precision=learner.precision):
        engine.load(found.folder / "state")
    else:
        engine.load_consolidated(load_file(found.folder / CONSOLIDATED), found.meta.step, reach_all)


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
