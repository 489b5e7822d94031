"""How many rollout actors a run should have: a pure function of what was observed in the last rounds.

The learner waits, and tickets are queued    --> more, by half of what there are
Rollouts idle, and the learner hardly waits  --> fewer, so that those that stay are busy BUSY of the time
anything else                                --> as many

The thresholds lie so far apart that neither step brings about the other's: with w the learner's waiting share and
i the rollouts' idle share, one half more (or one, of one) leave i <= 1/3 where sampling overlaps learning, and w > 0.1
before they leave i >= IDLE where it does not; fewer leave w < WAITS in both cases (tests/cluster/test_controller.py).

Few tickets do not divide evenly, so that one rollout more may halve a round. Hence a size at which the learner was seen
to wait is not gone back to for as long as observations are remembered.

A round is an observation. A change needs PATIENCE of them in a row that agree, all of the present size, after one that
is not counted, since actors that come load their model and those that go finish first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.roles import Rollouts

PATIENCE = 2
COOL_DOWN = 1
"""Observations that are not counted after a change."""

MEMORY = 30
"""Observations that are remembered: what a run is like changes."""

WAITS, HARDLY_WAITS = 0.25, 0.1
"""Shares of the learner's time."""

QUEUED = 0.1
"""Share of looks at which tickets wait that counts as a queue: a round's tickets are issued all at once."""

IDLE, BUSY = 0.4, 0.8
"""Shares of the rollouts' time: that of which some are let go, and that which the others are left with."""


@dataclass(frozen=True)
class Observation:
    """One round, or several that are short: `Observation(size=4, starting=0, learner_waits=0.6, tickets_wait=0.9,
    rollouts_idle=0.05)`. `size` counts all rollout actors, `starting` those of them that are not at work yet."""

    size: int
    starting: int
    learner_waits: float
    tickets_wait: float
    rollouts_idle: float


@dataclass(frozen=True)
class Decision:
    """How many there should be, and why: `Decision(6, "the learner waits 60 % of the time, ...")`."""

    num: int
    reason: str


def decide(observations: Sequence[Observation], size: int, bounds: Rollouts) -> Decision:
    """Returns how many rollout actors a run of `size` should have, within its bounds; newest observation last."""
    if not bounds.min <= size <= bounds.max:
        return Decision(min(max(size, bounds.min), bounds.max), f"asked for {bounds}")
    counted = observations[-PATIENCE - COOL_DOWN :]
    if len(counted) < PATIENCE + COOL_DOWN or any(seen.size != size for seen in counted):
        return Decision(size, "not observed for long enough")
    proposals = [propose(seen, bounds) for seen in counted[COOL_DOWN:]]
    # Of steps in one direction the smallest.
    calmest = min(proposals, key=lambda proposal: abs(proposal.num - size))
    if all(proposal.num > size for proposal in proposals):
        return calmest
    too_few = max((seen.size for seen in observations if seen.learner_waits >= WAITS), default=0)
    if all(proposal.num < size for proposal in proposals) and calmest.num > too_few:
        return calmest
    return Decision(size, "as it is")


def propose(seen: Observation, bounds: Rollouts) -> Decision:
    """Returns what a single observation speaks for."""
    at_work = seen.size - seen.starting
    if seen.learner_waits >= WAITS and seen.tickets_wait >= QUEUED:
        reason = f"the learner waits {seen.learner_waits:.0%} of the time, tickets {seen.tickets_wait:.0%} of it"
        # Those that start are the step before; more would only wait for nodes beside them.
        num = seen.size if seen.starting else seen.size + max(1, seen.size // 2)
    elif seen.rollouts_idle >= IDLE and seen.learner_waits <= HARDLY_WAITS:
        reason = (
            f"rollouts idle {seen.rollouts_idle:.0%} of the time, and the learner waits {seen.learner_waits:.0%} of it"
        )
        needed = math.ceil(at_work * (1 - seen.rollouts_idle) / BUSY)
        num = min(seen.size, max(needed, math.ceil(seen.size / 2)))
    else:
        return Decision(seen.size, "as it is")
    return Decision(min(max(num, bounds.min), bounds.max), reason)
