"""The doctor examines flow-matching models: what is sound has no finding, and what is not is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.doctor import diagnosis as doctor
from cluster.doctor.against_diffusers import check_guidance_one, check_predictions, check_tables
from cluster.doctor.finding import Finding
from cluster.doctor.reference import PlainPipeline
from diffusion.chain import Chain
from diffusion.families import flux, stable_diffusion_3
from diffusion.policy import Policy
from protocol.recipe import Lora, Sampler
from tests.models import make_tiny_flux_model, make_tiny_model, make_tiny_sd3_model
from tests.rewards.hub_cache import add_repository

MAKE: dict[str, Callable[[Path], Path]] = {"sd3": make_tiny_sd3_model, "flux": make_tiny_flux_model}


@pytest.fixture(scope="module", params=MAKE)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return MAKE[request.param](tmp_path_factory.mktemp("flows") / request.param)


@pytest.fixture(scope="module")
def pipeline(model: Path) -> PlainPipeline:
    return PlainPipeline(str(model), torch.float32, "cpu")


def chain_of(folder: Path, **settings: Any) -> Chain:
    policy = Policy(str(folder), trainable=Lora(rank=2), seed=0, with_decoder=False, resolution=16)
    return Chain(policy, Sampler(**{"kernel": "flow_grpo", "eta": 0.7, "num_steps": 4, **settings}))


def changed(folder: Path, to: Path, **settings: Any) -> Path:
    """The same model with another configuration of its scheduler."""
    shutil.copytree(folder, to)
    config = to / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return to


def test_a_sound_model_without_a_recipe_is_examined_with_flow_grpos_sde_and_has_no_finding(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "machine_findings", lambda recipe, folder: iter([Finding("disk", "ok", "vast")]))
    overrides = ["model.resolution=16", "sampler.num_steps=3", "batch.group_size=2"]
    diagnosis = doctor.diagnose(str(model), overrides, "cpu", lambda part, finding: None)
    findings = {finding.name: finding for finding in diagnosis.findings["model"]}
    assert not [finding for part in diagnosis.findings.values() for finding in part if finding.verdict != "ok"]
    assert "latents (4, 8, 8)" in findings["base model"].found
    assert "diffusers has no such SDE" in findings["scheduler tables"].found
    assert "2 of 3 steps are scored" in findings["last step"].found
    compared = {"scheduler tables", "last step", "prediction, unguided", "prediction, guided"}
    compared |= {"log-probability", "batch size", "adapter fused"}
    assert findings.keys() == {"base model", "guidance 1", "dtype", *compared}
    for name in compared:
        number, limit = findings[name].number, findings[name].limit
        assert number is not None
        assert limit is not None
        assert 0 <= number <= limit


@pytest.mark.parametrize(
    "sampler",
    [
        {"eta": 0.7, "num_steps": 10},
        {"eta": 0.0},
        {"eta": 1.0, "num_steps": 1},
        {"kernel": "dance_grpo", "eta": 0.3, "num_steps": 16},
    ],
    ids=str,
)
def test_without_noise_steps_are_those_of_the_pipelines_scheduler(
    model: Path, pipeline: PlainPipeline, sampler: dict[str, Any]
) -> None:
    findings = list(check_tables(chain_of(model, **sampler), pipeline))
    assert [finding.verdict for finding in findings] == ["ok", "ok"], findings
    assert all(finding.number is not None and finding.number < 1e-5 for finding in findings)


def test_a_schedule_shifted_otherwise_than_the_pipelines_is_found(
    model: Path, pipeline: PlainPipeline, tmp_path: Path
) -> None:
    other = changed(model, tmp_path / "other", shift=2.0, base_shift=0.7)
    (finding,) = check_tables(chain_of(other), pipeline)
    assert (finding.name, finding.verdict) == ("scheduler tables", "error")
    assert "other timesteps: ours [1000.0, " in finding.found
    assert "scheduler_config.json" in finding.do


def test_another_sampler_in_the_models_files_changes_nothing(model: Path, tmp_path: Path) -> None:
    """Images of other tools would come of another SDE; what is compared is the ODE."""
    other = changed(model, tmp_path / "other", stochastic_sampling=True)
    findings = check_tables(chain_of(other), PlainPipeline(str(other), torch.float32, "cpu"))
    assert [finding.verdict for finding in findings] == ["ok", "ok"]


@pytest.mark.parametrize("wrong", ["mean_noise_N", "mean_clean_N", "sigma_N"])
def test_an_sde_whose_mean_does_not_go_with_its_noise_is_found(
    model: Path, pipeline: PlainPipeline, wrong: str
) -> None:
    chain = chain_of(model)
    chain.schedule = dataclasses.replace(chain.schedule, **{wrong: 1.01 * getattr(chain.schedule, wrong)})
    tables, _ = check_tables(chain, pipeline)
    assert tables.verdict == "error"
    assert tables.number is not None
    assert tables.number > 1e-4


def test_a_network_other_than_the_pipelines_is_found(model: Path, pipeline: PlainPipeline) -> None:
    chain = chain_of(model)
    assert [finding.verdict for finding in check_predictions(chain, pipeline)] == ["ok", "ok"]
    with torch.no_grad():
        chain.policy.denoiser.proj_out.bias += 1e-2
    assert [finding.verdict for finding in check_predictions(chain, pipeline)] == ["error", "error"]


def test_prompts_cut_elsewhere_than_by_the_pipeline_are_found(
    model: Path, pipeline: PlainPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (flux, stable_diffusion_3):
        monkeypatch.setattr(module, "NUM_T5_TOKENS", 8)
    assert {finding.verdict for finding in check_predictions(chain_of(model), pipeline)} == {"error"}


def test_guidance_that_the_network_is_told_has_no_branches_to_compare(model: Path) -> None:
    finding = check_guidance_one(chain_of(model))
    assert finding.verdict == "ok"
    assert (finding.number is None) == ("told the guidance" in finding.found) == (model.name == "flux")


def test_flux_without_it_is_held_against_its_pipelines_true_guidance(tmp_path: Path) -> None:
    model = make_tiny_flux_model(tmp_path / "schnell", guidance_embeds=False)
    chain, pipeline = chain_of(model, guidance_scale=3.0), PlainPipeline(str(model), torch.float32, "cpu")
    unguided, guided = check_predictions(chain, pipeline)
    assert (unguided.verdict, guided.verdict, check_guidance_one(chain).verdict) == ("ok", "ok", "ok")
    assert "guidance 3:" in guided.found


def test_flux_tokens_in_another_order_than_the_pipelines_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain pipeline packs by itself, so that ours is held against something."""
    model = make_tiny_flux_model(tmp_path / "flux")
    chain, pipeline = chain_of(model), PlainPipeline(str(model), torch.float32, "cpu")
    pack, unpack = flux.pack, flux.unpack
    monkeypatch.setattr(flux, "pack", lambda state: pack(state.transpose(2, 3)))
    monkeypatch.setattr(flux, "unpack", lambda token, rows, columns: unpack(token, columns, rows).transpose(2, 3))
    assert {finding.verdict for finding in check_predictions(chain, pipeline)} == {"error"}


def test_the_usual_recipe_of_a_model_has_a_kernel_of_its_kind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = doctor._recipe_of(str(model), ["model.resolution=16", "sampler.eta=0.5"])
    assert recipe is not None
    assert (recipe.sampler.kernel, recipe.sampler.eta, recipe.model.resolution) == ("flow_grpo", 0.5, 16)
    diffusion = doctor._recipe_of(str(make_tiny_model(tmp_path / "diffusion")), [])
    assert diffusion is not None
    assert (diffusion.sampler.kernel, diffusion.sampler.eta) == ("ddim", 1.0)


def test_what_the_hub_has_is_known_by_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    add_repository(tmp_path, "someone/flow", {"model_index.json": b'{"_class_name": "FluxPipeline"}'})
    recipes = {source: doctor._recipe_of(source, []) for source in ("someone/flow", "someone/absent")}
    kernels = {source: recipe.sampler.kernel for source, recipe in recipes.items() if recipe is not None}
    assert kernels == {"someone/flow": "flow_grpo", "someone/absent": "ddim"}
