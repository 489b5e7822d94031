"""fp16: what becomes of a step whose gradients overflow, of the loss scale, and of both in a checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from protocol.errors import TrainingError
from tests.learner.engine_cells import Cell, Training, make_losses

pytestmark = [
    pytest.mark.usefixtures("gang_of_one"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # What DeepSpeed imports for sharding alone.
]

START = 2.0**16
STAGES = [1, 2, pytest.param(3, marks=pytest.mark.slow)]


@pytest.fixture
def training(tiny_model: str, request: pytest.FixtureRequest) -> Training:
    return Training(Cell("lora", getattr(request, "param", 1), "fp16"), tiny_model, 1)


def too_steep(training: Training) -> list[object]:
    """Losses whose scaled gradients are beyond fp16, and which are finite themselves."""

    def steep(loss: functools.partial[Tensor]) -> Tensor:
        return loss() * 1e6

    losses = make_losses(training.policy, training.engine.denoiser, 0)
    return [functools.partial(steep, loss) for loss in losses]


@pytest.mark.parametrize("training", STAGES, indirect=True)
def test_an_overflow_takes_no_step_and_halves_the_scale(training: Training) -> None:
    training.run(0, 1)
    before = training.masters()
    assert training.engine.apply(too_steep(training)) is None
    after = training.masters()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert training.engine.loss_scale == START / 2
    training.run(1, 2)
    assert training.norms[-1] > 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in training.masters().items())


def test_an_overflow_leaves_nothing_behind_for_the_steps_that_follow(tiny_model: str, training: Training) -> None:
    plain = Training(Cell("lora", 1, "fp16"), tiny_model, 1).run(0, 2)
    training.run(0, 1)
    training.engine.apply(too_steep(training))
    # A power of 2: gradients have the same digits at half the scale, but for the smallest.
    assert training.run(1, 2).norms == pytest.approx(plain.norms, rel=1e-3)


@pytest.mark.parametrize("way", ["its own files", "consolidated"])
def test_scale_and_steps_since_an_overflow_are_part_of_a_checkpoint(
    tiny_model: str, training: Training, tmp_path: Path, way: str
) -> None:
    training.run(0, 1).engine.apply(too_steep(training))
    training.run(1, 2).engine.save(tmp_path)
    whole = training.engine.consolidated()
    assert whole is not None
    save_file(whole, tmp_path / "whole.safetensors")
    digest = training.run(2, 4).digest()
    resumed = Training(Cell("lora", 1, "fp16"), tiny_model, 1)
    if way == "consolidated":
        resumed.take_up(tmp_path / "whole.safetensors")
    else:
        resumed.engine.load(tmp_path)
    assert resumed.engine.loss_scale == START / 2
    assert resumed.run(2, 4).digest() == digest
    own, other = (one.engine.consolidated() for one in (training, resumed))
    assert own is not None
    assert other is not None
    assert torch.equal(own["loss_scaler"], other["loss_scaler"])


def test_the_scale_is_doubled_after_many_steps_and_no_gradient_is_unscaled_by_the_new_one(
    tiny_model: str, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Training(Cell("lora", 1, "fp16"), tiny_model, 1).run(0, 3)
    monkeypatch.setattr("learner.engine.GROW_AFTER", 2)
    scales = []
    for step in range(3):
        training.run(step, step + 1)
        scales.append(training.engine.loss_scale)
    assert scales == [START, 2 * START, 2 * START]
    assert training.norms == pytest.approx(plain.norms, rel=1e-3)


def test_gradients_that_overflow_at_any_scale_stop_the_run(training: Training) -> None:
    losses = [lambda: make_losses(training.policy, training.engine.denoiser, 0)[0]() * torch.inf]
    smallest = [training.engine.apply(losses) for _ in range(15)]
    assert (smallest, training.engine.loss_scale) == ([None] * 15, 2.0)
    with pytest.raises(TrainingError, match="at any loss scale"):
        training.engine.apply(losses)


def test_only_fp16_has_a_loss_scale(tiny_model: str) -> None:
    assert Training(Cell("lora", 0, "fp32"), tiny_model, 1).engine.loss_scale is None
    assert Training(Cell("lora", 1, "bf16"), tiny_model, 1).engine.loss_scale is None
