"""The rollout worker's loop: take a ticket, sample it, and deliver those before while their scores come in.

        tickets --take--> [sampling] --images--> [scoring] --append, acknowledge--> groups
                              ^                      |
                              +-- next ticket -------+      one is sampled, as many are scored as keep the pools busy

Held tickets are renewed by progress, once a denoising step or a poll for scores: a worker that hangs lets go.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.errors import RedisError
from protocol.recipe import Recipe
from protocol.stream import Claim, Streams

if TYPE_CHECKING:  # The loop itself needs no model, nor torch.
    from actors.rollout import Rollout, Sampled

POLL_S = 0.02
TAKE_BLOCK_S = 1.0
REPORT_EVERY_S = 1.0
RECONNECT_EVERY_S = 1.0


class RolloutWorker:
    """Answers tickets until `should_stop`. Any number of workers may share one ticket stream."""

    def __init__(self, name: str, rollout: Rollout, streams: Streams, recipe: Recipe) -> None:
        self._name, self._rollout, self._streams = name, rollout, streams
        self._claim_idle_s = recipe.redis.claim_idle_s
        self._scoring: list[tuple[Claim, Sampled]] = []
        replicas = max((reward.replicas for reward in recipe.scored_rewards), default=1)
        self._most_scoring = math.ceil(replicas / recipe.rollouts)
        self._sampling: Claim | None = None
        self._renewed_at = self._reported_at = 0.0
        self._started_at, self._busy_s, self._num_groups = time.monotonic(), 0.0, 0

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Takes, samples and delivers. A Redis that is away is waited for: its tickets are issued again."""
        while not should_stop():
            try:
                self._turn()
            except RedisError:
                self._sampling, self._scoring = None, []
                time.sleep(RECONNECT_EVERY_S)

    def _turn(self) -> None:
        self._report()
        claim = self._take()
        if claim is None:
            self._wait_for_scores(at_most=0)
            return
        started = time.monotonic()
        self._sampling = claim
        sampled = self._rollout.sample(claim.ticket, after_step=self._between_steps)
        self._busy_s += time.monotonic() - started
        self._wait_for_scores(at_most=self._most_scoring - 1)
        self._sampling = None
        self._scoring.append((claim, sampled))

    def _take(self) -> Claim | None:
        block_s = 0.0 if self._scoring else TAKE_BLOCK_S
        return self._streams.take(self._name, block_s=block_s, claim_idle_s=self._claim_idle_s)

    def _between_steps(self) -> None:
        self._renew()
        self._report()
        self._deliver()

    def _wait_for_scores(self, at_most: int) -> None:
        """Returns when so many groups are left that wait for scores."""
        self._deliver()
        while len(self._scoring) > at_most:
            self._renew()
            self._report()
            time.sleep(POLL_S)
            self._deliver()

    def _deliver(self) -> None:
        """Appends what is scored first and acknowledges then: dying in between leaves a duplicate, never a gap."""
        for claim, sampled in [held for held in self._scoring if held[1].scores.ready()]:
            self._streams.append(self._rollout.complete(sampled))
            self._streams.acknowledge(claim)
            self._scoring = [held for held in self._scoring if held[0] is not claim]
            self._num_groups += 1

    def _renew(self) -> None:
        if time.monotonic() - self._renewed_at < self._claim_idle_s / 4:
            return
        held = [*([self._sampling] if self._sampling else []), *(claim for claim, _ in self._scoring)]
        self._streams.renew(self._name, held)
        self._renewed_at = time.monotonic()

    def _report(self) -> None:
        now = time.monotonic()
        if now - self._reported_at < REPORT_EVERY_S:
            return
        self._reported_at = now
        self._streams.report_progress(
            f"rollout/{self._name}",
            groups=self._num_groups,
            busy_s=self._busy_s,
            alive_s=now - self._started_at,
            ticket=self._sampling.ticket.ticket_id if self._sampling else None,
            peak_bytes=self._rollout.peak_bytes,
        )
