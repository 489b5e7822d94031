"""A ticket in, a scored group out: what every rollout worker computes, whoever and wherever it is."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from diffusion.chain import Chain, Trajectories
from diffusion.fingerprint import fingerprint
from diffusion.weights import unpack, weights_digest
from protocol.groups import Group
from protocol.tickets import Ticket


class PendingScores(Protocol):
    """Scores that reward actors are working on."""

    def ready(self) -> bool:
        """True once `result` answers at once."""
        ...

    def result(self) -> Mapping[str, np.ndarray]:
        """Waits for the scores: `reward_G`, the weighted sum, and `reward_<label>_G` of each reward, fp32."""
        ...


Score = Callable[[np.ndarray, str, str], PendingScores]
"""(images uint8 (G, H, W, 3), prompt, ticket_id) -> scores on their way."""

FetchVersion = Callable[[Ticket], bytes]
"""The packed weights of a ticket's version; waits until they are published."""


@dataclass(frozen=True)
class Sampled:
    """A group that waits for its scores."""

    ticket: Ticket
    trajectories: Trajectories
    weights_digest: str
    rollout_s: float
    scores: PendingScores


class Rollout:
    """Samples tickets with exactly the weights that they name."""

    def __init__(self, chain: Chain, fetch_version: FetchVersion, score: Score, worker: str) -> None:
        self._chain, self._fetch_version, self._score = chain, fetch_version, score
        self._worker = f"{worker}@{socket.gethostname()}"
        self._fingerprint = fingerprint(chain.policy.device, chain.policy.base_digest)
        self._digest = ""

    def sample(self, ticket: Ticket, after_step: Callable[[], None]) -> Sampled:
        """Draws the ticket's trajectories and sends the images to be scored, without waiting for the scores."""
        self._hold(ticket)
        started = time.monotonic()
        trajectories = self._chain.sample(ticket.prompt, ticket.seeds_G, after_step)
        images = self._chain.policy.decode(trajectories.latents_GSCHW[:, -1].float())
        rollout_s = time.monotonic() - started
        scores = self._score(images, ticket.prompt, ticket.ticket_id)
        return Sampled(ticket, trajectories, self._digest, rollout_s, scores)

    def complete(self, sampled: Sampled) -> Group:
        """Waits for the scores and returns the group. Raises RewardError if they cannot be had."""
        started = time.monotonic()
        scores = dict(sampled.scores.result())
        ticket, drawn = sampled.ticket, sampled.trajectories
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
            reward_s=time.monotonic() - started,
            arrays={
                "latents_GSCHW": drawn.latents_GSCHW.numpy(),
                "log_prob_GT": drawn.log_prob_GT.numpy(),
                "scored_T": drawn.scored_T.numpy(),
                **scores,
            },
        )

    def _hold(self, ticket: Ticket) -> None:
        """Loads the ticket's weights unless they are held. The digest is then taken of the live parameters:
        what a group reports is what sampled it, not what was asked for."""
        if self._digest == ticket.weights_digest:
            return
        policy = self._chain.policy
        policy.load_trainable_state(unpack(self._fetch_version(ticket)))
        self._digest = weights_digest(policy.trainable_state())
