"""Settings that are more than a number: betas to be matched, steps to be taken again."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from protocol.algorithms import Cpo, Dpo, NcpCpo, NcpDpo, SharpeningRlhf, SharpeningSft
from protocol.errors import RecipeError
from protocol.paths import ROOT
from protocol.recipe import Recipe
from protocol.recipe_file import load_recipe


def test_a_beta_to_be_matched_has_no_number() -> None:
    assert NcpDpo(name="ncp_dpo", beta_full="match_dpo").beta is None
    assert NcpCpo(name="ncp_cpo", beta_full="match_dpo").beta is None


@pytest.mark.parametrize("name", ["ncp_dpo_sd15", "ncp_dpo_sdxl", "ncp_cpo_sd15"])
def test_published_recipes_have_the_control_of_equal_logits_by_one_key(name: str) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    algorithm = load_recipe(path, ["algorithm.beta_full=match_dpo"]).algorithm
    assert isinstance(algorithm, NcpDpo | NcpCpo)
    assert algorithm.beta is None
    assert load_recipe(path).algorithm == algorithm.model_copy(update={"beta_full": 2500.0})


def test_the_released_codes_recipes_drop_prompts_and_go_through_steps() -> None:
    for name in ("sharpening_sft", "sharpening_rlhf"):
        code, default = (load_recipe(ROOT / "recipes" / f"{name}{kind}_sdxl.yaml") for kind in ("_code", ""))
        for recipe_, expected in ((code, (0.2, True)), (default, (0.0, False))):
            assert isinstance(recipe_.algorithm, SharpeningSft | SharpeningRlhf)
            assert (recipe_.algorithm.prompt_dropout, recipe_.algorithm.backprop_through_steps) == expected


def test_betas_are_in_the_full_convention_wherever_they_stand() -> None:
    assert NcpDpo(name="ncp_dpo", beta_full=5.0).beta == Dpo(name="dpo", beta_full=5.0).beta == 5
    assert NcpDpo(name="ncp_dpo", beta_half=5.0).beta == Dpo(name="dpo", beta_half=5.0).beta == 2.5
    assert NcpCpo(name="ncp_cpo", beta_full=5.0).beta == Cpo(name="cpo", beta_full=5.0).beta == 5


@pytest.mark.parametrize("value", ["match_sft", -1, 0, float("inf"), float("nan"), [1]])
@pytest.mark.parametrize("name", ["ncp_dpo_sd15", "ncp_cpo_sd15"])
def test_a_beta_that_is_neither_a_number_nor_to_be_matched_is_refused_once(name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match="is neither a number above 0 nor match_dpo") as refusal:
        load_recipe(ROOT / "recipes" / f"{name}.yaml", [f"algorithm.beta_full={value}".replace("inf", ".inf")])
    assert str(refusal.value).count("beta_full") == 1


@pytest.mark.parametrize("settings", [{"name": "dpo"}, {"name": "cpo"}])
def test_methods_on_errors_in_noise_have_nothing_to_match(settings: dict[str, Any]) -> None:
    kind = Dpo if settings["name"] == "dpo" else Cpo
    with pytest.raises(ValidationError, match="valid number"):
        kind.model_validate({**settings, "beta_full": "match_dpo"})


def recipe(**settings: Any) -> dict[str, Any]:
    """A recipe of Diffusion-Sharpening."""
    return {
        "rounds": 2,
        "lag": settings.pop("lag", 0),
        "prompts": {"train": "prompts.txt"},
        "rewards": [{"name": "jpeg_compressibility"}],
        "batch": {"num_groups": 2, "group_size": 3},
        "algorithm": {"name": "sharpening_sft", "excursion": {"noise": "fresh"}, **settings},
    }


def test_steps_are_taken_again_by_the_very_weights_alone() -> None:
    """4.2: at lag 0 only; with constants for states one version may lie between."""
    assert Recipe.model_validate(recipe(backprop_through_steps=True)).algorithm.max_lag == 0
    assert Recipe.model_validate(recipe(lag=1)).algorithm.max_lag == 1
    with pytest.raises(ValidationError, match="means nothing on groups that old: use at most 0"):
        Recipe.model_validate(recipe(lag=1, backprop_through_steps=True))


def test_steps_with_noise_cannot_be_taken_again() -> None:
    noisy = {"noise": "fresh", "eta": 0.5}
    with pytest.raises(ValidationError, match=r"steps without noise, but excursion\.eta is 0\.5"):
        SharpeningSft.model_validate({"name": "sharpening_sft", "excursion": noisy, "backprop_through_steps": True})
