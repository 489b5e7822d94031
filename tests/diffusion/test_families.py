"""Model families: each says to its network what the pipeline of diffusers says, and what is trained loads there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor

from diffusion.chain import Chain
from diffusion.conditioning import Conditioning
from diffusion.families import FAMILIES
from diffusion.families.flux import pack, token_places, unpack
from diffusion.policy import Policy
from diffusion.process import Flow
from protocol.errors import ModelError
from protocol.models import FAMILIES as PARTS
from protocol.models import read_facts
from protocol.recipe import Full, Lora, Sampler
from tests.models import make_tiny_flux_model, make_tiny_model, make_tiny_sd3_model, make_tiny_xl_model

PROMPTS = ["a red seven", "", "a blue one on a far longer ground than fits"]
SEEDS = (5, 6)
MAKE: dict[str, Callable[[Path], Path]] = {
    "StableDiffusionPipeline": make_tiny_model,
    "StableDiffusionXLPipeline": make_tiny_xl_model,
    "StableDiffusion3Pipeline": make_tiny_sd3_model,
    "FluxPipeline": make_tiny_flux_model,
    "FluxPipeline, schnell": partial(make_tiny_flux_model, guidance_embeds=False),
    "StableDiffusion3Pipeline, no T5": partial(make_tiny_sd3_model, with_t5=False),
}


@pytest.fixture(scope="module", params=MAKE)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family."""
    torch.set_num_threads(1)
    return MAKE[request.param](tmp_path_factory.mktemp("families") / "model")


def load(model: Path, trainable: Lora | Full | None = None) -> Policy:
    return Policy(str(model), trainable=trainable or Lora(rank=2), seed=0, resolution=16)


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return load(model)


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Any:
    """The plain pipeline, whose last step lands on the clean latent as ours does."""
    index = json.loads((model / "model_index.json").read_text())
    left_out = {part: None for part in ("text_encoder_3", "tokenizer_3") if index.get(part, [""])[0] is None}
    loaded = DiffusionPipeline.from_pretrained(model, **left_out)
    loaded.set_progress_bar_config(disable=True)
    if not is_flow(loaded):
        loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config, set_alpha_to_one=True)
    return loaded


def is_flow(pipeline: Any) -> bool:
    return isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)


def sampler(policy: Policy, **settings: Any) -> Sampler:
    """Without noise, as the pipelines sample."""
    kernel = "flow_grpo" if isinstance(policy.process, Flow) else "ddim"
    return Sampler(**{"kernel": kernel, "num_steps": 4, "eta": 0.0, **settings})


def drawn_by(pipeline: Any, start_GCHW: Tensor, guidance_scale: float) -> Tensor:
    """Final latents of the pipeline, from given noise, as (G, C, H, W)."""
    options: dict[str, Any] = {"guidance_scale": guidance_scale, "latents": start_GCHW}
    if not is_flow(pipeline):
        options["eta"] = 0.0
    is_flux = isinstance(pipeline, FluxPipeline)
    if is_flux:
        options["latents"] = pack(start_GCHW)
        if not pipeline.transformer.config.guidance_embeds and guidance_scale != 1.0:
            options |= {"guidance_scale": 1.0, "true_cfg_scale": guidance_scale, "negative_prompt": ""}
    drawn = pipeline(
        PROMPTS[0],
        num_images_per_prompt=len(start_GCHW),
        num_inference_steps=4,
        output_type="latent",
        height=16,
        width=16,
        **options,
    )[0]
    return unpack(drawn, 4, 4) if is_flux else drawn


def test_every_family_has_a_tiny_model_here() -> None:
    assert {name.split(",")[0] for name in MAKE} == FAMILIES.keys()
    assert {name: family.part for name, family in FAMILIES.items()} == {name: parts[0] for name, parts in PARTS.items()}


def test_prompts_are_encoded_as_the_pipeline_does_it(policy: Policy, pipeline: Any) -> None:
    for prompt in (PROMPTS[0], PROMPTS[2]):
        ours, empty = policy.condition([prompt]), policy.condition([""])
        told = encoded_by(pipeline, prompt)
        assert torch.equal(ours.text_NLE, told[0])
        if ours.pooled_NP is not None:
            assert torch.equal(ours.pooled_NP, told[1])
        if not isinstance(pipeline, FluxPipeline):
            guided = encoded_by(pipeline, prompt, do_classifier_free_guidance=True)
            assert torch.equal(empty.text_NLE, guided[2])
            assert empty.pooled_NP is None or torch.equal(empty.pooled_NP, guided[3])
        if ours.size_N6 is not None:
            assert ours.size_N6.tolist() == [[16, 16, 0, 0, 16, 16]]


@torch.no_grad()
def encoded_by(pipeline: Any, prompt: str, **options: Any) -> tuple[Any, ...]:
    """Text and pooled text, then those of the empty prompt."""
    options |= {"device": "cpu", "num_images_per_prompt": 1}
    if isinstance(pipeline, FluxPipeline):
        return pipeline.encode_prompt(prompt, None, **options)[:2]
    options.setdefault("do_classifier_free_guidance", False)
    if isinstance(pipeline, StableDiffusion3Pipeline):
        text, empty, pooled, empty_pooled = pipeline.encode_prompt(prompt, None, None, **options)
    elif isinstance(pipeline, StableDiffusionXLPipeline):
        text, empty, pooled, empty_pooled = pipeline.encode_prompt(prompt, **options)
    else:
        (text, empty), pooled, empty_pooled = pipeline.encode_prompt(prompt, **options), None, None
    return text, pooled, empty, empty_pooled


def test_each_prompt_is_encoded_by_itself(policy: Policy, model: Path) -> None:
    alone = load(model)
    together = policy.condition(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        own = alone.condition([prompt])
        for name, tensor in vars(own).items():
            if tensor is not None:
                assert torch.equal(getattr(together, name)[row : row + 1], tensor)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_chain_without_noise_is_the_pipelines(policy: Policy, pipeline: Any, guidance_scale: float) -> None:
    ours = Chain(policy, sampler(policy, guidance_scale=guidance_scale)).sample(PROMPTS[0], SEEDS)
    theirs = drawn_by(pipeline, ours.latents_GSCHW[:, 0], guidance_scale)
    assert torch.allclose(ours.latents_GSCHW[:, -1], theirs, rtol=1e-4, atol=1e-4)
    pixels = [policy.decode(latent).astype(int) for latent in (ours.latents_GSCHW[:, -1], theirs)]
    assert abs(pixels[0] - pixels[1]).max() <= 1


def test_trained_adapters_draw_the_same_in_the_pipeline(model: Path, pipeline: Any, tmp_path: Path) -> None:
    trained = load(model, Lora(rank=2, alpha=3))
    generator = torch.Generator().manual_seed(0)
    for tensor in trained.trainable_state().values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    trained.export(tmp_path)
    ours = Chain(trained, sampler(trained)).sample(PROMPTS[0], SEEDS)
    before = drawn_by(pipeline, ours.latents_GSCHW[:, 0], 1.0)
    pipeline.load_lora_weights(tmp_path)
    try:
        after = drawn_by(pipeline, ours.latents_GSCHW[:, 0], 1.0)
    finally:
        pipeline.unload_lora_weights()
    assert torch.allclose(ours.latents_GSCHW[:, -1], after, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, rtol=1e-2, atol=1e-2)


def test_a_fully_trained_network_draws_the_same_in_the_pipeline(model: Path, pipeline: Any, tmp_path: Path) -> None:
    trained = load(model, Full(form="full"))
    for tensor in trained.trainable_state().values():
        tensor.mul_(1.01)
    trained.export(tmp_path)
    ours = Chain(trained, sampler(trained)).sample(PROMPTS[0], SEEDS)
    part = trained.family.part
    kept = getattr(pipeline, part)
    setattr(pipeline, part, kept.from_pretrained(tmp_path / part))
    try:
        theirs = drawn_by(pipeline, ours.latents_GSCHW[:, 0], 1.0)
    finally:
        setattr(pipeline, part, kept)
    assert torch.allclose(ours.latents_GSCHW[:, -1], theirs, rtol=1e-4, atol=1e-4)


def test_another_family_is_refused_with_those_that_are_supported(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    with pytest.raises(ModelError, match=r"not supported.*KandinskyPipeline.*StableDiffusionPipeline"):
        load(other)


def test_a_missing_part_is_named(model: Path, tmp_path: Path) -> None:
    for part in (folder.name for folder in model.iterdir() if folder.is_dir() and folder.name != "feature_extractor"):
        torn = shutil.copytree(model, tmp_path / part)
        shutil.rmtree(torn / part)
        with pytest.raises(ModelError, match=rf"the {part} of the base model"):
            load(torn)


def test_rows_of_a_conditioning_stay_together() -> None:
    whole = Conditioning(torch.arange(6.0).view(3, 1, 2), torch.arange(3.0)[:, None], torch.arange(18.0).view(3, 6))
    picked = whole[torch.tensor([2, 0])]
    assert picked.pooled_NP.flatten().tolist() == [2, 0]
    assert picked.text_NLE.flatten().tolist() == [4, 5, 0, 1]
    assert whole.repeat_interleave(2).pooled_NP.flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert picked[:1].expand(3).size_N6.tolist() == [list(range(12, 18))] * 3
    joined = Conditioning.cat([picked, whole])
    assert len(joined) == 5
    assert joined.pooled_NP.flatten().tolist() == [2, 0, 0, 1, 2]
    assert Conditioning.cat([Conditioning(torch.zeros(1, 1, 2))]).pooled_NP is None


def test_a_models_files_say_what_the_loaded_model_says(policy: Policy, model: Path) -> None:
    facts = read_facts(str(model), 16)
    assert facts is not None
    assert facts.latent_shape_CHW == policy.latent_shape_CHW == (4, 8, 8)
    assert facts.image_side == policy.image_side == policy.decode(torch.zeros(1, 4, 8, 8)).shape[1] == 16
    assert facts.prediction_type == policy.prediction_type
    assert facts.embeds_guidance == policy.family.embeds_guidance


@pytest.mark.parametrize("side", [15, 17, 3])
def test_a_resolution_that_the_network_cannot_take_is_refused_by_its_files(model: Path, side: int) -> None:
    with pytest.raises(ModelError, match=r"model.resolution.*a multiple of 4"):
        read_facts(str(model), side)


def test_a_guided_step_costs_two_evaluations_unless_the_network_is_told(policy: Policy) -> None:
    told = policy.family.embeds_guidance
    chain = Chain(policy, sampler(policy, guidance_scale=3.0))
    before = policy.num_evaluations
    chain.sample(PROMPTS[0], SEEDS)
    assert policy.num_evaluations - before == 4 * len(SEEDS) * (1 if told else 2)


def test_images_keep_their_colours_through_the_autoencoders_scale_and_shift(policy: Policy, pipeline: Any) -> None:
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = pipeline.vae.config
    theirs = pipeline.vae.decode(latent / config.scaling_factor + (config.shift_factor or 0.0)).sample
    pixels = pipeline.image_processor.postprocess(theirs.detach(), output_type="np")
    assert abs(policy.decode(latent) / 255.0 - pixels).max() <= 1 / 255
    images = policy.decode(latent)
    mean, _ = policy.encode(images)
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = (pipeline.vae.encode(scaled).latent_dist.mean - (config.shift_factor or 0.0)) * config.scaling_factor
    torch.testing.assert_close(mean, expected.detach(), rtol=1e-4, atol=1e-5)


def test_packing_and_unpacking_tokens_undo_each_other() -> None:
    state = torch.arange(2 * 4 * 8 * 6.0).view(2, 4, 8, 6)
    assert pack(state).shape == (2, 12, 16)
    assert torch.equal(unpack(pack(state), 4, 3), state)
    assert token_places(2, 2).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
