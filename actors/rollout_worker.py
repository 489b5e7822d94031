"""The rollout worker's loop: take a ticket, sample it, and deliver those before while their scores come in.

        tickets --take--> [sampling] --images--> [scoring] --append, acknowledge--> groups
                              ^                      |
                              +-- next ticket -------+      one is sampled, as many are scored as keep the pools busy

Held tickets are renewed by progress, once a denoising step or a poll for scores: a worker that hangs lets go.
A worker of its own runs until it is stopped; one that shares a learner's process has its turn while tickets wait.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from protocol.errors import RedisError
from protocol.log import LOG
from protocol.recipe import Recipe
from protocol.stream import Claim, Streams
from protocol.tickets import Ticket

if TYPE_CHECKING:  # The loop itself needs no model, nor torch.
    from actors.rollout import Fetched, Rollout, Sampled

POLL_S = 0.02
TAKE_BLOCK_S = 1.0
REPORT_EVERY_S = 1.0
RECONNECT_EVERY_S = 1.0


class RolloutWorker:
    """Answers tickets. Any number of workers may share one ticket stream."""

    def __init__(
        self,
        name: str,
        rollout: Rollout,
        streams: Streams,
        recipe: Recipe,
        num_replicas: Callable[[], int] = lambda: 1,
        while_working: Callable[[], None] = lambda: None,
    ) -> None:
        """`num_replicas` tells how many actors the largest pool of rewards has by now; `while_working` is called after
        each step, and may raise to end a turn at once."""
        self._name, self._rollout, self._streams = name, rollout, streams
        self._claim_idle_s = recipe.redis.claim_idle_s
        self._scoring: list[tuple[Claim, Sampled]] = []
        self._num_replicas, self._fewest_workers = num_replicas, recipe.fewest_workers
        self._while_working = while_working
        self._sampling: Claim | None = None
        self._busy_since: float | None = None
        self._renewed_at = self._reported_at = 0.0
        self._started_at, self._busy_s = time.monotonic(), 0.0
        self._num_groups = self._num_images = 0
        self._told_of: Fetched | None = None

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Takes, samples and delivers. A Redis that is away is waited for: its tickets are issued again."""
        while not should_stop():
            try:
                self._turn(TAKE_BLOCK_S)
            except RedisError as error:
                self._let_go(error)
                time.sleep(RECONNECT_EVERY_S)
        # Else another would make these groups again, once the claims are idle.
        with suppress(RedisError):
            self._wait_for_scores(at_most=0)

    def answer_waiting(self, is_wanted: Callable[[Ticket], bool]) -> bool:
        """Answers the tickets that wait, but for those that nobody wants any more, and returns when none does; also
        where Redis is away, which whoever waits for the groups finds out too. Returns True if there was any ticket.
        Others may have used the policy before."""
        self._rollout.forget_weights()
        num_taken = 0
        try:
            while self._turn(0.0, is_wanted):
                num_taken += 1
        except RedisError as error:
            self._let_go(error)
        return num_taken > 0

    def _turn(self, block_s: float, is_wanted: Callable[[Ticket], bool] | None = None) -> bool:
        """Takes a ticket and samples it, or waits for the scores of those before. Returns True if there was one."""
        self._report()
        claim = self._streams.take(
            self._name, block_s=0.0 if self._scoring else block_s, claim_idle_s=self._claim_idle_s
        )
        if claim is None:
            self._wait_for_scores(at_most=0)
            return False
        if is_wanted and not is_wanted(claim.ticket):
            self._streams.acknowledge(claim)
            return True
        self._sampling, self._busy_since = claim, time.monotonic()
        sampled = self._rollout.sample(claim.ticket, after_step=self._between_steps)
        self._busy_s, self._busy_since = self._busy_s + time.monotonic() - self._busy_since, None
        self._wait_for_scores(at_most=math.ceil(self._num_replicas() / self._fewest_workers) - 1)
        self._sampling = None
        self._scoring.append((claim, sampled))
        return True

    def _let_go(self, error: RedisError) -> None:
        for claim in self._held():
            LOG.warning(f"let go: {error}", extra={"ticket": claim.ticket.ticket_id})
        self._sampling, self._busy_since, self._scoring = None, None, []

    def _between_steps(self) -> None:
        self._renew()
        self._report()
        self._deliver()
        self._while_working()

    def _wait_for_scores(self, at_most: int) -> None:
        """Returns when so many groups are left that wait for scores."""
        self._deliver()
        while len(self._scoring) > at_most:
            time.sleep(POLL_S)
            self._between_steps()

    def _deliver(self) -> None:
        """Appends what is scored first and acknowledges then: dying in between leaves a duplicate, never a gap."""
        for claim, sampled in [held for held in self._scoring if held[1].scores.ready()]:
            group = self._rollout.complete(sampled)
            self._streams.append(group)
            self._streams.acknowledge(claim)
            self._scoring = [held for held in self._scoring if held[0] is not claim]
            self._num_groups += 1
            self._num_images += group.num_images

    def _renew(self) -> None:
        if time.monotonic() - self._renewed_at < self._claim_idle_s / 4:
            return
        self._streams.renew(self._name, self._held())
        self._renewed_at = time.monotonic()

    def _held(self) -> list[Claim]:
        return [*([self._sampling] if self._sampling else []), *(claim for claim, _ in self._scoring)]

    def _report(self) -> None:
        now = time.monotonic()
        fetched = self._rollout.fetched
        # A version's cost is told at once: the round that it is for may be over in a moment.
        if fetched is self._told_of and now - self._reported_at < REPORT_EVERY_S:
            return
        self._reported_at, self._told_of = now, fetched
        self._streams.report_progress(
            f"rollout/{self._name}",
            groups=self._num_groups,
            images=self._num_images,
            busy_s=self._busy_s + (0.0 if self._busy_since is None else now - self._busy_since),
            alive_s=now - self._started_at,
            ticket=self._sampling.ticket.ticket_id if self._sampling else None,
            peak_bytes=self._rollout.peak_bytes,
            **(vars(fetched) if fetched else {}),
        )
