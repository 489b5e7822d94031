"""What could not learn is refused with the algorithm's name and what it needs; what is odd is only noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import run_command_line
from protocol.algorithms import ALGORITHMS, SourceKind
from protocol.errors import RecipeError
from protocol.recipe import Recipe
from protocol.recipe_file import parse_recipe
from protocol.requirements import KERNELS, check_model, is_sampled, needs_rewards, problems, warnings
from tests.protocol.model_files import add_empty_parts, write_model_files

PROMPTS: dict[str, Any] = {"train": "prompts.txt"}
IMAGES, PAIRS = {"path": "photos"}, {"path": "duels", "kind": "pairs"}
REWARDS = [{"name": "digit_alignment"}]
ITERATIONS = [{"rounds": 1}, {"rounds": 2}]
FRESH = {"noise": "fresh"}
SETTINGS: dict[str, dict[str, Any]] = {
    "prdp": {"kl_weight": 1.0, "clip_eps": 1.0},
    "policy_gradient": {"clip_range": 1.0},
    "ddpo": {},
    "spin_exact": {"iterations": ITERATIONS},
    "sft": {},
    "dpo": {"beta_full": 1.0},
    "cpo": {"beta_full": 1.0},
    "ncp_sft": {},
    "ncp_dpo": {"beta_full": 1.0},
    "ncp_cpo": {"beta_full": 1.0},
    "spin": {"iterations": [{"beta_half": 1.0, **iteration} for iteration in ITERATIONS]},
    "sharpening_sft": {"excursion": FRESH},
    "sharpening_rlhf": {"excursion": FRESH, "beta_full": 1.0},
}
"""The least that each algorithm must be given."""

LEARNS_FROM: dict[SourceKind, set[str]] = {
    "prompts": {*SETTINGS} - {"spin", "spin_exact"},
    "images": {"sft", "ncp_sft", "spin", "spin_exact", "sharpening_sft", "sharpening_rlhf"},
    "pairs": {"sft", "ncp_sft", "dpo", "ncp_dpo", "cpo", "ncp_cpo", "spin", "spin_exact"},
}
"""Which algorithms can learn from a source."""

SOURCES: dict[SourceKind, dict[str, Any]] = {
    "prompts": {"prompts": PROMPTS},
    "images": {"data": [IMAGES]},
    "pairs": {"data": [PAIRS]},
}
NOT_SCORED = {"sft", "ncp_sft", "dpo", "ncp_dpo", "cpo", "ncp_cpo", "spin", "spin_exact"}
"""Algorithms that need no reward where they learn from data alone."""

PLAYERS = ("spin", "spin_exact")
"""Algorithms that play against their own former weights."""


def document(name: str, **changes: Any) -> dict[str, Any]:
    """A recipe of an algorithm, without any source."""
    whole = {"rounds": 3, "batch": {"num_groups": 8, "group_size": 4}, "rewards": REWARDS}
    algorithm = {"name": name, **SETTINGS[name], **changes.pop("algorithm", {})}
    return {**whole, "algorithm": algorithm, **changes}


def recipe(name: str, source: SourceKind | None = None, **changes: Any) -> Recipe:
    """The same as a recipe, from the given source or the first that the algorithm can learn from."""
    first = next(kind for kind, names in LEARNS_FROM.items() if name in names)
    return parse_recipe({**document(name, **changes), **SOURCES[source or first]}, source="a test")


def refusal(whole: dict[str, Any]) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(RecipeError) as error:
        parse_recipe(whole, source="a test")
    (_, line) = str(error.value).splitlines()
    return line.removeprefix("  - ")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("source", SOURCES)
def test_each_algorithm_learns_from_the_sources_that_it_can_and_refuses_the_others(
    name: str, source: SourceKind
) -> None:
    whole = {**document(name), **SOURCES[source]}
    if name in LEARNS_FROM[source]:
        assert not list(problems(parse_recipe(whole, source="a test")))
        return
    told: dict[SourceKind, str] = {
        "prompts": "prompts.train",
        "images": "a dataset of images in data",
        "pairs": "a dataset of preference",
    }
    assert f"algorithm {name} cannot learn from {told[source]}" in refusal(whole)
    needed = refusal(whole).split("it needs ")[1]
    assert all((words in needed) == (name in LEARNS_FROM[kind]) for kind, words in told.items())


@pytest.mark.parametrize("name", SETTINGS)
def test_without_any_source_there_is_nothing_to_learn_from(name: str) -> None:
    assert f"there is nothing to learn from: algorithm {name} needs " in refusal(document(name))


def test_one_wrong_source_among_others_is_refused() -> None:
    whole = {**document("sft"), "prompts": PROMPTS, "data": [IMAGES, PAIRS]}
    assert parse_recipe(whole, source="a test").source_kinds == ("prompts", "images", "pairs")
    assert "dpo cannot learn from a dataset of images" in refusal(
        {**whole, "algorithm": {"name": "dpo", **SETTINGS["dpo"]}}
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("source", SOURCES)
def test_rewards_are_needed_where_something_is_learnt_by_them(name: str, source: SourceKind) -> None:
    if name not in LEARNS_FROM[source]:
        return
    whole = {**document(name, rewards=[]), **SOURCES[source]}
    if source != "prompts" and name in NOT_SCORED:
        assert not needs_rewards(parse_recipe(whole, source="a test"))
        return
    assert needs_rewards(recipe(name, source))
    assert refusal(whole) == f"rewards: algorithm {name} learns from rewards, so that at least one is needed."


@pytest.mark.parametrize("name", SETTINGS)
def test_who_compares_siblings_needs_two_of_them(name: str) -> None:
    alone = {"num_groups": 8, "group_size": 1}
    if name in ("prdp", "policy_gradient", "dpo", "cpo", "ncp_dpo", "ncp_cpo", "sharpening_rlhf"):
        assert refusal({**document(name, batch=alone), "prompts": PROMPTS}) == (
            f"batch.group_size: 1; {name} compares siblings and needs at least 2."
        )
    else:
        assert recipe(name, batch=alone).batch.group_size == 1


@pytest.mark.parametrize("name", ["dpo", "cpo", "ncp_dpo", "ncp_cpo"])
def test_a_datasets_pairs_need_no_siblings(name: str) -> None:
    assert recipe(name, "pairs", batch={"num_groups": 8, "group_size": 1}).batch.group_size == 1


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loss_that_means_nothing_on_old_groups_limits_the_lag(name: str) -> None:
    at_most_one = ("policy_gradient", "ddpo", "sharpening_sft", "sharpening_rlhf")
    assert recipe(name, lag=1).lag == 1
    if name in at_most_one:
        assert refusal({**document(name, lag=2), "prompts": PROMPTS}) == (
            f"lag: 2; the loss of {name} means nothing on groups that old: use at most 1."
        )
    else:
        assert recipe(name, lag=2).lag == 2


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("sampler", [{"eta": 0.0}, {"num_steps": 1}], ids=str)
def test_who_learns_from_densities_needs_a_step_that_has_one(name: str, sampler: dict[str, Any]) -> None:
    if name in ("prdp", "policy_gradient", "ddpo", "spin_exact"):
        source = SOURCES["images" if name == "spin_exact" else "prompts"]
        told = refusal({**document(name, sampler=sampler), **source})
        assert "leaves no step with a density" in told
        assert f"{name} needs a stochastic sampler: eta above 0 and at least 2 steps" in told
    else:
        assert recipe(name, sampler=sampler).sampler.num_scored_steps == 0


@pytest.mark.parametrize("name", ["spin", "spin_exact"])
@pytest.mark.parametrize("rounds", [2, 4])
def test_the_rounds_of_iterations_add_up_to_the_runs(name: str, rounds: int) -> None:
    assert [iteration.rounds for iteration in recipe(name).iterations] == [1, 2]
    told = refusal({**document(name, rounds=rounds), **SOURCES["images"]})
    assert told == f"rounds: {rounds}, but the iterations of algorithm.iterations have 3 in all."


@pytest.mark.parametrize("name", ["sharpening_sft", "sharpening_rlhf"])
def test_candidates_of_one_photograph_must_differ_and_be_told_apart(name: str) -> None:
    told = refusal({**document(name, algorithm={"select_on": "final_x0"}), **SOURCES["images"]})
    assert told.startswith("algorithm.select_on: final_x0 gives all candidates of one dataset image the same score;")
    for noise in ("shared", "coupled"):
        told = refusal({**document(name, algorithm={"excursion": {"noise": noise}}), **SOURCES["images"]})
        assert told.startswith(
            f"algorithm.excursion.noise: {noise}, but candidates of one dataset image differ only by"
        )
        assert told.endswith("use fresh.")
    for changes in ({"select_on": "final_x0"}, {"excursion": {"noise": "shared"}}, {"excursion": {"noise": "coupled"}}):
        assert recipe(name, "prompts", algorithm=changes).algorithm.name == name


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_perceptual_errors_are_refused_in_half_precision(name: str, precision: str) -> None:
    half = {"precision": precision}
    if name.startswith("ncp_"):
        told = refusal({**document(name, learner=half), "prompts": PROMPTS})
        assert told.startswith(f"learner.precision: {precision}; {name} resolves differences of 1e-3 in a latent")
        assert told.endswith("use fp32.")
    else:
        assert recipe(name, learner=half).learner.precision == precision


def test_an_encoder_of_the_average_needs_an_average() -> None:
    perception = {"perception": {"encoder_weights": "ema"}}
    told = refusal({**document("ncp_sft", algorithm=perception), "prompts": PROMPTS})
    assert "no average is kept; set learner.ema" in told
    assert recipe("ncp_sft", algorithm=perception, learner={"ema": {}}).learner.ema.decay == 0.999


@pytest.mark.parametrize("name", SETTINGS)
def test_the_base_model_cannot_sample_for_who_needs_samples_of_its_own(name: str) -> None:
    if name in ("prdp", "sft", "ncp_sft", "dpo", "ncp_dpo", "cpo", "ncp_cpo"):
        assert recipe(name, behaviour="base").behaviour == "base"
        return
    told = refusal({**document(name, behaviour="base"), **SOURCES["prompts" if name not in PLAYERS else "images"]})
    assert told == f"behaviour: base, but {name} needs samples of the weights that it trains."


def in_company(name: str, *others: str, source: SourceKind = "prompts", **changes: Any) -> dict[str, Any]:
    """A recipe whose groups other algorithms learn from as well, under their own names."""
    followers = [{"name": other, "algorithm": {"name": other, **SETTINGS[other]}} for other in others]
    return {**document(name, followers=followers, **changes), **SOURCES[source]}


@pytest.mark.parametrize(("first", "other"), [("prdp", "dpo"), ("dpo", "prdp"), ("policy_gradient", "ncp_sft")])
def test_who_learns_from_other_weights_samples_may_follow(first: str, other: str) -> None:
    both = parse_recipe(in_company(first, other), source="a test")
    assert [algorithm.name for algorithm in both.algorithms] == [first, other]
    assert both.of_follower(other).algorithm.name == other


@pytest.mark.parametrize(("first", "other"), [("sharpening_sft", "sft"), ("sft", "sharpening_sft")])
def test_groups_are_images_or_excursions_but_not_both(first: str, other: str) -> None:
    told = refusal(in_company(first, other))
    assert told.endswith(f"{other} and {first} would need groups of two kinds; excursions must be the same.")


def test_excursions_are_shared_if_they_are_the_same() -> None:
    whole = in_company("sharpening_sft", "sharpening_rlhf")
    assert len(parse_recipe(whole, source="a test").algorithms) == 2
    whole["followers"][0]["algorithm"]["excursion"] = {"noise": "shared"}
    assert refusal(whole) == (
        "followers, sharpening_rlhf: sharpening_rlhf and sharpening_sft would need groups of two kinds; excursions "
        "must be the same."
    )


@pytest.mark.parametrize("name", ["policy_gradient", "ddpo"])
def test_who_needs_samples_of_its_own_cannot_follow(name: str) -> None:
    assert refusal(in_company("prdp", name)) == (
        f"followers, {name}: {name} is on-policy, but its groups are sampled with the first learner's weights."
    )


@pytest.mark.parametrize("name", PLAYERS)
def test_who_plays_against_itself_cannot_follow(name: str) -> None:
    told = refusal(in_company("sft", name, source="images"))
    assert told.startswith(f"followers, {name}: {name} needs its own opponent's images")


def test_a_followers_own_problems_are_told_under_its_name() -> None:
    assert refusal(in_company("sft", "dpo", batch={"num_groups": 8, "group_size": 1})) == (
        "followers, dpo: batch.group_size: 1; dpo compares siblings and needs at least 2."
    )
    assert refusal(in_company("sft", "dpo", source="images")).startswith("followers, dpo: algorithm dpo cannot learn")


def test_followers_have_names_of_their_own() -> None:
    assert refusal(in_company("prdp", "sft", "dpo", "sft")) == "followers: two have one name: dpo, sft, sft."


def test_a_follower_cannot_go_back_to_states_that_others_have_visited() -> None:
    through = {"name": "sharpening_sft", "excursion": {**FRESH, "eta": 0.0}, "backprop_through_steps": True}
    first = document("sharpening_sft", prompts=PROMPTS, algorithm={"excursion": through["excursion"]})
    told = refusal({**first, "followers": [{"name": "other", "algorithm": through}]})
    assert "what another learner's weights have visited cannot be visited again" in told


def test_learners_that_resume_together_keep_two_checkpoints() -> None:
    told = refusal(in_company("prdp", "dpo", checkpoints={"keep_last": 1}))
    assert told.startswith("checkpoints.keep_last: 1, but learners that resume together need 2")
    assert recipe("prdp", checkpoints={"keep_last": 1}).checkpoints.keep_last == 1


@pytest.mark.parametrize("name", SETTINGS)
def test_only_self_play_and_excursions_sample_for_a_datasets_rows(name: str) -> None:
    sampling = ("spin", "spin_exact", "sharpening_sft", "sharpening_rlhf")
    found = {kind: is_sampled(recipe(name, kind), kind) for kind in SOURCES if name in LEARNS_FROM[kind]}
    assert found == {kind: kind == "prompts" or name in sampling for kind in found}


@pytest.mark.parametrize(
    ("name", "odd", "usual", "told"),
    [
        ("cpo", {"sft_weight": 0}, {"sft_weight": 0.1}, "nothing bounds the loser's error"),
        ("ncp_cpo", {"sft_weight": 0}, {"sft_weight": 0.1}, "nothing bounds the loser's error"),
        (
            "spin_exact",
            {"spin_lambda": 0.49},
            {"spin_lambda": 0.5},
            "spin_lambda is 0.49: below 1/2 iterations diverge",
        ),
    ],
)
def test_odd_settings_of_an_algorithm_are_noted(
    name: str, odd: dict[str, Any], usual: dict[str, Any], told: str
) -> None:
    (warning,) = warnings(recipe(name, algorithm=odd))
    assert told in warning
    assert warnings(recipe(name, algorithm=usual)) == []


def test_selecting_among_one_is_noted() -> None:
    (warning,) = warnings(recipe("sharpening_sft", batch={"num_groups": 8, "group_size": 1}))
    assert "sharpening_sft is then plain regression, with nothing to select" in warning
    assert warnings(recipe("sharpening_sft", batch={"num_groups": 8, "group_size": 2})) == []


def test_a_warm_up_that_outlasts_an_iteration_is_noted() -> None:
    """The shorter one has a round, of two passes of two optimizer steps."""
    steps = {"num_updates": 2, "inner_minibatches": 2}
    assert warnings(recipe("spin", algorithm=steps, learner={"warmup_steps": 4})) == []
    (warning,) = warnings(recipe("spin", algorithm=steps, learner={"warmup_steps": 5}))
    assert "learner.warmup_steps outlasts an iteration" in warning
    assert warnings(recipe("sft", learner={"warmup_steps": 500})) == []


FIREWALL = {"rewards": [{"name": "image_diversity"}]}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"firewall": FIREWALL, "prompts": {}, "data": [IMAGES], "algorithm": {"name": "sft"}, "rewards": []},
            "rewards",
        ),
        ({"firewall": FIREWALL, "behaviour": "base", "algorithm": {"name": "dpo", "beta_full": 1}}, "behaviour: base"),
        ({"firewall": {"rewards": [{"name": "image_diversity", "weight": 2}]}}, "has a weight or is normalised"),
        ({"rewards": [*REWARDS, {"name": "ocr", "required": False}], "algorithm": {"name": "ddpo"}}, "ocr may be left"),
        ({"rewards": [{"name": "ocr", "timeout_s": 600}]}, "stall_timeout_s.*ocr may take 3 times 600 s"),
        ({"rewards": [{"name": "ocr", "required": False}]}, "all that count are optional"),
        ({"rewards": [{"name": "ocr"}, {"name": "ocr"}]}, "two rewards are called ocr.*`called`"),
        ({"firewall": {"rewards": [{"name": "x.py:trained"}]}}, "trained is a name that metrics use"),
        ({"rewards": [{"name": "./x.py:"}]}, "names nothing"),
    ],
)
def test_rewards_that_could_not_do_their_part_are_refused(changes: dict[str, Any], told: str) -> None:
    whole = document("prdp", prompts=PROMPTS) | changes
    with pytest.raises(RecipeError, match=told):
        parse_recipe(whole, source="test")


def test_a_firewall_that_compares_nothing_is_noted() -> None:
    recipe = parse_recipe(document("prdp", prompts=PROMPTS, firewall={**FIREWALL, "every_rounds": 3}), source="test")
    assert any("nothing is ever compared" in note for note in warnings(recipe))


# Base models: algorithm x what the network predicts, and kernel x what the network predicts.

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
ALGORITHMS_BY_PREDICTION = """
                  epsilon v_prediction sample flow
prdp              yes     yes          yes    yes
policy_gradient   yes     yes          yes    yes
ddpo              yes     yes          yes    yes
spin_exact        yes     yes          yes    yes
sft               yes     yes          yes    yes
dpo               yes     yes          yes    yes
cpo               yes     yes          yes    yes
ncp_sft           yes     yes          yes    no
ncp_dpo           yes     yes          yes    no
ncp_cpo           yes     yes          yes    no
spin              yes     yes          yes    yes
sharpening_sft    yes     yes          yes    yes
sharpening_rlhf   yes     yes          yes    yes
"""
KERNELS_BY_PREDICTION = """
                  epsilon v_prediction sample flow
ddim              yes     yes          yes    no
ddpm              yes     yes          yes    no
flow_grpo         no      no           no     yes
dance_grpo        no      no           no     yes
"""


def cells(table: str) -> dict[tuple[str, str], bool]:
    """A table's entries by row and column."""
    head, *rows = [line.split() for line in table.strip().splitlines()]
    return {(row[0], column): word == "yes" for row in rows for column, word in zip(head, row[1:], strict=True)}


BY_ALGORITHM, BY_KERNEL = cells(ALGORITHMS_BY_PREDICTION), cells(KERNELS_BY_PREDICTION)


def for_model(name: str, prediction: str, **sampler: Any) -> Recipe:
    """A recipe whose kernel fits what a model predicts, unless it says otherwise."""
    return recipe(name, sampler={"kernel": "flow_grpo" if prediction == "flow" else "ddim", **sampler})


def test_the_tables_are_whole() -> None:
    assert {row for row, _ in BY_ALGORITHM} == {*SETTINGS} == {*ALGORITHMS}
    assert {row for row, _ in BY_KERNEL} == {*KERNELS}
    assert {column for table in (BY_ALGORITHM, BY_KERNEL) for _, column in table} == {*PREDICTIONS}


@pytest.mark.parametrize(("name", "prediction"), BY_ALGORITHM)
def test_each_algorithm_trains_the_models_that_it_can_and_refuses_the_others_with_who_could(
    name: str, prediction: str
) -> None:
    asked = for_model(name, prediction)
    if BY_ALGORITHM[name, prediction]:
        check_model(asked, prediction)
        return
    with pytest.raises(RecipeError) as error:
        check_model(asked, prediction)
    told = str(error.value)
    assert f"algorithm {name} cannot train a model that predicts {prediction}" in told
    able = [other for other in ALGORITHMS if BY_ALGORITHM[other, prediction]]
    assert told.endswith(f"one of these algorithms: {', '.join(able)}.")
    fitting = [other for other in PREDICTIONS if BY_ALGORITHM[name, other]]
    assert f"Expected: a model that predicts {' or '.join(fitting)}." in told


@pytest.mark.parametrize(("kernel", "prediction"), BY_KERNEL)
def test_each_kernel_steps_the_models_that_it_is_for_and_is_refused_with_those_that_fit(
    kernel: str, prediction: str
) -> None:
    asked = for_model("sft", prediction, kernel=kernel)
    if BY_KERNEL[kernel, prediction]:
        check_model(asked, prediction)
        return
    fitting = " or ".join(other for other in KERNELS if BY_KERNEL[other, prediction])
    with pytest.raises(RecipeError, match=f"predicts {prediction}. Got: '{kernel}'. Expected: {fitting}. To do"):
        check_model(asked, prediction)


def test_a_followers_algorithm_must_be_able_too() -> None:
    both = parse_recipe(in_company("sft", "ncp_sft", sampler={"kernel": "flow_grpo"}), source="a test")
    with pytest.raises(RecipeError, match="algorithm ncp_sft cannot train a model that predicts flow"):
        check_model(both, "flow")


def test_what_is_predicted_must_be_known() -> None:
    with pytest.raises(RecipeError, match=r"something unknown. Got: 'score'. Expected: one of epsilon, v_prediction"):
        check_model(recipe("sft"), "score")


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if BY_KERNEL[kernel, "flow"]])
def test_a_flow_has_no_timestep_0_to_stop_at(kernel: str) -> None:
    clamped = {"kernel": kernel, "last_step": "clamp"}
    assert f"last_step: clamp is for ddim and ddpm; kernel {kernel} ends on the clean latent" in refusal(
        {**document("prdp", sampler=clamped), "prompts": PROMPTS}
    )
    assert recipe("prdp", sampler={**clamped, "last_step": "unscored"}).sampler.is_flow


@pytest.mark.parametrize("kernel", KERNELS)
def test_flow_grpos_form_of_the_kl_needs_a_step_length(kernel: str) -> None:
    own = {"algorithm": {"kl_coef": 0.04, "kl_form": "flow_grpo"}, "sampler": {"kernel": kernel}}
    if BY_KERNEL[kernel, "flow"]:
        assert recipe("policy_gradient", **own).algorithm.kl_form == "flow_grpo"
        return
    assert refusal({**document("policy_gradient", **own), "prompts": PROMPTS}) == (
        f"algorithm.kl_form: flow_grpo divides by a flow's step length, which kernel {kernel} does not have; use exact."
    )


MODELS = {
    "flow": (
        "StableDiffusion3Pipeline",
        {"sample_size": 8, "in_channels": 4, "patch_size": 2, "pos_embed_max_size": 8},
    ),
    "epsilon": ("StableDiffusionPipeline", None),
}


@pytest.mark.parametrize(
    ("name", "kernel", "prediction", "told"),
    [
        ("ncp_sft", "flow_grpo", "flow", "algorithm ncp_sft cannot train a model that predicts flow"),
        ("prdp", "ddim", "flow", "sampler.kernel is not for a model that predicts flow"),
        ("prdp", "dance_grpo", "epsilon", "sampler.kernel is not for a model that predicts epsilon"),
    ],
)
def test_a_run_that_could_not_learn_is_refused_before_anything_is_started(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    kernel: str,
    prediction: str,
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline, denoiser = MODELS[prediction]
    model = add_empty_parts(write_model_files(tmp_path / "model", side=64, pipeline=pipeline, denoiser=denoiser))
    (tmp_path / "prompts.txt").write_text("a fox\n")
    whole = document(name, model={"path": str(model)}, sampler={"kernel": kernel}, prompts=PROMPTS)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(whole))
    assert run_command_line(["train", "recipe.yaml", "--dry-run"]) == 2
    assert told in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "prompts.txt", "recipe.yaml"}
