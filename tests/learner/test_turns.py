"""A learner that samples too, in turns with learning, ends where rollout actors would have brought it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.redis_server import RedisServer
from diffusion.weights import weights_digest
from learner.checkpoint import latest_checkpoint
from protocol.errors import RewardError
from tests.learner.one_process_run import Run, redness
from tests.learner.test_every_algorithm import CASES, ROUNDS, Desk, desk_in, parameters

pytestmark = [
    pytest.mark.usefixtures("gang_of_one"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # What DeepSpeed imports for sharding alone.
]

SAME = ("round", "version", "digest", "published_digest", "tickets", "checksums")
QUICK = ("policy_gradient_late", "spin")
"""Weights that are not the newest, and an opponent's, on prompts and on images."""

FULL = {"model": {"path": "model", "trainable": {"form": "full"}}}
EVERY = {"checkpoints": {"every_rounds": 100}}


@pytest.fixture(scope="module")
def desk(
    tiny_model: str, redis_server: RedisServer, open_streams: Callable[..., Any], tmp_path_factory: Any
) -> Iterator[Desk]:
    with desk_in(tmp_path_factory.mktemp("turns"), tiny_model, open_streams, redis_server) as desk:
        yield desk


def told(run: Run) -> list[dict[str, Any]]:
    return [{name: row[name] for name in SAME} for row in run.lines("ledger.jsonl")]


def both_ways(desk: Desk, name: str, parts: Mapping[str, Any], **others: Any) -> tuple[Run, Run]:
    apart, in_turns = desk.run(f"{name}-apart", parts, **others), desk.run(f"{name}-turns", parts, rollouts=0, **others)
    apart.train()
    in_turns.train_in_turns()
    return apart, in_turns


@parameters(QUICK)
def test_every_algorithm_learns_the_same_to_the_bit(desk: Desk, name: str) -> None:
    apart, in_turns = both_ways(desk, name, CASES[name])
    assert told(in_turns) == told(apart)
    assert len(told(in_turns)) == ROUNDS


def test_whole_networks_are_lent_and_given_back(desk: Desk) -> None:
    late = CASES["policy_gradient_late"]
    apart, in_turns = both_ways(desk, "full", late, **FULL, learner={"learning_rate": 1e-4, "zero_stage": 2})
    assert told(in_turns) == told(apart)


def test_what_nobody_waits_for_any_more_is_not_sampled(desk: Desk) -> None:
    run = desk.run("stale", CASES["sft_online"], rollouts=0, rounds=2)
    streams = run.open_streams()
    streams.open()
    stale = run.plan.round(0, "f" * 64)
    asked = []

    def scores(images: np.ndarray) -> np.ndarray:
        asked.append(len(images))
        if len(asked) == len(stale) + 1:  # Round 0 is over: what is issued of it now comes too late.
            streams.issue(stale)
        return redness(images)

    run.scores = scores
    run.train_in_turns()
    assert [len(row["tickets"]) for row in told(run)] == [len(stale)] * 2
    assert len(asked) == 2 * len(stale)
    assert streams.queue_depth().waiting == 0


def test_what_cannot_be_scored_ends_the_run_with_a_checkpoint_of_what_was_learnt(desk: Desk) -> None:
    num_asked, num_groups = 0, 0

    def scores(images: np.ndarray) -> np.ndarray:
        nonlocal num_asked
        num_asked += 1
        if num_asked > 2 * num_groups:
            raise RewardError("the reward has failed on this group for good")
        return redness(images)

    run = desk.run("failing", CASES["sft_online"], scores=scores, rollouts=0, **EVERY)
    num_groups = run.recipe.batch.num_groups
    with pytest.raises(RewardError, match="for good"):
        run.train_in_turns()
    found = latest_checkpoint(run.run_dir)
    assert found is not None
    assert found.meta.round == 2


def test_a_stop_is_heard_in_the_middle_of_a_turn(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.contact.CHECK_STOP_EVERY_S", 0.0)
    run = desk.run("stopped", CASES["sft_online"], rollouts=0, **EVERY)
    num_groups, num_asked = run.recipe.batch.num_groups, 0

    def scores(images: np.ndarray) -> np.ndarray:
        nonlocal num_asked
        num_asked += 1
        if num_asked == num_groups + 1:
            run.open_streams().ask_to_stop()
        return redness(images)

    run.scores = scores
    run.train_in_turns()
    assert num_asked == num_groups + 1
    found = latest_checkpoint(run.run_dir)
    assert found is not None
    assert found.meta.round == 1
    policy = run.rank._policy
    assert weights_digest(policy.trainable_state()) == found.meta.digests["1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learner": {"zero_stage": 3}}, "zero_stage 3 no rank has all parameters"),
        ({"rollout_worker": {"threads": 2}}, "different ways: give both as many threads"),
        ({"learner": {"num_gpus": 1}}, "different ways: .* both GPUs or none"),
    ],
)
def test_ranks_that_could_not_sample_as_rollout_actors_do_are_refused(
    desk: Desk, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        desk.run("refused", CASES["prdp"], rollouts=0, **settings)
    desk.run("refused", CASES["prdp"], rollouts=1, **settings)


def test_a_follower_may_have_shards_beside_a_learner_that_samples(desk: Desk) -> None:
    follower = {"name": "sharded", "algorithm": CASES["prdp"]["algorithm"], "learner": {"zero_stage": 3}}
    desk.run("followed", CASES["prdp"], rollouts=0, followers=[follower], checkpoints={"keep_last": 2})
