"""The plan of a run is a pure function: the same whoever asks, whenever, and in whatever order."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.tickets import TicketPlan

DIGEST = "9f86d081" * 8
PLAN = TicketPlan(run_seed=3, prompts=("a", "b", "c", "d", "e"), num_groups=4, group_size=3, lag=1)

plans = st.builds(
    TicketPlan,
    run_seed=st.integers(0, 2**62),
    prompts=st.lists(st.text("abc", min_size=1), min_size=1, max_size=7, unique=True).map(tuple),
    num_groups=st.integers(1, 6),
    group_size=st.integers(1, 5),
    lag=st.integers(0, 2),
)


@given(plans, st.integers(0, 1000))
def test_the_same_plan_makes_the_same_tickets(plan: TicketPlan, round_: int) -> None:
    assert plan.round(round_, DIGEST) == dataclasses.replace(plan).round(round_, DIGEST)


def test_tickets_do_not_depend_on_the_order_in_which_they_are_made() -> None:
    backwards = {round_: PLAN.round(round_, DIGEST) for round_ in reversed(range(6))}
    assert [PLAN.round(round_, DIGEST) for round_ in range(6)] == [backwards[round_] for round_ in range(6)]


def test_a_round_is_the_tickets_of_its_indices_sorted_by_id() -> None:
    tickets = PLAN.round(12, DIGEST)
    assert tickets == [PLAN.ticket(12, index, DIGEST) for index in range(4)]
    assert tickets == sorted(tickets, key=lambda ticket: ticket.ticket_id)
    assert [ticket.ticket_id for ticket in tickets] == [f"000012-{index:04d}" for index in range(4)]


@given(plans)
def test_no_two_siblings_of_a_run_share_a_seed(plan: TicketPlan) -> None:
    seeds = [seed for round_ in range(4) for t in plan.round(round_, DIGEST) for seed in t.seeds_G]
    assert len(set(seeds)) == len(seeds) == 4 * plan.num_groups * plan.group_size


def test_more_siblings_leave_the_seeds_of_the_first_ones_as_they_are() -> None:
    larger = dataclasses.replace(PLAN, group_size=8)
    assert larger.ticket(2, 1, DIGEST).seeds_G[:3] == PLAN.ticket(2, 1, DIGEST).seeds_G


def test_another_run_seed_gives_other_seeds_and_another_order_of_prompts() -> None:
    plan = dataclasses.replace(PLAN, prompts=tuple("abcdefghijklmnopqrst"), num_groups=20)
    other = dataclasses.replace(plan, run_seed=4)
    ours, theirs = plan.round(0, DIGEST), other.round(0, DIGEST)
    assert not {s for t in ours for s in t.seeds_G} & {s for t in theirs for s in t.seeds_G}
    assert [t.prompt for t in ours] != [t.prompt for t in theirs]


@given(plans, st.integers(0, 5))
def test_every_prompt_comes_once_in_each_pass(plan: TicketPlan, pass_: int) -> None:
    rounds = range((pass_ + 1) * len(plan.prompts) // plan.num_groups + 1)
    prompts = [ticket.prompt for round_ in rounds for ticket in plan.round(round_, DIGEST)]
    assert Counter(prompts[pass_ * len(plan.prompts) : (pass_ + 1) * len(plan.prompts)]) == Counter(plan.prompts)


def test_passes_come_in_different_orders() -> None:
    plan = dataclasses.replace(PLAN, prompts=tuple("abcdefghijklmnopqrst"), num_groups=20)
    orders = {tuple(t.prompt for t in plan.round(pass_, DIGEST)) for pass_ in range(8)}
    assert len(orders) == 8


@pytest.mark.parametrize(("lag", "versions"), [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3]), (2, [0, 0, 0, 1, 2])])
def test_round_u_is_sampled_with_version_u_minus_lag(lag: int, versions: list[int]) -> None:
    plan = dataclasses.replace(PLAN, lag=lag)
    assert [plan.version_of(round_) for round_ in range(5)] == versions
    assert [plan.ticket(round_, 0, DIGEST).version for round_ in range(5)] == versions


def test_the_digest_changes_nothing_but_itself() -> None:
    ticket = PLAN.ticket(1, 1, "one")
    assert dataclasses.replace(ticket, weights_digest="two") == PLAN.ticket(1, 1, "two")
