"""The published recipes say what their papers and their code say, in our units."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster.cli import run_command_line
from learner.learning_rate import learning_rate
from protocol.algorithms import (
    Cpo,
    Ddpo,
    Dpo,
    NcpCpo,
    NcpDpo,
    NcpSft,
    PolicyGradient,
    Prdp,
    SharpeningRlhf,
    SharpeningSft,
    Spin,
)
from protocol.derived import derived_numbers, learner_forwards, num_branches
from protocol.paths import ROOT
from protocol.recipe import Lora, Recipe
from protocol.recipe_file import load_recipe
from protocol.requirements import check_model, warnings
from tests.protocol.model_files import write_model_files

PUBLISHED = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml") if not path.stem.startswith("tiny_"))
FILTERED = ["data.0.pair_filter=absolute_winners", "data.0.latest_by=created_at"]
NCP_SD15 = ("ncp_dpo_sd15", "ncp_cpo_sd15", "ncp_sft_sd15")

REFERENCED_PAIR, PAIR, IMAGE = 8, 6, 3
"""U-Net evaluations that learning from one costs, a backward pass counting as two."""


def load(name: str, *overrides: str) -> Recipe:
    """A published recipe, with changes."""
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)


def text(name: str) -> str:
    """A published recipe as it stands."""
    return (ROOT / "recipes" / f"{name}.yaml").read_text()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what the published recipes ask their reader to bring."""
    (tmp_path / "my_prompts.txt").write_text("a fox\n")
    for folder in ("my_images",):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "metadata.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_latents(desk: Path, side: int) -> str:
    """An override that puts as much of a model as derived numbers read in the place of the hub's."""
    return f"model.path={write_model_files(desk / 'model', side=side)}"


# All of them.


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_dry_run_passes_once_the_reader_has_brought_what_the_recipe_asks_for(
    desk: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run_command_line(["train", f"recipes/{name}.yaml", "--dry-run"]) == 0, capsys.readouterr().err
    assert sorted(path.name for path in desk.iterdir()) == ["my_images", "my_prompts.txt"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_recipe_names_its_paper_and_what_to_bring(name: str) -> None:
    header = "".join(line for line in text(name).splitlines(keepends=True) if line.startswith("#"))
    assert re.search(r"arXiv \d{4}\.\d{5}", header)
    assert ("my_" in text(name)) == ("Bring" in header)


# Optimizer steps, and what each of them sees.


@pytest.mark.parametrize(
    ("name", "steps", "units_a_step", "forwards_a_unit"),
    [
        ("spin_sd15", 50 + 500 + 200, 2048, REFERENCED_PAIR),
        ("sft_sd15", 2000, 512, IMAGE),
        ("dpo_sd15", 2000, 2048, REFERENCED_PAIR),
        ("dpo_sdxl", 2000, 2048, REFERENCED_PAIR),
        ("cpo_sd15", 600, 64, PAIR),
        ("ncp_dpo_sdxl", 2000, 2048, REFERENCED_PAIR),
        ("ncp_dpo_sd15", 1500, 512, REFERENCED_PAIR),
        ("ncp_cpo_sd15", 1500, 512, PAIR),
        ("ncp_sft_sd15", 1500, 512, IMAGE),
    ],
)
def test_steps_and_pairs_or_images_a_step_are_the_published_ones(
    name: str, steps: int, units_a_step: int, forwards_a_unit: int
) -> None:
    recipe = load(name)
    assert recipe.rounds * recipe.algorithm.num_steps_per_round == steps
    assert learner_forwards(recipe) == units_a_step * forwards_a_unit * recipe.algorithm.num_steps_per_round


@pytest.mark.parametrize(
    ("name", "ranks", "local_batch", "members", "accumulation"),
    [
        ("spin_sd15", 8, 8, 2, 32),
        ("sft_sd15", 8, 32, 1, 2),
        ("dpo_sd15", 16, 1, 2, 128),
        ("dpo_sdxl", 16, 1, 2, 128),
        ("ncp_dpo_sdxl", 4, 8, 2, 64),
        # Of an excursion's best candidate three states, of best and worst six.
        ("sharpening_sft_code_sdxl", 2, 1, 3, 4),
        ("sharpening_rlhf_code_sdxl", 2, 1, 6, 4),
    ],
)
def test_gradient_accumulation_is_the_published_one(
    name: str, ranks: int, local_batch: int, members: int, accumulation: int
) -> None:
    learner, batch = load(name).learner, load(name).batch
    assert learner.world_size == ranks
    assert learner.micro_batch_size == local_batch * members
    assert batch.num_groups == ranks * local_batch * accumulation


def test_spins_iterations_have_their_published_steps() -> None:
    recipe = load("spin_sd15")
    assert [i.rounds * recipe.algorithm.num_steps_per_round for i in recipe.iterations] == [50, 500, 200]


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize(
    ("name", "rounds", "images_a_round", "updates_a_round"),
    [
        ("prdp_sd14_small", 100, 512, 10),
        ("prdp_sd14_large", 1000, 512, 1),
        ("policy_gradient_sd14", 1000, 512, 1),
        ("ddpo_sd14", 100, 256, 4),
        ("flow_grpo_sd35", 1000, 1152, 2),
        ("dancegrpo_flux", 300, 192, 4),
    ],
)
def test_images_and_updates_a_round_are_the_published_ones(
    name: str, rounds: int, images_a_round: int, updates_a_round: int
) -> None:
    numbers = derived_numbers(load(name))
    assert numbers["images sampled a round, at most"].split()[0] == str(images_a_round)
    assert numbers["optimizer steps"] == f"{rounds * updates_a_round} ({updates_a_round} a round)"


# Learning rates.


def rate_of_step(recipe: Recipe, step: int) -> float:
    """The learning rate of an optimizer step of the run, counted from 0."""
    return learning_rate(recipe, *divmod(step, recipe.algorithm.num_steps_per_round))


def test_spins_warm_up_never_ends_in_its_first_iteration() -> None:
    recipe = load("spin_sd15")
    rates = [rate_of_step(recipe, step) for step in range(50)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(2.0e-5 * 50 / 200)
    assert "learner.warmup_steps outlasts an iteration: its learning rate is never reached" in warnings(recipe)


def test_spins_second_iteration_warms_up_and_falls_and_its_third_ends_as_its_rate_is_reached() -> None:
    recipe = load("spin_sd15")
    second = [rate_of_step(recipe, step) for step in range(50, 550)]
    assert second[0] == pytest.approx(2.0e-5 / 200)
    assert second[199] == second[200] == max(second) == pytest.approx(2.0e-5)
    assert second[350] == pytest.approx(2.0e-5 * 150 / 300)
    assert second[499] == pytest.approx(2.0e-5 / 300)
    third = [rate_of_step(recipe, step) for step in range(550, 750)]
    assert third.index(max(third)) == 199
    assert third[0] == pytest.approx(5.0e-8 / 200)
    assert third[199] == pytest.approx(5.0e-8)


@pytest.mark.parametrize(
    ("name", "rate", "warmup"),
    [
        ("prdp_sd14_small", 1e-5, 0),
        ("prdp_sd14_large", 7e-6, 0),
        ("ddpo_sd14", 3e-4, 0),
        ("flow_grpo_sd35", 3e-4, 0),
        ("sft_sd15", 1e-5, 500),
        # The code's rates are for one pair and multiplied by the batch.
        ("dpo_sd15", 1e-8 * 2048, 500),
        ("dpo_sdxl", 1e-8 * 2048, 200),
        ("cpo_sd15", 8e-8 * 64, 60),
        ("ncp_dpo_sdxl", 1e-8 * 2048, 500),
        ("ncp_dpo_sd15", 1e-8 * 512, 250),
        ("sharpening_sft_code_sdxl", 1e-6, 0),
        ("sharpening_rlhf_paper_sdxl", 1e-6, 0),
    ],
)
def test_the_learning_rate_rises_to_the_published_one_and_stays(name: str, rate: float, warmup: int) -> None:
    recipe = load(name)
    last = recipe.rounds * recipe.algorithm.num_steps_per_round - 1
    for step in (max(0, warmup - 1), warmup, last):
        assert rate_of_step(recipe, step) == pytest.approx(rate)
    if warmup:
        assert rate_of_step(recipe, warmup // 2 - 1) == pytest.approx(rate / 2)


# Betas, in both conventions.


def test_spins_published_betas_are_twice_those_of_the_full_convention(desk: Path) -> None:
    recipe = load("spin_sd15", with_latents(desk, 64))
    assert isinstance(recipe.algorithm, Spin)
    half = [recipe.algorithm.iteration_at(round_).beta_half for round_ in (0, 49, 50, 549, 550, 749)]
    assert half == [2000, 2000, 5000, 5000, 5000, 5000]
    assert derived_numbers(recipe)["beta per latent entry"] == "0.061, 0.153, 0.153"


@pytest.mark.parametrize(("name", "half", "full"), [("dpo_sd15", 2000, 1000), ("dpo_sdxl", 5000, 2500)])
def test_dpos_published_betas_are_in_the_half_convention(name: str, half: float, full: float) -> None:
    algorithm = load(name).algorithm
    assert isinstance(algorithm, Dpo)
    assert (algorithm.beta_half, algorithm.beta) == (half, full)


@pytest.mark.parametrize("name", ["ncp_dpo_sdxl", "ncp_dpo_sd15"])
def test_ncps_published_beta_is_dpos_of_sdxl_in_the_full_convention(name: str) -> None:
    ncp, dpo = load(name).algorithm, load("dpo_sdxl").algorithm
    assert isinstance(ncp, NcpDpo)
    assert isinstance(dpo, Dpo)
    assert ncp.beta_full == ncp.beta == dpo.beta == 2500


def test_a_beta_per_entry_falls_with_the_number_of_latent_entries(desk: Path) -> None:
    """5000 in the half convention is 0.153 an entry at 64 x 64 x 4, and 0.038 at 128 x 128 x 4."""
    model = with_latents(desk, 128)
    assert derived_numbers(load("dpo_sdxl", model))["beta per latent entry"] == "0.0381"


@pytest.mark.parametrize(("name", "shift"), [("prdp_sd14_small", 1.3e-4), ("prdp_sd14_large", 1.3e-2)])
def test_prdps_windows_are_the_published_ones_as_mean_shifts(desk: Path, name: str, shift: float) -> None:
    numbers = derived_numbers(load(name, with_latents(desk, 64)))
    assert float(numbers["window as a mean shift, in sigma an entry"]) == pytest.approx(shift, rel=0.02)


# Arms of a comparison differ in what is compared only.


@pytest.mark.parametrize(
    ("name", "parent"),
    [
        ("policy_gradient_sd14", "prdp_sd14_large"),
        ("prdp_sd35", "flow_grpo_sd35"),
        ("ncp_cpo_sd15", "ncp_dpo_sd15"),
        ("ncp_sft_sd15", "ncp_dpo_sd15"),
    ],
)
def test_an_arm_is_its_parent_but_for_the_algorithm(name: str, parent: str) -> None:
    arm, other = load(name), load(parent)
    assert arm.model_copy(update={"algorithm": other.algorithm}) == other
    assert arm.algorithm.num_steps_per_round == other.algorithm.num_steps_per_round


def test_the_control_of_prdp_has_its_window_and_no_kl() -> None:
    control, prdp = load("policy_gradient_sd14").algorithm, load("prdp_sd14_large").algorithm
    assert isinstance(prdp, Prdp)
    assert control.name == "policy_gradient"
    assert (control.advantage, control.kl_coef) == ("leave_one_out", 0)
    assert (control.window, control.latent_reduce) == (prdp.window, prdp.latent_reduce)


def test_ncps_arms_look_at_the_same_features() -> None:
    perceptions = []
    for name in NCP_SD15:
        algorithm = load(name).algorithm
        assert isinstance(algorithm, NcpDpo | NcpCpo | NcpSft)
        perceptions.append(algorithm.perception)
    assert perceptions[0] == perceptions[1] == perceptions[2]


@pytest.mark.parametrize("name", ["ncp_cpo_sd15", "cpo_sd15"])
def test_cpo_without_a_published_beta_has_that_of_its_dpo_arm(name: str) -> None:
    algorithm = load(name).algorithm
    assert isinstance(algorithm, Cpo | NcpCpo)
    assert (algorithm.beta_full, algorithm.sft_weight) == (2500 if name.startswith("ncp") else 2000, 1)


# What is trained, and on what.


@pytest.mark.parametrize("name", ["cpo_sd15", "ncp_dpo_sdxl", *NCP_SD15])
def test_ncps_runs_and_baselines_train_adapters_of_rank_64_on_attention_and_can_filter_pairs(name: str) -> None:
    trainable = load(name).model.trainable
    assert isinstance(trainable, Lora)
    assert (trainable.rank, trainable.targets) == (64, ("to_q", "to_k", "to_v", "to_out.0"))
    assert load(name, *FILTERED).data[0].pair_filter == "absolute_winners"
    assert " ".join(FILTERED) in text(name)


def test_the_variants_that_comments_give_are_recipes() -> None:
    fresh = load("ncp_dpo_sd15", *re.findall(r"algorithm\.perception\.\w+=\w+", text("ncp_dpo_sd15"))).algorithm
    assert isinstance(fresh, NcpDpo)
    assert (fresh.perception.input, fresh.perception.norm, fresh.perception.blocks) == ("uniform", "none", "multi")
    assert load("ddpo_sd14", "batch={num_groups: 512, group_size: 1}").batch.num_trajectories == 512


def test_ddpo_scores_all_of_its_fifty_steps() -> None:
    recipe = load("ddpo_sd14")
    assert isinstance(recipe.algorithm, Ddpo)
    assert recipe.sampler.num_scored_steps == recipe.sampler.num_steps == 50


def test_dancegrpo_divides_by_the_groups_std_in_groups_of_sixteen() -> None:
    recipe = load("dancegrpo_sd14")
    assert recipe.algorithm.name == "policy_gradient"
    assert (recipe.algorithm.advantage, recipe.batch.group_size) == ("group_std", 16)
    assert (recipe.sampler.kernel, recipe.sampler.eta, recipe.sampler.guidance_scale) == ("ddim", 1, 5)


# Flow-matching models.


def at_real_size(desk: Path, name: str) -> str:
    """An override that puts what a dry run reads of Stable Diffusion 3.5 Medium or FLUX.1-dev in the hub's place."""
    sd3 = {"sample_size": 128, "in_channels": 16, "patch_size": 2, "pos_embed_max_size": 384}
    flux = {"in_channels": 64, "guidance_embeds": True}
    pipeline, denoiser = ("FluxPipeline", flux) if name.endswith("flux") else ("StableDiffusion3Pipeline", sd3)
    return f"model.path={write_model_files(desk / 'model', side=128, pipeline=pipeline, denoiser=denoiser)}"


@pytest.mark.parametrize(
    ("name", "shape", "a_group", "window", "branches"),
    [
        ("flow_grpo_sd35", "(16, 64, 64), 65536", "33.00 MiB", 1e-4 * 256, 2),
        ("prdp_sd35", "(16, 64, 64), 65536", "33.00 MiB", 1e-4 * 256, 2),
        ("dancegrpo_flux", "(16, 90, 90), 129600", "50.43 MiB", 1e-4 * 360, 1),
    ],
)
def test_recipes_of_flows_pass_on_their_models_at_real_size(
    desk: Path, name: str, shape: str, a_group: str, window: float, branches: int
) -> None:
    """A group: 24 siblings of 11 latents, 12 of 17, two bytes an entry. The window: times the root of the entries."""
    recipe = load(name, at_real_size(desk, name))
    check_model(recipe, "flow")
    numbers = derived_numbers(recipe)
    assert numbers["latent shape, entries"] == shape
    assert numbers["a group on the wire, at most"] == a_group
    assert float(numbers["window as a mean shift, in sigma an entry"]) == pytest.approx(window, rel=0.01)
    assert num_branches(recipe) == branches


def test_flow_grpo_has_its_table() -> None:
    recipe = load("flow_grpo_sd35")
    algorithm, sampler, trainable = recipe.algorithm, recipe.sampler, recipe.model.trainable
    assert isinstance(algorithm, PolicyGradient)
    assert (algorithm.advantage, algorithm.clip_range, algorithm.latent_reduce) == ("global_std", 1e-4, "latent_mean")
    assert (algorithm.kl_coef, algorithm.kl_form) == (0.04, "flow_grpo")
    assert (sampler.kernel, sampler.eta, sampler.guidance_scale) == ("flow_grpo", 0.7, 4.5)
    assert (sampler.num_steps, sampler.num_scored_steps, sampler.share_initial_noise) == (10, 9, False)
    assert (recipe.batch.num_groups, recipe.batch.group_size, recipe.model.resolution) == (48, 24, 512)
    assert isinstance(trainable, Lora)
    assert (trainable.rank, trainable.alpha, len(trainable.targets)) == (32, 64, 8)


def test_dancegrpo_on_flux_has_its_scripts_numbers() -> None:
    recipe = load("dancegrpo_flux")
    algorithm, sampler = recipe.algorithm, recipe.sampler
    assert isinstance(algorithm, PolicyGradient)
    assert (algorithm.advantage, algorithm.clip_range, algorithm.kl_coef) == ("group_std", 1e-4, 0)
    assert (sampler.kernel, sampler.eta, sampler.guidance_scale) == ("dance_grpo", 0.3, 3.5)
    assert (sampler.num_steps, sampler.num_scored_steps, sampler.share_initial_noise) == (16, 15, True)
    assert (recipe.batch.num_groups, recipe.batch.group_size, recipe.model.resolution) == (16, 12, 720)
    assert recipe.learner.micro_batch_size == recipe.batch.group_size, "in bf16 a batch is what it was sampled as"
    overrides = re.findall(r"model\.trainable=\{.*?\}|learner\.\w+=\S+", text("dancegrpo_flux"))
    full = load("dancegrpo_flux", *overrides)
    assert (full.model.trainable.form, full.learner.learning_rate) == ("full", 1e-5)


def test_prdp_on_a_flow_has_the_papers_listing() -> None:
    prdp, large = load("prdp_sd35").algorithm, load("prdp_sd14_large").algorithm
    assert isinstance(prdp, Prdp)
    assert isinstance(large, Prdp)
    assert (prdp.latent_reduce, prdp.time_reduce, prdp.tie_policy) == (
        large.latent_reduce,
        large.time_reduce,
        large.tie_policy,
    )
    assert (prdp.clip_eps, prdp.kl_weight) == (large.clip_eps, 10 * large.kl_weight)


# Diffusion-Sharpening's variants.


@pytest.mark.parametrize(
    ("variant", "noise", "select_on", "margin", "ref_times"),
    [
        ("", "shared", "path_mean", "none", "all"),
        ("_paper", "fresh", "path_sum", "inside", "all"),
        ("_code", "coupled", "path_mean", "outside", "first"),
    ],
)
def test_a_variant_of_sharpening_is_what_its_name_says(
    variant: str, noise: str, select_on: str, margin: str, ref_times: str
) -> None:
    rlhf, sft = (load(f"sharpening_{kind}{variant}_sdxl") for kind in ("rlhf", "sft"))
    assert isinstance(rlhf.algorithm, SharpeningRlhf)
    assert isinstance(sft.algorithm, SharpeningSft)
    assert rlhf.source_kinds == ("prompts",)
    assert sft.source_kinds == ("images",)
    assert (rlhf.algorithm.excursion.noise, rlhf.algorithm.margin) == (noise, margin)
    assert rlhf.algorithm.ref_times == ref_times
    assert sft.algorithm.excursion.noise == "fresh"
    for recipe in (rlhf, sft):
        assert isinstance(recipe.algorithm, SharpeningRlhf | SharpeningSft)
        assert recipe.algorithm.select_on == select_on
        assert (recipe.batch.group_size, recipe.algorithm.excursion.num_states) == (3, 3)
        assert recipe.algorithm.excursion.stride == 1000 // recipe.sampler.num_steps


@pytest.mark.parametrize("name", ["sharpening_rlhf_paper_sdxl", "sharpening_sft_paper_sdxl"])
def test_the_papers_sampler_costs_its_published_hundred_evaluations(name: str) -> None:
    recipe = load(name)
    assert recipe.sampler.num_steps * num_branches(recipe) == 100
