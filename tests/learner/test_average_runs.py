"""The moving average in whole runs: it changes nothing that is trained, is exported, and goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cluster.redis_server import RedisServer
from diffusion.policy import Policy
from diffusion.weights import unpack, weights_digest
from learner.checkpoint import AVERAGE, Checkpoint, checkpoints_in, latest_checkpoint
from learner.images import ImageUpdater
from tests.learner.one_process_run import Run
from tests.learner.test_every_algorithm import CASES, Desk, desk_in, train_and_kill
from tests.learner.test_firewall_runs import FIREWALL, climbing

pytestmark = [
    pytest.mark.usefixtures("gang_of_one"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # What DeepSpeed imports for sharding alone.
]

LEARNER: dict[str, Any] = {"learning_rate": 1e-2, "micro_batch_size": 8}
DECAY = 0.15
AVERAGING = {**LEARNER, "ema": {"decay": DECAY}}
EVERY = {"checkpoints": {"every_rounds": 1, "keep_last": 10}}


@pytest.fixture(scope="module")
def desk(
    tiny_model: str, redis_server: RedisServer, open_streams: Callable[..., Any], tmp_path_factory: Any
) -> Iterator[Desk]:
    with desk_in(tmp_path_factory.mktemp("averages"), tiny_model, open_streams, redis_server) as desk:
        yield desk


def published(run: Run) -> list[str]:
    return [row["published_digest"] for row in run.lines("ledger.jsonl")]


def by_round(run: Run) -> dict[int, Checkpoint]:
    return {found.meta.round: found for found in checkpoints_in(run.run_dir)}


def average_of(found: Checkpoint) -> dict[str, Tensor]:
    return load_file(found.folder / AVERAGE)


def live_of(found: Checkpoint) -> dict[str, Tensor]:
    return unpack(found.version_bytes(found.meta.round))


def exported(run: Run, weights: dict[str, Tensor], folder: Path) -> str:
    """The digest of what a policy with these weights exports."""
    policy = Policy.from_recipe(run.recipe, with_decoder=False)
    policy.load_trainable_state(weights)
    policy.export(folder)
    return weights_digest(load_file(folder / "pytorch_lora_weights.safetensors"))


def taken_in(before: dict[str, Tensor], live: dict[str, Tensor], num_steps: int) -> dict[str, Tensor]:
    """The average after one more step, of fp32 weights."""
    weight = 1 - min(DECAY, (1 + num_steps) / (10 + num_steps))
    return {name: tensor + (live[name] - tensor) * weight for name, tensor in before.items()}


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_an_average_changes_no_weight_and_is_what_a_run_leaves_and_goes_on_with(
    desk: Desk, tmp_path: Path, stage: int
) -> None:
    parts, averaging = {**CASES["sft_online"], **EVERY}, {**AVERAGING, "zero_stage": stage}
    plain = desk.run(f"plain-{stage}", parts, learner={**LEARNER, "zero_stage": stage})
    whole = desk.run(f"whole-{stage}", parts, learner=averaging)
    plain.train()
    whole.train()
    assert published(plain) == published(whole)
    found = by_round(whole)
    average = Policy.from_recipe(whole.recipe, with_decoder=False).trainable_state()
    for round_, one in sorted(found.items()):
        average = taken_in(average, live_of(one), round_ - 1)
        assert weights_digest(average) == weights_digest(average_of(one)) == one.meta.average_digest
    left = weights_digest(load_file(whole.run_dir / "export" / "pytorch_lora_weights.safetensors"))
    assert (
        left == exported(whole, average, tmp_path / "average") != exported(whole, live_of(found[3]), tmp_path / "live")
    )
    assert not (latest_checkpoint(plain.run_dir).folder / AVERAGE).exists()
    train_and_kill(desk.run(f"broken-{stage}", parts, learner=averaging), 2)
    resumed = desk.run(f"broken-{stage}", parts, learner=averaging, attempt=1)
    resumed.train()
    assert latest_checkpoint(resumed.run_dir).meta.average_digest == found[3].meta.average_digest
    assert latest_checkpoint(resumed.run_dir).meta.average_steps == 3


@pytest.mark.slow
def test_an_iteration_of_self_play_has_an_average_of_its_own(desk: Desk) -> None:
    run = desk.run("spin", {**CASES["spin"], **EVERY}, learner=AVERAGING)
    run.train()
    starts, found = run.plan.iteration_starts, by_round(run)
    per_round = run.recipe.algorithm.num_steps_per_round
    assert [found[round_].meta.average_steps for round_ in (1, 2, 3)] == [per_round, 2 * per_round, per_round]
    assert starts == (0, 2)


def test_a_roll_back_starts_the_average_again_from_the_good_weights(desk: Desk) -> None:
    # The harness tells held-out rewards the opposite of the trained one: any climb is a fall.
    parts = {
        **CASES["prdp"],
        **EVERY,
        "algorithm": {"name": "policy_gradient", "advantage": "centred", "clip_range": None},
        "rewards": [{"name": "jpeg_incompressibility"}],
        "firewall": {**FIREWALL, "on_trip": "roll_back", "max_roll_backs": 9},
        "rounds": 4,
    }
    run = desk.run("rolled-back", parts, learner=AVERAGING, scores=climbing)
    tripped = [row["round"] for row in run.train() if row["firewall/tripped"]]
    found = by_round(run)
    assert tripped
    for round_ in tripped:
        assert found[round_ + 1].meta.average_steps == 0
        assert weights_digest(average_of(found[round_ + 1])) == weights_digest(live_of(found[round_ + 1]))


def test_an_encoder_of_the_average_is_the_bases_at_first_and_then_follows(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, update = list[dict[str, Tensor]](), ImageUpdater._update_encoder

    def spied(updater: ImageUpdater) -> None:
        update(updater)
        network = updater._tools.policy.average_denoiser
        assert network is not None
        assert not any(parameter.requires_grad for parameter in network.parameters())
        seen.append({name: p.detach().clone() for name, p in network.named_parameters() if "lora" in name})

    parts, losses = {**CASES["ncp_dpo"], **EVERY}, {}
    for weights in ("frozen_base", "ema"):
        algorithm = {**parts["algorithm"], "perception": {"encoder_weights": weights}}
        with monkeypatch.context() as patch:
            if weights == "ema":
                patch.setattr(ImageUpdater, "_update_encoder", spied)
            run = desk.run(f"encoder-{weights}", {**parts, "algorithm": algorithm}, learner=AVERAGING)
            losses[weights] = [row["updates"]["ncp/encoder_gain"] for row in run.train()]
    assert losses["ema"][0][0] == losses["frozen_base"][0][0]
    assert losses["ema"][1] != losses["frozen_base"][1]
    found, per_round = by_round(run), run.recipe.algorithm.num_steps_per_round
    for round_ in (1, 2):
        average = average_of(found[round_])
        assert seen[round_ * per_round].keys() == average.keys()
        assert all(torch.equal(seen[round_ * per_round][name], tensor) for name, tensor in average.items())
