"""A whole run in one process: real learner, DeepSpeed and Redis, rollouts in a thread or in turns with the learner,
scores at once."""

from __future__ import annotations

import _thread
import json
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.makers import GroupMaker
from actors.real import open_real_images
from actors.rollout import FetchVersion, Rollout
from actors.rollout_worker import RolloutWorker
from cluster.sources import prepare_sources, read_plan
from diffusion.chain import Chain
from diffusion.policy import Policy
from learner.train import LearnerRank
from protocol.groups import Group
from protocol.recipe import Recipe
from protocol.stream import Claim, Streams


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


def redness(images: np.ndarray) -> np.ndarray:
    """How red each image is."""
    return (images[..., 0].mean(axis=(1, 2)) / 255).astype(np.float32)


@dataclass(frozen=True)
class AtOnce:
    """Scores that are there at once, by the labels of the recipe's rewards."""

    parts: Mapping[str, np.ndarray]

    def ready(self) -> bool:
        return True

    def result(self) -> Mapping[str, np.ndarray]:
        return self.parts


Scores = Callable[[np.ndarray], np.ndarray]
Deliver = Callable[[Streams, Claim, Group], None]


def deliver_well(streams: Streams, claim: Claim, group: Group) -> None:
    """Appends once and acknowledges."""
    streams.append(group)
    streams.acknowledge(claim)


class Run:
    """A recipe trained in this process; `groups` are those that were delivered."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, open_streams: Callable[[], Streams], scores: Scores = redness
    ) -> None:
        run_dir.mkdir(exist_ok=True)
        prepare_sources(recipe, run_dir, lambda words: None)
        self.recipe, self.run_dir, self.groups = recipe, run_dir, list[Group]()
        self.scores = scores
        self.plan = read_plan(recipe, run_dir)
        self._store, self.open_streams = MemoryStore(), open_streams
        self._stop = threading.Event()
        self._failure: Exception | None = None

    def train(self, deliver: Deliver = deliver_well, hold: int = 1) -> list[dict[str, Any]]:
        """Trains to the recipe's end; returns the metrics of each round. Rollouts hold so many tickets at a time."""
        policy = Policy.from_recipe(self.recipe)
        rollout = self._make_rollout(Chain(policy, self.recipe.sampler), self._fetch)
        streams = self.open_streams()
        streams.open()
        rank = LearnerRank(self.recipe, self.plan, self.run_dir, self.open_streams(), self._store, torch.device("cpu"))
        thread = threading.Thread(target=self._work, args=(rollout, streams, deliver, hold), daemon=True)
        thread.start()
        try:
            rank.train()
        except KeyboardInterrupt:
            raise self._failure or KeyboardInterrupt from None
        finally:
            self._stop.set()
            thread.join()
        return self.lines("metrics.jsonl")

    def train_in_turns(self) -> list[dict[str, Any]]:
        """Trains with a learner that samples too."""
        streams = self.open_streams()
        streams.open()
        self.rank = LearnerRank(
            self.recipe,
            self.plan,
            self.run_dir,
            streams,
            self._store,
            torch.device("cpu"),
            make_worker=lambda chain, fetch, after_step: RolloutWorker(
                "learner-0",
                self._make_rollout(chain, fetch),
                self.open_streams(),
                self.recipe,
                while_working=after_step,
            ),
        )
        self.rank.train()
        return self.lines("metrics.jsonl")

    def _make_rollout(self, chain: Chain, fetch: FetchVersion) -> Rollout:
        maker = GroupMaker(chain, self.recipe, open_real_images(self.recipe, self.run_dir, chain.policy))
        return Rollout(chain, maker, fetch, self._score, "w")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Returns the rows of metrics or ledger."""
        return [json.loads(line) for line in (self.run_dir / name).read_text().splitlines()]

    def _score(self, images: np.ndarray, prompt: str, ticket_id: str, num_states: int, is_check: bool) -> AtOnce:
        """Firewalls' rewards are told the opposite."""
        scores = self.scores(images)
        held_out = self.recipe.scored_rewards[len(self.recipe.rewards) :] if is_check else ()
        return AtOnce({r.label: scores for r in self.recipe.rewards} | {r.label: -scores for r in held_out})

    def _fetch(self, ticket: Any) -> bytes:
        return self._store.fetch(ticket.weights_digest)

    def _work(self, rollout: Rollout, streams: Streams, deliver: Deliver, hold: int) -> None:
        while not self._stop.is_set():
            claims = [claim for _ in range(hold) if (claim := self._take(streams))]
            random.Random(len(claims)).shuffle(claims)
            for claim in claims:
                try:
                    group = rollout.complete(rollout.sample(claim.ticket, after_step=lambda: None))
                except Exception as error:  # the learner would wait for this group for ever
                    self._failure = error
                    _thread.interrupt_main()
                    return
                self.groups.append(group)
                deliver(streams, claim, group)

    def _take(self, streams: Streams) -> Claim | None:
        return streams.take("w", block_s=0.05, claim_idle_s=self.recipe.redis.claim_idle_s)
