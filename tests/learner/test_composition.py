"""How rewards add up: whatever the ranks and whatever came first, a round's sum is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from learner.collect import Collected
from learner.composition import Composition
from learner.receipts import receipt_of
from protocol.groups import Group
from protocol.roles import Reward

Parts = dict[str, Sequence[float] | Sequence[Sequence[float]]]
RED, NEW = Reward(name="red", weight=2.0), Reward(name="new", weight=-1.0, required=False)
RUNNING = Reward(name="red", normalise={"how": "running"})
FIXED = Reward(name="red", weight=0.5, normalise={"how": "fixed", "mean": 1.0, "std": 4.0})


@pytest.fixture
def collected(make_group: Callable[..., Group]) -> Callable[..., Collected]:
    """Returns groups of a round, each with these scores by label."""

    def make(*parts: Parts) -> Collected:
        groups = []
        for index, scores in enumerate(parts):
            arrays: dict[str, np.ndarray] = {"scored_T": np.ones(2, bool)}
            for label, values in scores.items():
                array = np.array(values, np.float32)
                arrays[f"reward_{label}_G" if array.ndim == 1 else f"state_reward_{label}_GM"] = array
            group = make_group(index=index)
            groups.append(dataclasses.replace(group, ticket_id=f"000000-{index:04d}", arrays=arrays))
        return Collected(groups, [receipt_of(group) for group in groups])

    return make


def alone(value: Any) -> list[Any]:
    """What the only rank of a gang gathers."""
    return [value]


def totals(part: Collected) -> list[list[float]]:
    return [group.array("reward_G").tolist() for group in part.groups]


def test_parts_are_weighted_and_added_up_and_kept(collected: Any) -> None:
    composition = Composition([RED, NEW], alone)
    composed = composition.compose(collected({"red": [1, 2], "new": [3, 5]}, {"red": [0, 1], "new": [1, 1]}))
    assert totals(composed) == [[-1, -1], [-1, 1]]
    assert composed.groups[0].array("reward_red_G").tolist() == [1, 2]
    assert composed.receipts[0].rewards == {"red": (1, 2), "new": (3, 5), "mean": (-1, -1)}
    assert composition.left_out == ()


def test_scores_of_states_add_up_state_by_state_and_are_reported_as_their_means(collected: Any) -> None:
    composed = Composition([RED], alone).compose(collected({"red": [[1, 2, 3], [4, 6, 8]]}))
    (group,) = composed.groups
    assert group.array("state_reward_GM").tolist() == [[2, 4, 6], [8, 12, 16]]
    assert group.array("reward_G").tolist() == [4, 12]
    assert composed.receipts[0].rewards == {"red": (2, 6), "mean": (4, 12)}


def test_an_optional_reward_that_fails_on_one_group_is_left_out_of_all(collected: Any) -> None:
    composition = Composition([RED, NEW], alone)
    composed = composition.compose(collected({"red": [1, 2], "new": [3, 5]}, {"red": [0, 1]}))
    assert totals(composed) == [[2, 4], [0, 2]]
    assert composition.left_out == ("new",)
    assert composed.receipts[0].rewards.keys() == {"red", "mean"}
    whole = composition.compose(collected({"red": [1, 2], "new": [3, 5]}))
    assert totals(whole) == [[-1, -1]], "the next round has it again"
    assert composition.left_out == ()


def test_what_failed_on_another_rank_is_left_out_on_this_one(collected: Any) -> None:
    other = ("000000-0009", ["red"], {})
    composition = Composition([RED, NEW], lambda own: [own, [other]])
    assert totals(composition.compose(collected({"red": [1, 2], "new": [3, 5]}))) == [[2, 4]]


def test_groups_that_nobody_scored_stay_as_they_are_and_count_as_nothing_missing(collected: Any) -> None:
    composition = Composition([RED, NEW], alone)
    composed = composition.compose(collected({}, {"red": [1, 2], "new": [3, 5]}))
    assert "reward_G" not in composed.groups[0].arrays
    assert composed.receipts[0].rewards == {}
    assert composition.left_out == ()


def test_a_fixed_normalisation_is_its_formula_and_reports_the_scores_as_they_were(collected: Any) -> None:
    composed = Composition([FIXED], alone).compose(collected({"red": [1, 9]}))
    assert totals(composed) == [[0, 1]]
    assert composed.receipts[0].rewards["red"] == (1, 9)


def test_a_running_normalisation_is_over_all_scores_so_far(collected: Any) -> None:
    composition = Composition([RUNNING], alone)
    rounds = [collected({"red": [1, 5]}, {"red": [2, 2]}), collected({"red": [7, -3]}, {"red": [0, 0.5]})]
    seen: list[float] = []
    for round_ in rounds:
        composed = composition.compose(round_)
        for group in round_.groups:
            seen += group.array("reward_red_G").tolist()
        for before, after in zip(round_.groups, composed.groups, strict=True):
            scores = before.array("reward_red_G").astype(np.float64)
            assert np.allclose(after.array("reward_G"), (scores - np.mean(seen)) / np.std(seen), rtol=1e-6)


def test_scores_that_are_all_equal_become_0_and_not_nan(collected: Any) -> None:
    assert totals(Composition([RUNNING], alone).compose(collected({"red": [3, 3]}))) == [[0, 0]]


def test_two_ranks_normalise_as_one_does_to_the_last_bit(collected: Any) -> None:
    generator = np.random.default_rng(0)
    parts = [{"red": generator.normal(100, 1e-3, 4).tolist()} for _ in range(6)]
    whole = collected(*parts)
    one = Composition([RUNNING], alone)
    expected = totals(one.compose(whole))
    halves = [Collected(whole.groups[rank::2], whole.receipts[rank::2]) for rank in range(2)]
    said = [Composition([RUNNING], alone)._say_all(half.groups) for half in halves]
    for rank, half in enumerate(halves):
        composition = Composition([RUNNING], lambda own: said)
        assert totals(composition.compose(half)) == expected[rank::2]
        assert composition.state() == one.state()


def test_a_resumed_composition_goes_on_as_if_it_had_never_stopped(collected: Any) -> None:
    first, second = collected({"red": [1, 5]}), collected({"red": [7, -3]})
    unbroken = Composition([RUNNING], alone)
    unbroken.compose(first)
    resumed = Composition([RUNNING], alone)
    resumed.load_state(unbroken.state())
    assert totals(resumed.compose(second)) == totals(unbroken.compose(second))


def test_a_round_whose_running_reward_is_left_out_does_not_move_its_mean(collected: Any) -> None:
    optional = Reward(name="new", required=False, normalise={"how": "running"})
    composition = Composition([RED, optional], alone)
    composition.compose(collected({"red": [1, 2], "new": [3, 5]}))
    before = composition.state()
    composition.compose(collected({"red": [1, 2], "new": [30, 50]}, {"red": [1, 2]}))
    assert composition.state() == before
