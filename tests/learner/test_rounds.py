"""The whole learner, on real Redis and real DeepSpeed, fed by rollouts that do their worst: nothing changes."""

from __future__ import annotations

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.redis_server import RedisServer
from protocol.groups import Group
from protocol.recipe import Recipe
from protocol.stream import Claim, Streams
from tests.learner.one_process_run import Deliver, Run, deliver_well

pytestmark = pytest.mark.usefixtures("gang_of_one")

ROUNDS = 5
Ledger = list[dict[str, Any]]


def make_recipe(model: str, prompts: str, lag: int) -> Recipe:
    return Recipe.model_validate(
        {
            "rounds": ROUNDS,
            "lag": lag,
            "model": {"path": model, "trainable": {"rank": 2, "alpha": 2}},
            "prompts": {"train": prompts},
            "batch": {"num_groups": 4, "group_size": 3},
            "sampler": {"num_steps": 3},
            "rewards": [{"name": "jpeg_compressibility"}],
            "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2, "num_updates": 2},
            "learner": {"learning_rate": 1e-3, "micro_batch_size": 8},
            "redis": {"claim_idle_s": 0.5, "reissue_after_s": 0.5},
            "checkpoints": {"every_rounds": ROUNDS},
        }
    )


class Worst:
    """Loses, repeats, ages, tears and forges, by a fixed pattern of the tickets; but answers in the end."""

    def __init__(self) -> None:
        self._first: Group | None = None
        self._asked: set[str] = set()

    def __call__(self, streams: Streams, claim: Claim, group: Group) -> None:
        choice = zlib.crc32(group.ticket_id.encode()) % 4
        if group.ticket_id not in self._asked:
            self._asked.add(group.ticket_id)
            if choice == 0:
                return  # Dies with the ticket in hand; it is claimed again when it has been idle.
            if choice == 1:
                streams.append(dataclasses.replace(group, version=group.version + 1))
            if choice == 2:
                torn = {**group.arrays, "log_prob_GT": np.array([np.nan])}
                streams.append(dataclasses.replace(group, arrays=torn))
        self._first = self._first or group
        for copy in (group, self._first, group):
            streams.append(copy)
        if choice != 3:
            streams.acknowledge(claim)  # Otherwise another makes the same group once more.


@pytest.fixture
def train(tiny_model: str, redis_server: RedisServer, open_streams: Any, tmp_path: Path) -> Callable[..., Ledger]:
    """Trains a run whose rollouts deliver as told; returns its ledger."""

    def train_(lag: int, deliver: Deliver, hold: int) -> Ledger:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a red seven\na blue one\na green two\n")
        run_id, name = os.urandom(4).hex(), f"{type(deliver).__name__}-{hold}"
        open_own = functools.partial(open_streams, redis_server, run_id=run_id, num_shards=1)
        run = Run(make_recipe(tiny_model, str(prompts), lag), tmp_path / name, open_own)
        run.train(deliver, hold)
        return run.lines("ledger.jsonl")

    return train_


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_groups_late_twice_lost_torn_or_stale_change_nothing(train: Callable[..., Ledger], lag: int) -> None:
    orderly = train(lag, deliver_well, 1)
    wild = train(lag, Worst(), 4)
    for name in ("round", "version", "digest", "published_digest", "tickets", "checksums"):
        assert [row[name] for row in wild] == [row[name] for row in orderly], name
    assert len({row["published_digest"] for row in orderly}) == ROUNDS
    assert orderly[-1]["made_good"] == {"duplicate": 0, "reissued": 0, "dead_letter": 0, "stale": 0}
    made_good = {name: sum(row["made_good"][name] for row in wild) for name in wild[0]["made_good"]}
    assert all(made_good.values()), made_good
