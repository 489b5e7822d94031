"""A ticket in, a scored group out: what every rollout worker computes, whoever and wherever it is."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.makers import GroupMaker, Made
from diffusion.chain import Chain
from diffusion.fingerprint import fingerprint
from diffusion.peak_memory import peak_bytes
from diffusion.weights import unpack, weights_digest
from protocol.groups import Group
from protocol.tickets import Ticket


class PendingScores(Protocol):
    """Scores that reward actors are working on."""

    def ready(self) -> bool:
        """True once `result` answers at once."""
        ...

    def result(self) -> Mapping[str, np.ndarray]:
        """Waits for the scores: label -> (N,) fp32. An optional reward that failed has none."""
        ...


class Score(Protocol):
    """Sends images to be scored."""

    def __call__(
        self, images: np.ndarray, prompt: str, ticket_id: str, num_states: int = 1, is_check: bool = False
    ) -> PendingScores:
        """Takes uint8 images (G M, H, W, 3) of a ticket's G candidates at `num_states` M states each. Held-out rewards
        score what is drawn for a check."""
        ...


FetchVersion = Callable[[Ticket], bytes]
"""The packed weights of a ticket's version; waits until they are published."""


@dataclass(frozen=True)
class NoScores:
    """What a group that nothing is scored of waits for."""

    def ready(self) -> bool:
        """True, always."""
        return True

    def result(self) -> Mapping[str, np.ndarray]:
        """Returns nothing."""
        return {}


@dataclass(frozen=True)
class Sampled:
    """A group that waits for its scores."""

    ticket: Ticket
    made: Made
    weights_digest: str
    rollout_s: float
    asked_at: float
    scores: PendingScores


@dataclass(frozen=True)
class Fetched:
    """What it took to get a version's bytes: `Fetched(version=3, size_bytes=123456, fetch_s=0.01)`. A wait for a
    version that the store has lost is part of it."""

    version: int
    size_bytes: int
    fetch_s: float


class Rollout:
    """Answers tickets with exactly the weights that they name."""

    def __init__(self, chain: Chain, maker: GroupMaker, fetch_version: FetchVersion, score: Score, worker: str) -> None:
        self._chain, self._maker = chain, maker
        self._fetch_version, self._score = fetch_version, score
        self._worker = f"{worker}@{socket.gethostname()}"
        self._fingerprint = fingerprint(chain.policy.device, chain.policy.base_digest)
        self._digest: str | None = ""
        self.fetched: Fetched | None = None

    @property
    def peak_bytes(self) -> int:
        """The most memory that this process has held."""
        return peak_bytes(self._chain.policy.device)

    def forget_weights(self) -> None:
        """Says that somebody else may have changed the policy's weights."""
        self._digest = None

    def sample(self, ticket: Ticket, after_step: Callable[[], None]) -> Sampled:
        """Makes the ticket's group and sends its images to be scored, without waiting for the scores."""
        digest = self._hold(ticket)
        started = time.monotonic()
        made = self._maker.make(ticket, after_step)
        rollout_s = time.monotonic() - started
        scores: PendingScores = NoScores()
        if made.images is not None:
            num_states, is_check = made.num_states or 1, self._maker.is_check(ticket)
            scores = self._score(made.images, ticket.prompt, ticket.ticket_id, num_states, is_check)
        return Sampled(ticket, made, digest, rollout_s, time.monotonic(), scores)

    def complete(self, sampled: Sampled) -> Group:
        """Waits for the scores and returns the group, with the time since they were asked for. Raises RewardError where
        there are none."""
        scores = sampled.scores.result()
        ticket = sampled.ticket
        return Group(
            ticket_id=ticket.ticket_id,
            round=ticket.round,
            index=ticket.index,
            prompt=ticket.prompt,
            version=ticket.version,
            weights_digest=sampled.weights_digest,
            sampler=self._chain.description,
            fingerprint=self._fingerprint,
            worker=self._worker,
            rollout_s=sampled.rollout_s,
            reward_s=0.0 if sampled.made.images is None else time.monotonic() - sampled.asked_at,
            num_images=sampled.made.num_images,
            num_evaluations=sampled.made.num_evaluations,
            arrays=sampled.made.with_scores(scores),
        )

    def _hold(self, ticket: Ticket) -> str:
        """Loads the ticket's weights unless they are held. The digest is then taken of the live parameters: what a
        group reports is what sampled it, not what was asked for. A group that is only encoded holds for any weights."""
        if not self._maker.is_sampled(ticket):
            return ticket.weights_digest
        policy = self._chain.policy
        if self._digest is None:
            self._digest = weights_digest(policy.trainable_state())
        if self._digest != ticket.weights_digest:
            policy.load_trainable_state(unpack(self._fetch(ticket)))
            self._digest = weights_digest(policy.trainable_state())
        return self._digest

    def _fetch(self, ticket: Ticket) -> bytes:
        started = time.monotonic()
        data = self._fetch_version(ticket)
        self.fetched = Fetched(ticket.version, len(data), time.monotonic() - started)
        return data
