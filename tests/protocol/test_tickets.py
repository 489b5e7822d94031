"""The plan of a run is a pure function: the same whoever asks, whenever, and in whatever order."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.tickets import Source, TicketPlan

DIGEST = "9f86d081" * 8
PLAN = TicketPlan(run_seed=3, sources=(Source.of_prompts("abcde"),), num_groups=4, group_size=3, lag=1)
LONG = dataclasses.replace(PLAN, sources=(Source.of_prompts("abcdefghijklmnopqrst"),), num_groups=20)
MIXTURE = dataclasses.replace(
    PLAN,
    sources=(
        Source.of_prompts("abcde", weight=1.0),
        Source("images", ("a red seven", "a blue one", "a blue one"), rows=(0, 2, 5), weight=2.0),
        Source("pairs", tuple("abcde"), rows=(1, 2, 3, 5, 8), weight=5.0),
    ),
)
SELF_PLAY = dataclasses.replace(MIXTURE, iteration_starts=(0, 2, 5))

prompts = st.lists(st.text("abc", min_size=1), min_size=1, max_size=7, unique=True)
prompt_files = st.builds(Source.of_prompts, prompts, weight=st.floats(0.1, 10))
datasets = st.dictionaries(st.integers(0, 99), st.text("abc"), min_size=1, max_size=7).flatmap(
    lambda captions: st.builds(
        Source,
        st.sampled_from(["images", "pairs"]),
        st.just(tuple(captions.values())),
        st.just(tuple(captions)),
        st.floats(0.1, 10),
    )
)


def plans(sources: st.SearchStrategy[tuple[Source, ...]]) -> st.SearchStrategy[TicketPlan]:
    """Plans without iterations."""
    return st.builds(
        TicketPlan,
        run_seed=st.integers(0, 2**62),
        sources=sources,
        num_groups=st.integers(1, 6),
        group_size=st.integers(1, 5),
        lag=st.integers(0, 2),
    )


lone_prompts = plans(prompt_files.map(lambda source: (source,)))
mixtures = plans(st.lists(prompt_files | datasets, min_size=1, max_size=3).map(tuple))
self_plays = st.builds(
    lambda plan, lengths: dataclasses.replace(plan, iteration_starts=tuple(itertools.accumulate(lengths, initial=0))),
    mixtures,
    st.lists(st.integers(1, 4), max_size=4),
)


@given(mixtures | self_plays, st.integers(0, 1000))
def test_the_same_plan_makes_the_same_tickets(plan: TicketPlan, round_: int) -> None:
    assert plan.round(round_, DIGEST) == dataclasses.replace(plan).round(round_, DIGEST)


@pytest.mark.parametrize("plan", [PLAN, MIXTURE, SELF_PLAY])
def test_tickets_do_not_depend_on_the_order_in_which_they_are_made(plan: TicketPlan) -> None:
    backwards = {round_: plan.round(round_, DIGEST) for round_ in reversed(range(6))}
    assert [plan.round(round_, DIGEST) for round_ in range(6)] == [backwards[round_] for round_ in range(6)]


def test_a_round_is_the_tickets_of_its_indices_sorted_by_id() -> None:
    tickets = PLAN.round(12, DIGEST)
    assert tickets == [PLAN.ticket(12, index, DIGEST) for index in range(4)]
    assert tickets == sorted(tickets, key=lambda ticket: ticket.ticket_id)
    assert [ticket.ticket_id for ticket in tickets] == [f"000012-{index:04d}" for index in range(4)]


@given(mixtures)
def test_no_two_siblings_of_a_run_share_a_seed(plan: TicketPlan) -> None:
    seeds = [seed for round_ in range(4) for t in plan.round(round_, DIGEST) for seed in t.seeds_G]
    assert len(set(seeds)) == len(seeds) == 4 * plan.num_groups * plan.group_size


@pytest.mark.parametrize("plan", [PLAN, MIXTURE, SELF_PLAY])
def test_more_siblings_leave_the_seeds_of_the_first_ones_as_they_are(plan: TicketPlan) -> None:
    larger = dataclasses.replace(plan, group_size=8)
    assert larger.ticket(2, 1, DIGEST).seeds_G[:3] == plan.ticket(2, 1, DIGEST).seeds_G


def test_another_run_seed_gives_other_seeds_and_another_order_of_prompts() -> None:
    ours, theirs = LONG.round(0, DIGEST), dataclasses.replace(LONG, run_seed=4).round(0, DIGEST)
    assert not {s for t in ours for s in t.seeds_G} & {s for t in theirs for s in t.seeds_G}
    assert [t.prompt for t in ours] != [t.prompt for t in theirs]


@given(lone_prompts, st.integers(0, 5))
def test_every_prompt_comes_once_in_each_pass(plan: TicketPlan, pass_: int) -> None:
    (source,) = plan.sources
    size = len(source.prompts)
    rounds = range((pass_ + 1) * size // plan.num_groups + 1)
    prompts = [ticket.prompt for round_ in rounds for ticket in plan.round(round_, DIGEST)]
    assert Counter(prompts[pass_ * size : (pass_ + 1) * size]) == Counter(source.prompts)


def test_passes_come_in_different_orders() -> None:
    orders = {tuple(t.prompt for t in LONG.round(pass_, DIGEST)) for pass_ in range(8)}
    assert len(orders) == 8


@pytest.mark.parametrize(("lag", "versions"), [(0, [0, 1, 2, 3, 4]), (1, [0, 0, 1, 2, 3]), (2, [0, 0, 0, 1, 2])])
def test_round_u_is_sampled_with_version_u_minus_lag(lag: int, versions: list[int]) -> None:
    plan = dataclasses.replace(PLAN, lag=lag)
    assert [plan.version_of(round_) for round_ in range(5)] == versions
    assert [plan.ticket(round_, 0, DIGEST).version for round_ in range(5)] == versions


def test_the_digest_changes_nothing_but_itself() -> None:
    ticket = PLAN.ticket(1, 1, "one")
    assert dataclasses.replace(ticket, weights_digest="two") == PLAN.ticket(1, 1, "two")


# Several sources.


def test_a_lone_sources_tickets_are_those_of_the_first_release() -> None:
    """Before there were sources, a plan had prompts; its runs must come out again."""
    assert "".join(ticket.prompt for round_ in range(4) for ticket in PLAN.round(round_, "")) == "caebddceabdbeacd"
    assert PLAN.ticket(2, 1, "").seeds_G == (732966886772307757, 487862722965239514, 1654209962685305730)


@given(lone_prompts, st.floats(0.1, 10), st.integers(0, 20))
def test_the_weight_of_a_lone_source_changes_nothing(plan: TicketPlan, weight: float, round_: int) -> None:
    (source,) = plan.sources
    other = dataclasses.replace(plan, sources=(dataclasses.replace(source, weight=weight),))
    assert other.round(round_, DIGEST) == plan.round(round_, DIGEST)


@given(mixtures | self_plays, st.integers(0, 50))
def test_a_ticket_names_a_row_of_its_source_and_that_rows_caption(plan: TicketPlan, round_: int) -> None:
    for ticket in plan.round(round_, DIGEST):
        source = plan.sources[ticket.source]
        assert ticket.prompt == source.prompts[source.rows.index(ticket.row)]


def test_shares_of_sources_follow_their_weights() -> None:
    num_tickets = 4000
    plan = dataclasses.replace(MIXTURE, num_groups=num_tickets, group_size=1)
    drawn = Counter(ticket.source for ticket in plan.round(0, DIGEST))
    for number, share in enumerate((1 / 8, 2 / 8, 5 / 8)):
        # Five standard deviations of a binomial count.
        bound = 5 * (num_tickets * share * (1 - share)) ** 0.5
        assert abs(drawn[number] - num_tickets * share) < bound


def test_only_ratios_of_weights_count() -> None:
    doubled = tuple(dataclasses.replace(source, weight=2 * source.weight) for source in MIXTURE.sources)
    assert dataclasses.replace(MIXTURE, sources=doubled).round(7, DIGEST) == MIXTURE.round(7, DIGEST)


@given(mixtures, st.integers(0, 5), st.integers(1, 9))
def test_a_tickets_source_depends_on_its_name_alone(plan: TicketPlan, round_: int, num_groups: int) -> None:
    """What else is in its round, how many siblings it has and how old its weights are have no say."""
    other = dataclasses.replace(plan, num_groups=num_groups, group_size=7, lag=3)
    for ours, theirs in zip(plan.round(round_, DIGEST), other.round(round_, DIGEST), strict=False):
        assert ours.source == theirs.source


def rows_by_pass(plan: TicketPlan, num_rounds: int) -> dict[tuple[int, int], list[int]]:
    """The rows that each pass over each source visits, in order; passes over a source are as long as it."""
    rows = defaultdict(list)
    for round_, index in itertools.product(range(num_rounds), range(plan.num_groups)):
        ticket = plan.ticket(round_, index, DIGEST)
        position = round_ * plan.num_groups + index
        rows[ticket.source, position // len(plan.sources[ticket.source].rows)].append(ticket.row)
    return rows


@given(mixtures)
def test_no_row_comes_twice_in_a_pass(plan: TicketPlan) -> None:
    for rows in rows_by_pass(plan, num_rounds=6).values():
        assert len(set(rows)) == len(rows)


def test_every_row_of_every_source_comes_equally_often_in_the_long_run() -> None:
    num_rounds = 600
    counts: Counter[tuple[int, int]] = Counter()
    for (number, _), rows in rows_by_pass(MIXTURE, num_rounds).items():
        counts.update((number, row) for row in rows)
    for number, (source, share) in enumerate(zip(MIXTURE.sources, (1 / 8, 2 / 8, 5 / 8), strict=True)):
        mean = num_rounds * MIXTURE.num_groups * share / len(source.rows)
        assert all(abs(counts[number, row] - mean) < 5 * mean**0.5 for row in source.rows)


def test_sources_of_one_size_come_in_orders_of_their_own() -> None:
    twins = (Source.of_prompts("abcdefghijkl"), Source.of_prompts("abcdefghijkl"))
    plan = dataclasses.replace(MIXTURE, sources=twins, num_groups=12)
    one, other = ({t.index: t.row for t in plan.round(0, DIGEST) if t.source == number} for number in range(2))
    alone = {t.index: t.row for t in dataclasses.replace(plan, sources=twins[:1]).round(0, DIGEST)}
    assert one
    assert other
    assert any(alone[index] != row for index, row in other.items())


# Iterations of self-play.


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_a_round_of_self_play_is_sampled_with_the_weights_at_its_iterations_start(lag: int) -> None:
    plan = dataclasses.replace(SELF_PLAY, lag=lag)
    assert [plan.version_of(round_) for round_ in range(8)] == [0, 0, 2, 2, 2, 5, 5, 5]
    assert [plan.iteration_of(round_) for round_ in range(8)] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [plan.ticket(round_, 3, DIGEST).version for round_ in range(8)] == [0, 0, 2, 2, 2, 5, 5, 5]


@pytest.mark.parametrize("plan", [MIXTURE, SELF_PLAY])
def test_the_base_model_samples_everything_if_it_is_told_to(plan: TicketPlan) -> None:
    plan = dataclasses.replace(plan, from_base=True, lag=2)
    assert {plan.ticket(round_, 0, DIGEST).version for round_ in range(8)} == {0}
    assert [version for version in range(8) if plan.is_sampled_with(version)] == [0]
    assert [plan.kept_versions(round_) for round_ in range(4)] == [[0], [0, 1], [0, 2], [0, 3]]


def test_whose_weights_sample_changes_neither_prompts_nor_seeds() -> None:
    ours, theirs = MIXTURE.round(7, DIGEST), dataclasses.replace(MIXTURE, from_base=True).round(7, DIGEST)
    assert [dataclasses.replace(ticket, version=6) for ticket in theirs] == ours


def test_without_self_play_there_is_one_iteration() -> None:
    assert {PLAN.iteration_of(round_) for round_ in range(9)} == {0}


@given(mixtures | self_plays)
def test_a_version_is_kept_from_its_publication_until_the_last_round_that_is_sampled_with_it(plan: TicketPlan) -> None:
    for round_ in range(16):
        version = plan.version_of(round_)
        assert version <= round_
        assert all(version in plan.kept_versions(now) for now in range(version, round_ + 1))


@given(mixtures | self_plays)
def test_no_more_versions_are_kept_than_the_lag_or_the_opponent_need(plan: TicketPlan) -> None:
    for round_ in range(16):
        kept = plan.kept_versions(round_)
        assert kept == sorted(set(kept))
        assert kept[-1] == round_
        assert len(kept) <= (2 if plan.iteration_starts else plan.lag + 1)


def test_kept_versions_are_those_of_the_lag_or_the_opponent_and_the_newest() -> None:
    lagging = dataclasses.replace(PLAN, lag=2)
    assert [lagging.kept_versions(round_) for round_ in range(4)] == [[0], [0, 1], [0, 1, 2], [1, 2, 3]]
    assert [SELF_PLAY.kept_versions(round_) for round_ in range(6)] == [[0], [0, 1], [2], [2, 3], [2, 4], [5]]


@given(self_plays, st.integers(0, 12))
def test_a_version_is_sampled_with_if_some_round_says_so(plan: TicketPlan, version: int) -> None:
    assert plan.is_sampled_with(version) == (version in {plan.version_of(round_) for round_ in range(20)})


@given(mixtures, st.integers(0, 12))
def test_without_self_play_every_version_is_sampled_with(plan: TicketPlan, version: int) -> None:
    assert plan.is_sampled_with(version)


def test_a_rows_seeds_are_the_same_within_an_iteration_and_other_ones_in_the_next() -> None:
    """An opponent's images are thus the same whenever their photograph comes again."""
    seeds = defaultdict(set)
    plan = dataclasses.replace(SELF_PLAY, num_groups=40, iteration_starts=(0, 10, 20))
    for round_ in range(30):
        for ticket in plan.round(round_, DIGEST):
            seeds[plan.iteration_of(round_), ticket.source, ticket.row].add(ticket.seeds_G)
    assert {len(found) for found in seeds.values()} == {1}
    assert len(seeds) == 3 * (5 + 3 + 5)
    every = [seed for (seeds_G,) in seeds.values() for seed in seeds_G]
    assert len(set(every)) == len(every)
