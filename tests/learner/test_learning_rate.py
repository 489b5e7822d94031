"""The learning rate of a step is a function of its place in the run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.learning_rate import learning_rate
from protocol.recipe import Recipe
from protocol.recipe_file import parse_recipe

PEAK = 1e-3
counts = st.integers(1, 6)


def recipe(rounds: int = 4, steps: tuple[int, int] = (2, 2), **learner: Any) -> Recipe:
    """A recipe of so many passes and so many optimizer steps a pass."""
    updates = {"num_updates": steps[0], "inner_minibatches": steps[1]}
    document = {
        "rounds": rounds,
        "data": [{"path": "photos"}],
        "batch": {"num_groups": 60, "group_size": 1},
        "algorithm": {"name": "sft", **updates},
        "learner": {"learning_rate": PEAK, **learner},
    }
    return parse_recipe(document, source="a test")


def self_play(iterations: list[dict[str, Any]], **learner: Any) -> Recipe:
    """A recipe of iterations, with two optimizer steps a round."""
    document = {
        "rounds": sum(iteration["rounds"] for iteration in iterations),
        "data": [{"path": "photos"}],
        "batch": {"num_groups": 4, "group_size": 1},
        "algorithm": {
            "name": "spin",
            "iterations": [{"beta_half": 1.0, **iteration} for iteration in iterations],
            "num_updates": 2,
        },
        "learner": {"learning_rate": PEAK, **learner},
    }
    return parse_recipe(document, source="a test")


def rates(recipe: Recipe) -> list[float]:
    """The rates of all steps of a run, in order."""
    per_round = recipe.algorithm.num_steps_per_round
    return [learning_rate(recipe, round_, step) for round_ in range(recipe.rounds) for step in range(per_round)]


def test_a_constant_rate_is_the_recipes() -> None:
    assert rates(recipe()) == [PEAK] * 16


def test_a_warm_up_rises_by_equal_parts_and_ends_at_the_peak() -> None:
    found = rates(recipe(warmup_steps=5))
    assert found[:5] == pytest.approx([PEAK * step / 5 for step in (1, 2, 3, 4, 5)])
    assert found[4:] == [PEAK] * 12


def test_a_linear_decay_falls_by_equal_parts_and_would_be_0_one_step_later() -> None:
    assert rates(recipe(decay="linear")) == pytest.approx([PEAK * (16 - step) / 16 for step in range(16)])


def test_the_decay_begins_at_the_peak_where_the_warm_up_ends() -> None:
    found = rates(recipe(warmup_steps=6, decay="linear"))
    assert found[:6] == rates(recipe(warmup_steps=6))[:6]
    assert found[6:] == pytest.approx([PEAK * left / 10 for left in range(10, 0, -1)])


@given(counts, st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3])), st.integers(0, 80))
def test_no_step_is_without_a_rate_or_above_the_peak(rounds: int, steps: tuple[int, int], warmup_steps: int) -> None:
    """Whatever the warm-up: one that outlasts the run never reaches the peak."""
    found = rates(recipe(rounds, steps, warmup_steps=warmup_steps, decay="linear"))
    assert all(0 < rate <= PEAK * (1 + 1e-12) for rate in found)
    top = found.index(max(found))
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)


@given(counts, st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3])))
def test_only_the_number_of_a_step_in_the_run_counts(rounds: int, steps: tuple[int, int]) -> None:
    """However its steps are dealt to rounds and passes."""
    num_steps = rounds * steps[0] * steps[1]
    schedule = {"warmup_steps": 3, "decay": "linear"}
    one_a_round = recipe(num_steps, (1, 1), **schedule)
    assert rates(recipe(rounds, steps, **schedule)) == rates(one_a_round)


def test_without_a_decay_a_longer_run_begins_with_the_rates_of_a_shorter_one() -> None:
    """So that a run may be resumed for more rounds; the identity of one with a decay has its rounds."""
    assert rates(recipe(9, warmup_steps=5))[:16] == rates(recipe(4, warmup_steps=5))
    assert rates(recipe(9, decay="linear"))[:16] != rates(recipe(4, decay="linear"))


@pytest.mark.parametrize(
    "learner", [{}, {"warmup_steps": 3}, {"decay": "linear"}, {"warmup_steps": 3, "decay": "linear"}]
)
def test_each_iteration_of_self_play_has_the_rates_of_a_run_of_its_own(learner: dict[str, Any]) -> None:
    iterations: list[dict[str, Any]] = [
        {"rounds": 2},
        {"rounds": 3, "learning_rate": 5e-4},
        {"rounds": 1, "learning_rate": 2e-3},
    ]
    alone = [
        rates(recipe(part["rounds"], (2, 1), **{**learner, "learning_rate": part.get("learning_rate", PEAK)}))
        for part in iterations
    ]
    assert rates(self_play(iterations, **learner)) == [rate for part in alone for rate in part]
