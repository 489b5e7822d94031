"""The whole learner, on real Redis and real DeepSpeed, fed by rollouts that do their worst: nothing changes."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.makers import GroupMaker
from actors.rollout import Rollout
from cluster.redis_server import RedisServer
from diffusion.chain import Chain
from diffusion.policy import Policy
from learner.train import LearnerRank
from protocol.groups import Group
from protocol.recipe import Recipe
from protocol.stream import Claim, Streams
from protocol.tickets import Source, TicketPlan

pytestmark = pytest.mark.usefixtures("gang_of_one")

ROUNDS = 5
PROMPTS = ("a red seven", "a blue one", "a green two")


def make_recipe(model: str, lag: int) -> Recipe:
    return Recipe.model_validate(
        {
            "rounds": ROUNDS,
            "lag": lag,
            "model": {"path": model, "trainable": {"rank": 2, "alpha": 2}},
            "prompts": {"train": "unused"},
            "batch": {"num_groups": 4, "group_size": 3},
            "sampler": {"num_steps": 3},
            "rewards": [{"name": "jpeg_compressibility"}],
            "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2, "num_updates": 2},
            "learner": {"learning_rate": 1e-3, "micro_batch_size": 8},
            "redis": {"claim_idle_s": 0.5, "reissue_after_s": 0.5},
            "checkpoints": {"every_rounds": ROUNDS},
        }
    )


class MemoryStore:
    """A weight store in this process."""

    def __init__(self) -> None:
        self.versions: dict[int, tuple[str, bytes]] = {}

    def publish(self, version: int, digest: str, data: bytes) -> None:
        self.versions[version] = (digest, data)

    def held(self) -> set[int]:
        return set(self.versions)

    def fetch(self, digest: str) -> bytes:
        return next(data for held, data in list(self.versions.values()) if held == digest)


class Brightness:
    """Scores that are there at once."""

    def __init__(self, images: np.ndarray) -> None:
        self._reward_G = images.mean(axis=(1, 2, 3)).astype(np.float32)

    def ready(self) -> bool:
        return True

    def result(self) -> Mapping[str, np.ndarray]:
        return {"reward_G": self._reward_G, "reward_brightness_G": self._reward_G}


Deliver = Callable[[Streams, Claim, Group], None]


class Worker:
    """Takes whatever tickets there are, makes their groups, and delivers them as the test says."""

    def __init__(self, recipe: Recipe, store: MemoryStore, streams: Streams, deliver: Deliver, hold: int) -> None:
        policy = Policy.from_recipe(recipe)
        chain = Chain(policy, recipe.sampler)
        self._rollout = Rollout(
            chain,
            GroupMaker(chain, recipe),
            lambda ticket: store.fetch(ticket.weights_digest),
            lambda images, *_: Brightness(images),
            "w",
        )
        self._streams, self._deliver, self._hold = streams, deliver, hold
        self._claim_idle_s = recipe.redis.claim_idle_s

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            claims = [claim for _ in range(self._hold) if (claim := self._take())]
            random.Random(len(claims)).shuffle(claims)
            for claim in claims:
                self._deliver(self._streams, claim, self._make(claim))

    def _take(self) -> Claim | None:
        return self._streams.take("w", block_s=0.01, claim_idle_s=self._claim_idle_s)

    def _make(self, claim: Claim) -> Group:
        return self._rollout.complete(self._rollout.sample(claim.ticket, after_step=lambda: None))


def deliver_well(streams: Streams, claim: Claim, group: Group) -> None:
    streams.append(group)
    streams.acknowledge(claim)


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
def train(tiny_model: str, redis_server: RedisServer, open_streams: Any, tmp_path: Path) -> Callable[..., Path]:
    """Trains a run whose rollouts deliver as told; returns its directory."""

    def train_(lag: int, deliver: Deliver, hold: int) -> Path:
        recipe, store = make_recipe(tiny_model, lag), MemoryStore()
        run_dir = tmp_path / f"{type(deliver).__name__}-{hold}"
        run_dir.mkdir()
        run_id = os.urandom(4).hex()
        prompts, batch = (Source.of_prompts(PROMPTS),), recipe.batch
        plan = TicketPlan(recipe.seed, prompts, batch.num_groups, batch.group_size, lag)
        streams = [open_streams(redis_server, run_id=run_id, num_shards=1) for _ in range(2)]
        rank = LearnerRank(recipe, plan, run_dir, streams[0], store, torch.device("cpu"))
        worker, stop = Worker(recipe, store, streams[1], deliver, hold), threading.Event()
        thread = threading.Thread(target=worker.run, args=(stop,), daemon=True)
        thread.start()
        try:
            rank.train()
        finally:
            stop.set()
            thread.join()
        return run_dir

    return train_


def ledger(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_groups_late_twice_lost_torn_or_stale_change_nothing(train: Callable[..., Path], lag: int) -> None:
    orderly = ledger(train(lag, deliver_well, 1))
    wild = ledger(train(lag, Worst(), 4))
    for name in ("round", "version", "digest", "published_digest", "tickets", "checksums"):
        assert [row[name] for row in wild] == [row[name] for row in orderly], name
    assert len({row["published_digest"] for row in orderly}) == ROUNDS
    assert orderly[-1]["made_good"] == {"duplicate": 0, "reissued": 0, "dead_letter": 0, "stale": 0}
    made_good = {name: sum(row["made_good"][name] for row in wild) for name in wild[0]["made_good"]}
    assert all(made_good.values()), made_good
