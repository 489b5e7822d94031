"""Parity is judged in the unit of the window, and what is not a number never passes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from learner import parity
from protocol.errors import TrainingError
from protocol.recipe import Recipe
from protocol.recipe_file import parse_recipe


def recipe(*, parity_tolerance: float | None = None, **algorithm: Any) -> Recipe:
    """A small recipe, PRDP's unless another algorithm is given."""
    settings = algorithm if "name" in algorithm else {"name": "prdp", "kl_weight": 1.0, "clip_eps": 1e-3, **algorithm}
    document = {
        "rounds": 1,
        "prompts": {"train": "prompts.txt"},
        "batch": {"num_groups": 2, "group_size": 2},
        "rewards": [{"name": "digit_alignment"}],
        "algorithm": settings,
        "learner": {"parity_tolerance": parity_tolerance},
    }
    return parse_recipe(document, source="a test")


def test_the_tolerance_is_a_tenth_of_the_window() -> None:
    assert parity.tolerance(recipe(), num_latent_entries=256) == pytest.approx(1e-4)


def test_windows_of_equal_width_in_other_reductions_have_equal_tolerances() -> None:
    in_means = parity.tolerance(recipe(clip_eps=1e-3, latent_reduce="latent_mean"), 256)
    in_sums = parity.tolerance(recipe(clip_eps=256e-3, latent_reduce="latent_sum"), 256)
    assert in_means == pytest.approx(in_sums)


@pytest.mark.parametrize("name", ["policy_gradient", "ddpo"])
def test_a_window_on_ratios_is_one_on_their_logarithms(name: str) -> None:
    """Where the policy gradient's ratios are close to 1, its window and PRDP's of the same width are the same."""
    for latent_reduce, clip_range in (("latent_mean", 1e-3), ("latent_sum", 256e-3)):
        found = parity.tolerance(recipe(name=name, clip_range=clip_range, latent_reduce=latent_reduce), 256)
        assert found == pytest.approx(parity.tolerance(recipe(clip_eps=1e-3), 256))
    assert parity.tolerance(recipe(name=name, clip_range=None), 256) == parity.TOLERANCE_WITHOUT_WINDOW


@pytest.mark.parametrize("clip_eps", [None, 0.0])
@pytest.mark.parametrize("latent_reduce", ["latent_mean", "latent_sum"])
def test_without_a_window_the_tolerance_is_a_fixed_one(clip_eps: float | None, latent_reduce: str) -> None:
    found = parity.tolerance(recipe(clip_eps=clip_eps, latent_reduce=latent_reduce), 256)
    assert found == parity.TOLERANCE_WITHOUT_WINDOW


def test_the_recipes_own_tolerance_goes_before_all() -> None:
    assert parity.tolerance(recipe(parity_tolerance=0.5), 256) == 0.5
    assert parity.tolerance(recipe(parity_tolerance=0.5, clip_eps=None), 256) == 0.5


@pytest.mark.parametrize("gap", [0.0, 1e-9, 1e-4])
def test_a_gap_up_to_the_limit_passes(gap: float) -> None:
    parity.check(gap, 1e-4, round_=3, workers="rollout-0@host")
    parity.check_start(gap, 1e-4)


@pytest.mark.parametrize("gap", [1.001e-4, 1.0, math.inf, math.nan])
def test_a_larger_gap_stops_the_run_and_names_round_workers_and_remedy(gap: float) -> None:
    with pytest.raises(TrainingError) as error:
        parity.check(gap, 1e-4, round_=3, workers="rollout-0@host")
    for said in ("round 3", "rollout-0@host", f"{gap:.3g}", "0.0001", "precision", "clip_eps", "clip_range"):
        assert said in str(error.value)


@pytest.mark.parametrize("gap", [1.001e-4, math.inf, math.nan])
def test_a_policy_that_does_not_start_at_its_reference_stops_the_run(gap: float) -> None:
    with pytest.raises(TrainingError, match="policy and reference disagree"):
        parity.check_start(gap, 1e-4)
