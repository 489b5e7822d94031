"""The number of rollout actors follows what was observed: within bounds, calmly, and to where it stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.controller import COOL_DOWN, HARDLY_WAITS, IDLE, MEMORY, PATIENCE, QUEUED, WAITS, Observation, decide
from protocol.roles import Rollouts

SHARES = st.floats(0, 1)
ENOUGH = PATIENCE + COOL_DOWN
FAR = Rollouts(min=1, max=1024)
STARVED = Observation(size=4, starting=0, learner_waits=0.6, tickets_wait=0.9, rollouts_idle=0.0)
SPARE = Observation(size=8, starting=0, learner_waits=0.0, tickets_wait=0.1, rollouts_idle=0.5)


@st.composite
def bounds(draw: st.DrawFn) -> Rollouts:
    fewest, most = sorted(draw(st.tuples(st.integers(1, 40), st.integers(1, 40))))
    return Rollouts(min=fewest, max=most)


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    size = draw(st.integers(1, 50))
    return Observation(size, draw(st.integers(0, size)), draw(SHARES), draw(SHARES), draw(SHARES))


@st.composite
def traces(draw: st.DrawFn) -> list[Observation]:
    """Many sizes, or one: what is decided of one is the rarer in chance traces, and the more interesting."""
    trace = draw(st.lists(observations(), max_size=8))
    size = draw(st.integers(1, 50)) if draw(st.booleans()) else None
    return [replace(seen, size=size, starting=min(seen.starting, size)) for seen in trace] if size else trace


@given(traces(), st.integers(0, 60), bounds())
def test_no_trace_leads_out_of_the_bounds(trace: list[Observation], size: int, within: Rollouts) -> None:
    assert within.min <= decide(trace, size, within).num <= within.max


@given(traces(), st.integers(1, 60), st.integers(1, 60))
def test_a_fixed_number_is_what_a_run_has_whatever_is_observed(trace: list[Observation], size: int, num: int) -> None:
    assert decide(trace, size, Rollouts(min=num, max=num)).num == num


@given(traces(), bounds())
def test_a_step_is_at_most_by_half_or_by_one(trace: list[Observation], within: Rollouts) -> None:
    for size in range(within.min, within.max + 1):
        assert math.ceil(size / 2) <= decide(trace, size, within).num <= size + max(1, size // 2)


@given(traces(), bounds())
def test_nothing_changes_before_enough_observations_of_this_size_agree(
    trace: list[Observation], within: Rollouts
) -> None:
    size = within.min
    other = Observation(size + 1, 0, 1.0, 1.0, 0.0)
    assert decide([*trace, other, *[replace(STARVED, size=size)] * (ENOUGH - 1)], size, within).num == size
    assert decide([*trace, other, *[replace(STARVED, size=size)] * ENOUGH], size, FAR).num > size


def test_a_learner_that_waits_beside_a_queue_gets_more_rollouts_and_the_reason_says_so() -> None:
    decision = decide([STARVED] * ENOUGH, 4, FAR)
    assert decision.num == 6
    assert decision.reason == "the learner waits 60% of the time, tickets 90% of it"


def test_rollouts_that_idle_while_the_learner_is_fed_are_let_go_until_the_others_are_busy() -> None:
    decision = decide([SPARE] * ENOUGH, 8, FAR)
    assert decision.num == 5  # 8 actors at 50 % are 4 at work, which are 5 at 80 %.
    assert decision.reason == "rollouts idle 50% of the time, and the learner waits 0% of it"


@pytest.mark.parametrize(
    "seen",
    [
        pytest.param(replace(STARVED, tickets_wait=0.0), id="nobody could take a ticket: there is none"),
        pytest.param(replace(STARVED, starting=1), id="the step before is not there yet"),
        pytest.param(replace(STARVED, learner_waits=0.2), id="the learner waits a little"),
        pytest.param(replace(SPARE, size=4, learner_waits=0.2), id="the learner would wait more"),
        pytest.param(replace(SPARE, size=4, rollouts_idle=0.3), id="rollouts are busy enough"),
    ],
)
def test_a_run_stays_as_it_is_where(seen: Observation) -> None:
    assert decide([seen] * ENOUGH, 4, FAR).num == 4


def test_one_observation_that_differs_stops_a_change() -> None:
    for trace in ([STARVED, STARVED, replace(SPARE, size=4)], [STARVED, replace(SPARE, size=4), STARVED]):
        assert decide(trace, 4, FAR).num == 4


def test_rollouts_that_wait_for_nodes_while_others_idle_are_given_back_first() -> None:
    waiting = replace(SPARE, starting=3)  # 5 are at work for half the time: 2.5, which are 4 at 80 %.
    assert decide([waiting] * ENOUGH, 8, FAR).num == 4


@given(SHARES, SHARES, SHARES, st.integers(1, 40), st.sampled_from(["learner_waits", "tickets_wait", "rollouts_idle"]))
def test_more_need_never_means_fewer_rollouts(waits: float, queued: float, idle: float, size: int, name: str) -> None:
    seen = Observation(size, 0, waits, queued, idle)
    change: dict[str, Any] = {name: 0.0 if name == "rollouts_idle" else 1.0}
    more = replace(seen, **change)
    now, then = (decide([each] * ENOUGH, size, FAR).num for each in (seen, more))
    assert then >= now


@given(traces(), st.integers(1, 40))
def test_wider_bounds_never_bring_a_decision_nearer_to_the_middle(trace: list[Observation], size: int) -> None:
    wide, narrow = decide(trace, size, FAR).num, decide(trace, size, Rollouts(min=size, max=size + 1)).num
    assert narrow == min(max(wide, size), size + 1)


def test_the_thresholds_leave_room_between_a_step_and_its_opposite() -> None:
    assert HARDLY_WAITS < WAITS
    assert QUEUED < WAITS < IDLE


Plant = Callable[[int], Observation]
Turns = Callable[[float], float]


def overlapped(num_turns: Turns, num_tickets: int, ticket_s: float, learner_s: float) -> Plant:
    """A run with lag: a round's tickets are sampled while the learner learns."""

    def observe(size: int) -> Observation:
        sampling_s = num_turns(num_tickets / size) * ticket_s
        round_s = max(sampling_s, learner_s)
        return observed(size, num_tickets * ticket_s, round_s, round_s - learner_s, sampling_s - ticket_s)

    return observe


def alternating(num_turns: Turns, num_tickets: int, ticket_s: float, learner_s: float) -> Plant:
    """A run without lag: first all is sampled, then the learner learns."""

    def observe(size: int) -> Observation:
        sampling_s = num_turns(num_tickets / size) * ticket_s
        return observed(size, num_tickets * ticket_s, sampling_s + learner_s, sampling_s, sampling_s - ticket_s)

    return observe


def observed(size: int, work_s: float, round_s: float, waiting_s: float, queued_s: float) -> Observation:
    return Observation(size, 0, waiting_s / round_s, max(0.0, queued_s) / round_s, 1 - work_s / (size * round_s))


def evenly(turns: float) -> float:
    """Many tickets divide as if they were a liquid."""
    return max(turns, 1.0)


def follow(plant: Plant, within: Rollouts, size: int, num_rounds: int) -> list[int]:
    """Returns the size in every round of a run that the controller scales."""
    seen: list[Observation] = []
    sizes = []
    for _ in range(num_rounds):
        size = decide(seen, size, within).num
        sizes.append(size)
        seen = [*seen, plant(size)][-MEMORY:]
    return sizes


RUNS = {
    "num_tickets": st.integers(1, 64),
    "ticket_s": st.floats(0.05, 20),
    "learner_s": st.floats(0.05, 200),
    "start": st.integers(1, 40),
}


@pytest.mark.parametrize("kind", [overlapped, alternating])
@settings(max_examples=40)
@given(within=bounds(), **RUNS)
def test_a_run_whose_speeds_stay_comes_to_a_number_that_stays(
    kind: Callable[..., Plant], within: Rollouts, num_tickets: int, ticket_s: float, learner_s: float, start: int
) -> None:
    sizes = follow(kind(evenly, num_tickets, ticket_s, learner_s), within, start, 90)
    assert len(set(sizes[-40:])) == 1
    assert num_reversals(sizes) <= 1


@pytest.mark.parametrize("kind", [overlapped, alternating])
@settings(max_examples=40)
@given(within=bounds(), **RUNS)
def test_tickets_that_do_not_divide_evenly_make_it_turn_back_once_for_as_long_as_it_remembers(
    kind: Callable[..., Plant], within: Rollouts, num_tickets: int, ticket_s: float, learner_s: float, start: int
) -> None:
    sizes = follow(kind(math.ceil, num_tickets, ticket_s, learner_s), within, start, 3 * MEMORY)
    for first in range(2 * MEMORY):
        assert num_reversals(sizes[first : first + MEMORY]) <= 2


def num_reversals(sizes: list[int]) -> int:
    ways = [now > before for before, now in pairwise(sizes) if now != before]
    return sum(now != before for before, now in pairwise(ways))


@given(num_tickets=st.integers(8, 64), ticket_s=st.floats(0.05, 20), learner_s=st.floats(0.05, 200))
def test_where_it_stays_the_learner_is_fed_or_no_rollout_could_help(
    num_tickets: int, ticket_s: float, learner_s: float
) -> None:
    plant = overlapped(evenly, num_tickets, ticket_s, learner_s)
    (size,) = set(follow(plant, FAR, 1, 90)[-40:])
    last = plant(size)
    assert last.learner_waits < WAITS or last.tickets_wait < QUEUED


def test_a_learner_that_becomes_slower_releases_what_it_no_longer_needs() -> None:
    within = Rollouts(min=1, max=16)
    grown = follow(overlapped(evenly, 64, 1.0, 8.0), within, 1, 60)[-1]
    shrunk = follow(overlapped(evenly, 64, 1.0, 64.0), within, grown, 60)[-1]
    assert (grown, shrunk) == (6, 2)
