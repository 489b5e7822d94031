"""Which siblings are learnt from: B9, B12."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.selection import (
    ChosenPairs,
    best_of_n,
    make_pairs,
    random_selection,
    selection_metrics,
)
from protocol.algorithms import Pairs
from tests.learner.toy_denoisers import tensor

RULES = ("best_worst", "all_pairs", "threshold")
groups = st.integers(2, 5).flatmap(
    lambda num_siblings: st.lists(
        st.lists(st.integers(-3, 3), min_size=num_siblings, max_size=num_siblings), min_size=1, max_size=3
    )
)
"""Groups with many ties."""


def rows(pairs: ChosenPairs) -> list[tuple[int, int, int, float]]:
    """(group, winner, loser, weight) of each pair."""
    columns = (pairs.group_Q, pairs.winner_Q, pairs.loser_Q, pairs.weight_Q)
    return list(zip(*(column.tolist() for column in columns), strict=True))


# B12: pairs.


def test_best_worst_pairs_the_best_sibling_with_the_worst() -> None:
    pairs = make_pairs(tensor([[0.2, 0.9, -1.0, 0.5], [3, 1, 2, 2.5]]), Pairs(rule="best_worst"))
    assert rows(pairs) == [(0, 1, 2, 1.0), (1, 0, 1, 1.0)]
    assert (pairs.num_tied, pairs.num_below_threshold, pairs.num_units) == (0, 0, 2)


def test_best_worst_breaks_ties_towards_the_smallest_sibling_number() -> None:
    assert rows(make_pairs(tensor([[0, 1, 1, 0]]), Pairs(rule="best_worst"))) == [(0, 1, 0, 1.0)]


def test_all_pairs_weighs_every_group_alike() -> None:
    pairs = make_pairs(tensor([[1, 0, 0], [0, 1, 2]]), Pairs(rule="all_pairs"))
    third = 1 / 3
    assert rows(pairs) == [(0, 0, 1, 0.5), (0, 0, 2, 0.5), (1, 1, 0, third), (1, 2, 0, third), (1, 2, 1, third)]
    assert (pairs.num_tied, pairs.num_below_threshold, pairs.num_units) == (1, 0, 2)


def test_threshold_takes_differences_above_it_and_counts_the_others_apart() -> None:
    pairs = make_pairs(tensor([[0, 0.5, 1, 0]]), Pairs(rule="threshold", threshold=0.5))
    assert rows(pairs) == [(0, 2, 0, 1.0), (0, 2, 3, 1.0)]
    assert (pairs.num_tied, pairs.num_below_threshold, pairs.num_units) == (1, 3, 2)


@pytest.mark.parametrize("rule", RULES)
def test_two_siblings_make_one_pair(rule: str) -> None:
    assert rows(make_pairs(tensor([[0.1, 0.7]]), Pairs(rule=rule))) == [(0, 1, 0, 1.0)]


@pytest.mark.parametrize("rule", RULES)
def test_two_siblings_of_one_reward_make_no_pair_but_a_tie(rule: str) -> None:
    pairs = make_pairs(torch.full((1, 2), 0.3), Pairs(rule=rule))
    assert rows(pairs) == []
    assert (pairs.num_tied, pairs.num_below_threshold, pairs.num_units) == (1, 0, 0)


@pytest.mark.parametrize("rule", RULES)
def test_a_rank_without_groups_has_no_pairs(rule: str) -> None:
    pairs = make_pairs(torch.zeros(0, 4), Pairs(rule=rule))
    assert rows(pairs) == []
    assert pairs.group_Q.dtype == pairs.winner_Q.dtype == pairs.loser_Q.dtype == torch.long


@given(groups, st.sampled_from(RULES), st.integers(0, 3))
def test_every_candidate_is_a_pair_in_the_right_order_or_a_tie_or_below_the_threshold(
    rewards: list[list[int]], rule: str, threshold: int
) -> None:
    threshold = threshold if rule == "threshold" else 0
    reward_PG, settings = tensor(rewards), Pairs(rule=rule, threshold=threshold)
    pairs = make_pairs(reward_PG, settings)
    gain_Q = reward_PG[pairs.group_Q, pairs.winner_Q] - reward_PG[pairs.group_Q, pairs.loser_Q]
    assert (gain_Q > threshold).all()
    num_siblings = reward_PG.shape[1]
    num_candidates = len(rewards) * (1 if rule == "best_worst" else math.comb(num_siblings, 2))
    assert len(gain_Q) + pairs.num_tied + pairs.num_below_threshold == num_candidates
    differences = [abs(a - b) for row in rewards for a, b in itertools.combinations(row, 2)]
    if rule == "best_worst":
        differences = [max(row) - min(row) for row in rewards]
    assert pairs.num_tied == differences.count(0)
    if rule == "all_pairs":
        total_P = torch.zeros(len(rewards), dtype=torch.float64).index_add(0, pairs.group_Q, pairs.weight_Q)
        expected_P = tensor([float(max(row) > min(row)) for row in rewards])
        torch.testing.assert_close(total_P, expected_P)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_reward_is_refused(value: float) -> None:
    reward_PG = tensor([[0.1, value, 0.3]])
    for rule in RULES:
        with pytest.raises(ValueError, match="non-finite reward"):
            make_pairs(reward_PG, Pairs(rule=rule))
    with pytest.raises(ValueError, match="non-finite reward"):
        best_of_n(reward_PG)


def test_one_sibling_makes_no_pair_but_is_the_best_of_one() -> None:
    with pytest.raises(ValueError, match="at least 2 siblings, these have 1"):
        make_pairs(torch.zeros(3, 1), Pairs())
    assert best_of_n(torch.zeros(3, 1)).tolist() == [0, 0, 0]


def test_rewards_that_are_not_in_groups_are_refused() -> None:
    for reward in (torch.zeros(3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="groups of siblings"):
            best_of_n(reward)


# B9: best of n and its control.


@pytest.mark.parametrize(("num_siblings", "expected"), [(2, 0.564), (3, 0.846), (8, 1.424)])
def test_the_best_of_n_normal_rewards_is_as_many_standard_deviations_up_as_known(
    num_siblings: int, expected: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    reward_PG = 5 + 2 * torch.randn(40_000, num_siblings, generator=generator, dtype=torch.float64)
    best_P = reward_PG.gather(1, best_of_n(reward_PG)[:, None])[:, 0]
    assert abs((best_P.mean().item() - 5) / 2 - expected) < 4 * best_P.std().item() / 2 / 200 + 5e-4
    total, count = selection_metrics(reward_PG, best_of_n(reward_PG))["select/gap"]
    assert (total / count / 2).item() == pytest.approx(expected, abs=0.02)


def test_random_selection_ignores_rewards_and_is_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    reward_PG = torch.randn(40_000, 5, generator=generator, dtype=torch.float64)
    chosen_P = random_selection(torch.rand(40_000, generator=generator), 5)
    counts = chosen_P.bincount(minlength=5)
    assert ((counts - 8000).abs() < 4 * (40_000 * 0.2 * 0.8) ** 0.5).all()
    total, count = selection_metrics(reward_PG, chosen_P)["select/gap"]
    assert abs(total / count) < 4 * 0.8**0.5 / 200


def test_of_equally_good_siblings_the_smallest_number_is_chosen() -> None:
    assert best_of_n(tensor([[0, 2, 2], [1, 1, 1], [0, 1, 5]])).tolist() == [1, 0, 2]


def test_draws_map_onto_siblings_in_order() -> None:
    assert random_selection(tensor([0, 0.3333, 0.3334, 0.6667]), 3).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_draw_is_the_last_sibling_however_many_there_are(dtype: torch.dtype) -> None:
    largest_1 = 1 - torch.full((1,), torch.finfo(dtype).eps / 2, dtype=dtype)
    assert [random_selection(largest_1, number).item() for number in range(1, 100)] == list(range(99))


@pytest.mark.parametrize("draw", [-0.1, 1.0, math.nan])
def test_a_draw_outside_the_unit_interval_is_refused(draw: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        random_selection(tensor([0.5, draw]), 3)


def test_the_gap_is_the_chosen_reward_minus_its_groups_mean() -> None:
    metrics = selection_metrics(tensor([[1, 2, 6], [0, 0, 0]]), torch.tensor([2, 1]))
    assert metrics["select/gap"].tolist() == [3, 2]
