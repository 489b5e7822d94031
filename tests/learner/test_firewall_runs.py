"""The firewall in whole runs: what it does is a function of the run, and does nothing where it only watches."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from cluster.redis_server import RedisServer
from diffusion.weights import unpack
from learner.checkpoint import checkpoints_in, latest_checkpoint
from protocol.errors import TrainingError
from protocol.recipe import Recipe
from tests.learner.one_process_run import Run, redness

pytestmark = pytest.mark.usefixtures("gang_of_one")

FIREWALL = {
    "every_rounds": 1,
    "num_prompts": 2,
    "images_per_prompt": 2,
    "margin": 1e-9,
    # The harness tells held-out rewards the opposite of the trained one: any climb is a fall.
    "rewards": [{"name": "jpeg_compressibility"}],
}
ROUNDS = 4


@dataclass(frozen=True)
class Desk:
    """Starts runs of one recipe."""

    folder: Path
    open_streams: Callable[..., Any]
    server: RedisServer

    def run(self, name: str, firewall: dict[str, Any] | None, attempt: int = 0, **changes: Any) -> Run:
        parts = {
            "rounds": ROUNDS,
            "model": {"path": str(self.folder / "model"), "trainable": {"rank": 2, "alpha": 2}},
            "prompts": {"train": str(self.folder / "prompts.txt")},
            "batch": {"num_groups": 2, "group_size": 3},
            "sampler": {"num_steps": 3},
            "rewards": [{"name": "jpeg_incompressibility"}],
            "algorithm": {"name": "policy_gradient", "advantage": "centred", "clip_range": None},
            "learner": {"learning_rate": 1e-2, "micro_batch_size": 8},
            "checkpoints": {"every_rounds": 1, "keep_last": 10},
            "firewall": firewall and {**FIREWALL, **firewall},
        }
        run_id = f"{self.folder.name}-{name}-{os.getpid()}"
        return Run(
            Recipe.model_validate({**parts, **changes}),
            self.folder / f"run-{name}",
            lambda: self.open_streams(self.server, run_id=run_id, attempt=attempt, num_shards=1),
            climbing,
        )


def climbing(images: np.ndarray) -> np.ndarray:
    """A reward that any change of the weights raises in one direction or the other: told apart by its sum's sign."""
    return 1000 * redness(images)


@pytest.fixture(scope="module")
def desk(tiny_model: str, redis_server: RedisServer, open_streams: Callable[..., Any], tmp_path_factory: Any) -> Desk:
    folder = tmp_path_factory.mktemp("firewall")
    (folder / "model").symlink_to(tiny_model)
    (folder / "prompts.txt").write_text("a red seven\na blue one\na green two\n")
    return Desk(folder, open_streams, redis_server)


@pytest.fixture(scope="module")
def watched(desk: Desk, gang_of_one: None) -> tuple[Run, list[dict[str, Any]]]:
    """A run that is only warned, with its metrics."""
    run = desk.run("watched", {"on_trip": "warn"})
    return run, run.train()


def first_trip(rows: list[dict[str, Any]]) -> int:
    """The first round in which the firewall tripped."""
    return next(row["round"] for row in rows if row.get("firewall/tripped"))


def digests(run: Run) -> list[str]:
    return [row["published_digest"] for row in run.lines("ledger.jsonl")]


def test_watching_changes_nothing_but_what_is_told(desk: Desk, watched: Any) -> None:
    run, rows = watched
    alone = desk.run("alone", None)
    alone.train()
    assert digests(run) == digests(alone)
    assert run.lines("ledger.jsonl")[0]["tickets"] == alone.lines("ledger.jsonl")[0]["tickets"]
    assert [row["firewall/version"] for row in rows] == list(range(ROUNDS))
    trip = rows[first_trip(rows)]
    assert "fell from" in trip["firewall/reason"]
    assert trip["firewall/trained"] == pytest.approx(-trip["firewall/jpeg_compressibility"], rel=1e-6)


def test_checks_are_due_as_often_as_the_recipe_says_and_draw_the_same_each_time(desk: Desk) -> None:
    run = desk.run("seldom", {"every_rounds": 3}, learner={"learning_rate": 1e-30, "micro_batch_size": 8})
    rows = run.train()
    assert [row["round"] for row in rows if "firewall/trained" in row] == [0, 3]
    assert rows[0]["firewall/trained"] == pytest.approx(rows[3]["firewall/trained"])
    assert [group.ticket_id for group in run.groups if "check" in group.ticket_id] == [
        f"{round_:06d}-check-{number:04d}" for round_ in (0, 3) for number in range(2)
    ]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # What DeepSpeed imports for sharding alone.
def test_a_roll_back_publishes_the_last_good_version_again_and_goes_on_from_it(
    desk: Desk, watched: Any, stage: int
) -> None:
    trip, rate = first_trip(watched[1]), 1e-2
    learner = {"learning_rate": rate, "weight_decay": 0, "micro_batch_size": 8, "zero_stage": stage}
    run = desk.run(f"rolled-back-{stage}", {"on_trip": "roll_back"}, rounds=trip + 2, learner=learner)
    rows = run.train()
    assert first_trip(rows) == trip
    published, found = digests(run), latest_checkpoint(run.run_dir)
    good = found.meta.firewall_state["good"]
    assert published[trip] == (published[good - 1] if good else run.lines("ledger.jsonl")[0]["digest"])
    checkpoints = {one.meta.round: one for one in checkpoints_in(run.run_dir)}
    before, after = (unpack(checkpoints[trip + n].version_bytes(trip + n)) for n in (1, 2))
    furthest = max(float((after[name] - before[name]).abs().max()) for name in before)
    # AdamW's first step from rest moves a weight by the rate at most; from where it was, it would be further away.
    assert 0 < furthest < 1.01 * rate


def test_after_a_stop_work_is_kept_and_the_last_good_version_exported(desk: Desk, watched: Any) -> None:
    trip = first_trip(watched[1])
    run = desk.run("stopped", {"on_trip": "stop"})
    with pytest.raises(TrainingError, match=rf"the firewall stopped the run after round {trip + 1}: .* fell from"):
        run.train()
    found = latest_checkpoint(run.run_dir)
    assert found.meta.round == trip + 1
    good = found.meta.firewall_state["good"]
    exported = load_file(run.run_dir / "export" / "pytorch_lora_weights.safetensors")
    kept = unpack(found.version_bytes(good))
    assert sorted(float(t.double().square().sum()) for t in exported.values()) == pytest.approx(
        sorted(float(t.double().square().sum()) for t in kept.values())
    )
    # A resume as it was meets the same end, at once; whoever decides otherwise goes on from what was learnt.
    with pytest.raises(TrainingError, match=rf"the firewall stopped the run after round {trip + 1}: "):
        desk.run("stopped", {"on_trip": "stop"}, attempt=1).train()
    assert latest_checkpoint(run.run_dir).meta.round == trip + 1
    resumed = desk.run("stopped", {"on_trip": "warn"}, attempt=2)
    resumed.train()
    assert digests(resumed) == digests(watched[0])


def test_a_resumed_run_rolls_back_where_the_unbroken_one_did(desk: Desk, watched: Any) -> None:
    trip = first_trip(watched[1])
    settings = {"on_trip": "roll_back", "max_roll_backs": 9}
    unbroken = desk.run("unbroken", settings)
    unbroken.train()
    desk.run("resumed", settings, rounds=max(1, trip)).train()
    resumed = desk.run("resumed", settings, attempt=1)
    resumed.train()
    assert digests(resumed) == digests(unbroken)
