"""AdamW with moments of 8 bits: near the one with 32, the same bits when resumed, in every stage."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from learner.checkpoint import Checkpoint, Meta
from learner.restore import restore_engine, save_engine
from protocol.errors import RunDirError, TrainingError
from tests.learner.engine_cells import HALF, NUM_STEPS, Cell, Training, gap, reference

pytestmark = [
    pytest.mark.usefixtures("gang_of_one"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # What DeepSpeed imports for sharding alone.
]

GAP = 0.05
"""Of the way that 4 steps go; by torch's AdamW from the same start."""
CELLS = [
    Cell("full", 2, "fp32", optimizer="adamw_8bit"),
    *(Cell("full", stage, "fp32", optimizer="adamw_8bit") for stage in (0, 1, 3)),
    Cell("full", 2, "fp32", "optimizer", "adamw_8bit"),
    Cell("full", 1, "bf16", optimizer="adamw_8bit"),
]
STAGES = [pytest.param(cell, id=cell.name, marks=pytest.mark.slow if place else ()) for place, cell in enumerate(CELLS)]


def meta_of(cell: Cell, digest: str | None) -> Meta:
    parts = (HALF, HALF, 0, 1, cell.stage, cell.precision, {}, {})
    return Meta(*parts, average_digest=digest, average_steps=HALF)


@pytest.mark.parametrize("cell", STAGES)
def test_it_ends_near_adamw_and_a_resumed_run_with_the_same_bits(tiny_model: str, tmp_path: Path, cell: Cell) -> None:
    pytest.importorskip("bitsandbytes")
    start, end, _ = reference(cell, tiny_model)
    unbroken = Training(cell, tiny_model, 1).run(0, HALF)
    found = Checkpoint(tmp_path, meta_of(cell, save_engine(unbroken.engine, tmp_path)))
    unbroken.run(HALF, NUM_STEPS)
    assert 0 < gap(unbroken.masters(), end, start) < GAP
    moments = [state["state1"].dtype for state in unbroken.engine._base_optimizer.state.values()]
    assert torch.uint8 in moments
    resumed = Training(cell, tiny_model, 1)
    restore_engine(resumed.engine, cell.learner(1), found, lambda: pytest.fail("its own files fit"))
    assert resumed.run(HALF, NUM_STEPS).digest() == unbroken.digest()
    other = cell.learner(1).model_copy(update={"zero_stage": (cell.stage + 1) % 4})
    with pytest.raises(RunDirError, match="cannot be taken up by another layout"):
        restore_engine(resumed.engine, other, found, lambda: pytest.fail("nothing is tried"))


def test_it_starts_afresh_with_moments_of_its_own(tiny_model: str) -> None:
    pytest.importorskip("bitsandbytes")
    cell = Cell("lora", 1, "fp32", optimizer="adamw_8bit")
    training = Training(cell, tiny_model, 1).run(0, 2)
    before = training.masters()
    training.engine.start_afresh()
    rate = 1e-2
    training.engine.set_learning_rate(rate)
    after = training.run(2, 3).masters()
    furthest = max(float((after[name] - before[name]).abs().max()) for name in before)
    # AdamW's first step from rest moves a weight by the rate, and a little by decay.
    assert 0.9 * rate < furthest < 1.1 * rate


def test_without_its_package_the_extra_is_named(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrainingError, match=r"sfumato\[optimizer-8bit\]"):
        Training(Cell("lora", 1, "fp32", optimizer="adamw_8bit"), tiny_model, 1)
