"""What a base model's files say: the families at real size, sizes that they can make, and files that say nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from protocol.algorithms import ALGORITHMS
from protocol.errors import ModelError
from protocol.models import FAMILIES, ModelFacts, predicts_flow, read_facts
from protocol.paths import ROOT
from protocol.recipe_file import parse_recipe
from protocol.requirements import KERNELS, check_model
from tests.protocol.model_files import write_model_files

UNET = {"in_channels": 4, "block_out_channels": [320, 640, 1280, 1280], "sample_size": 64}
XL_UNET = {"in_channels": 4, "block_out_channels": [320, 640, 1280], "sample_size": 128}
SD3 = {"in_channels": 16, "sample_size": 128, "patch_size": 2, "pos_embed_max_size": 192}
FLUX = {"in_channels": 64, "guidance_embeds": True, "patch_size": 1}
DENOISERS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": UNET,
    "StableDiffusionXLPipeline": XL_UNET,
    "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": FLUX,
}
"""As much of real networks' configurations as is read."""

PIPELINES = {
    "CompVis/stable-diffusion-v1-4": "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-xl-base-1.0": "StableDiffusionXLPipeline",
    "stabilityai/stable-diffusion-3.5-medium": "StableDiffusion3Pipeline",
    "black-forest-labs/FLUX.1-dev": "FluxPipeline",
}
REST: dict[str, Any] = {
    "rounds": 1,
    "prompts": {"train": "prompts.txt"},
    "batch": {"num_groups": 2, "group_size": 2},
    "rewards": [{"name": "pick_score"}],
    "algorithm": {"name": "prdp", "kl_weight": 1.0, "clip_eps": 1.0e-4},
}
"""What the guide's recipes leave out."""


def write(folder: Path, pipeline: str, **changes: Any) -> str:
    denoiser = {key: value for key, value in (DENOISERS[pipeline] | changes).items() if value is not None}
    return str(write_model_files(folder, side=0, pipeline=pipeline, denoiser=denoiser))


@pytest.mark.parametrize(
    "facts",
    [
        ModelFacts("StableDiffusionPipeline", "epsilon", (4, 64, 64), 512, False),
        ModelFacts("StableDiffusionXLPipeline", "epsilon", (4, 128, 128), 1024, False),
        ModelFacts("StableDiffusion3Pipeline", "flow", (16, 128, 128), 1024, False),
        ModelFacts("FluxPipeline", "flow", (16, 128, 128), 1024, True),
    ],
    ids=lambda facts: facts.pipeline,
)
def test_each_family_has_its_facts_at_real_size(tmp_path: Path, facts: ModelFacts) -> None:
    assert read_facts(write(tmp_path, facts.pipeline), None) == facts
    assert predicts_flow(facts.pipeline) == (facts.prediction_type == "flow") == (facts.part == "transformer")


def test_every_family_is_here() -> None:
    assert DENOISERS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_what_a_unet_predicts_is_its_schedulers_word_and_epsilon_without_one(
    tmp_path: Path, prediction_type: str
) -> None:
    for scheduler, expected in (({"prediction_type": prediction_type}, prediction_type), ({"beta": 1}, "epsilon")):
        folder = write_model_files(tmp_path / expected, side=64, denoiser=UNET, scheduler=scheduler)
        facts = read_facts(str(folder), None)
        assert facts is not None
        assert facts.prediction_type == expected


def test_flux_is_told_the_guidance_unless_it_is_schnell(tmp_path: Path) -> None:
    facts = read_facts(write(tmp_path, "FluxPipeline", guidance_embeds=False), None)
    assert facts is not None
    assert not facts.embeds_guidance


@pytest.mark.parametrize(
    ("pipeline", "resolution", "shape_CHW"),
    [
        ("StableDiffusionPipeline", 768, (4, 96, 96)),
        ("StableDiffusionPipeline", 64, (4, 8, 8)),
        ("StableDiffusionXLPipeline", 512, (4, 64, 64)),
        ("StableDiffusion3Pipeline", 512, (16, 64, 64)),
        ("StableDiffusion3Pipeline", 3072, (16, 384, 384)),
        ("FluxPipeline", 720, (16, 90, 90)),
        ("FluxPipeline", 4096, (16, 512, 512)),
    ],
)
def test_a_resolution_is_the_images_side(
    tmp_path: Path, pipeline: str, resolution: int, shape_CHW: tuple[int, int, int]
) -> None:
    facts = read_facts(write(tmp_path, pipeline), resolution)
    assert facts is not None
    assert (facts.latent_shape_CHW, facts.image_side) == (shape_CHW, resolution)


@pytest.mark.parametrize(
    ("pipeline", "resolution", "expected"),
    [
        ("StableDiffusionPipeline", 480, "a multiple of 64"),
        ("StableDiffusionXLPipeline", 528, "a multiple of 32"),
        ("StableDiffusion3Pipeline", 520, "a multiple of 16, at most 3072"),
        ("StableDiffusion3Pipeline", 3088, "a multiple of 16, at most 3072"),
        ("FluxPipeline", 728, "a multiple of 16"),
    ],
)
def test_a_resolution_that_does_not_divide_or_has_no_places_is_refused_with_what_does(
    tmp_path: Path, pipeline: str, resolution: int, expected: str
) -> None:
    with pytest.raises(ModelError, match=rf"model\.resolution.* Got: {resolution}\. Expected: {expected}\. To do"):
        read_facts(write(tmp_path, pipeline), resolution)


@pytest.mark.parametrize(
    ("pipeline", "missing"),
    [
        *[(pipeline, "in_channels") for pipeline in DENOISERS],
        ("StableDiffusionPipeline", "sample_size"),
        ("StableDiffusionXLPipeline", "block_out_channels"),
        ("StableDiffusion3Pipeline", "pos_embed_max_size"),
        ("StableDiffusion3Pipeline", "patch_size"),
    ],
)
def test_a_setting_that_is_missing_is_named(tmp_path: Path, pipeline: str, missing: str) -> None:
    with pytest.raises(ModelError, match=f"lacks '{missing}'"):
        read_facts(write(tmp_path, pipeline, **{missing: None}), None)


@pytest.mark.parametrize("pipeline", DENOISERS)
@pytest.mark.parametrize("content", [None, "", "{", "[]", "3"])
def test_a_file_that_is_absent_torn_or_something_else_is_named(
    tmp_path: Path, pipeline: str, content: str | None
) -> None:
    part = FAMILIES[pipeline][0]
    for number, name in enumerate(
        ("model_index.json", f"{part}/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    ):
        source = write(tmp_path / str(number), pipeline)
        if content is None:
            (Path(source) / name).unlink()
        else:
            (Path(source) / name).write_text(content)
        with pytest.raises(ModelError, match=f"{name} cannot be read"):
            read_facts(source, None)


@pytest.mark.parametrize("name", ["KandinskyPipeline", None, 3])
def test_another_family_is_refused_with_those_that_are_supported(tmp_path: Path, name: Any) -> None:
    source = write(tmp_path, "FluxPipeline")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ModelError, match="not supported") as error:
        read_facts(source, None)
    assert all(family in str(error.value) for family in FAMILIES)


def test_a_hub_id_says_nothing_before_it_is_loaded() -> None:
    assert read_facts("black-forest-labs/FLUX.1-dev", 1024) is None


# docs/models.md


GUIDE = (ROOT / "docs" / "models.md").read_text()


def test_the_guides_recipes_are_recipes_of_their_families() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == len(FAMILIES)
    for block in blocks:
        recipe = parse_recipe({**REST, **yaml.safe_load(block)}, source="docs/models.md")
        check_model(recipe, "epsilon" if "unet" in FAMILIES[PIPELINES[recipe.model.path]] else "flow")
        for name in re.findall(r"[\w*]+(?=\.yaml)", block):
            assert list((ROOT / "recipes").glob(f"{name}.yaml")), name


def test_the_guides_table_has_every_family() -> None:
    assert set(re.findall(r"\| `(\w+Pipeline)` \|", GUIDE)) == FAMILIES.keys()


def test_the_guides_tables_of_algorithms_and_kernels_are_what_is_checked() -> None:
    able: dict[str, tuple[str, ...]] = {name: kind.predictions for name, kind in ALGORITHMS.items()}
    columns = ("epsilon", "v_prediction", "sample", "flow")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ((?:(?:yes|no) \| ?){4})$", GUIDE, flags=re.MULTILINE)
    told = {name: entries.replace("|", "").split() for names, entries in rows for name in re.findall(r"\w+", names)}
    assert told == {
        name: ["yes" if column in predictions else "no" for column in columns]
        for name, predictions in {**able, **KERNELS}.items()
    }
