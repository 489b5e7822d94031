"""Model families: each says to its network what the pipeline of diffusers says, and what is trained loads there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

from diffusion.chain import Chain
from diffusion.conditioning import Conditioning
from diffusion.families import FAMILIES
from diffusion.policy import Policy
from protocol.errors import ModelError
from protocol.recipe import Full, Lora, Sampler
from tests.models import make_tiny_model, make_tiny_xl_model

PROMPTS = ["a red seven", "", "a blue one on a far longer ground than fits"]
SEEDS = (5, 6)
MAKE = {"StableDiffusionPipeline": make_tiny_model, "StableDiffusionXLPipeline": make_tiny_xl_model}


@pytest.fixture(scope="module", params=MAKE)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family."""
    torch.set_num_threads(1)
    return MAKE[request.param](tmp_path_factory.mktemp("families") / "model")


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return Policy(str(model), trainable=Lora(rank=2), seed=0)


@pytest.fixture(scope="module")
def pipeline(model: Path) -> Any:
    """The plain pipeline, whose last step lands on the clean latent as ours does."""
    loaded = DiffusionPipeline.from_pretrained(model)
    loaded.set_progress_bar_config(disable=True)
    loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config, set_alpha_to_one=True)
    return loaded


def drawn_by(pipeline: Any, start_GCHW: Tensor, guidance_scale: float) -> Tensor:
    return pipeline(
        PROMPTS[0],
        num_images_per_prompt=len(start_GCHW),
        latents=start_GCHW,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        eta=0.0,
        output_type="latent",
        height=16,
        width=16,
    )[0]


def test_every_family_has_a_tiny_model_here() -> None:
    assert MAKE.keys() == FAMILIES.keys()


def test_prompts_are_encoded_as_the_pipeline_does_it(policy: Policy, pipeline: Any) -> None:
    for prompt in (PROMPTS[0], PROMPTS[2]):
        theirs = pipeline.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
        ours, empty = policy.condition([prompt]), policy.condition([""])
        assert torch.equal(ours.text_NLE, theirs[0])
        assert torch.equal(empty.text_NLE, theirs[1])
        if ours.pooled_NP is not None:
            assert empty.pooled_NP is not None
            assert torch.equal(ours.pooled_NP, theirs[2])
            assert torch.equal(empty.pooled_NP, theirs[3])
            assert ours.size_N6.tolist() == [[16, 16, 0, 0, 16, 16]]


def test_each_prompt_is_encoded_by_itself(policy: Policy, model: Path) -> None:
    alone = Policy(str(model), trainable=Lora(rank=2), seed=0)
    together = policy.condition(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        own = alone.condition([prompt])
        for name, tensor in vars(own).items():
            if tensor is not None:
                assert torch.equal(getattr(together, name)[row : row + 1], tensor)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_chain_without_noise_is_the_pipelines(policy: Policy, pipeline: Any, guidance_scale: float) -> None:
    ours = Chain(policy, Sampler(num_steps=4, eta=0.0, guidance_scale=guidance_scale)).sample(PROMPTS[0], SEEDS)
    theirs = drawn_by(pipeline, ours.latents_GSCHW[:, 0], guidance_scale)
    assert torch.allclose(ours.latents_GSCHW[:, -1], theirs, rtol=1e-4, atol=1e-4)
    pixels = [policy.decode(latent).astype(int) for latent in (ours.latents_GSCHW[:, -1], theirs)]
    assert abs(pixels[0] - pixels[1]).max() <= 1


def test_trained_adapters_draw_the_same_in_the_pipeline(model: Path, pipeline: Any, tmp_path: Path) -> None:
    trained = Policy(str(model), trainable=Lora(rank=2, alpha=3), seed=0)
    generator = torch.Generator().manual_seed(0)
    for tensor in trained.trainable_state().values():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    trained.export(tmp_path)
    ours = Chain(trained, Sampler(num_steps=4, eta=0.0)).sample(PROMPTS[0], SEEDS)
    before = drawn_by(pipeline, ours.latents_GSCHW[:, 0], 1.0)
    pipeline.load_lora_weights(tmp_path)
    try:
        after = drawn_by(pipeline, ours.latents_GSCHW[:, 0], 1.0)
    finally:
        pipeline.unload_lora_weights()
    assert torch.allclose(ours.latents_GSCHW[:, -1], after, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, rtol=1e-2, atol=1e-2)


def test_a_fully_trained_network_draws_the_same_in_the_pipeline(model: Path, pipeline: Any, tmp_path: Path) -> None:
    trained = Policy(str(model), trainable=Full(form="full"), seed=0)
    for tensor in trained.trainable_state().values():
        tensor.mul_(1.01)
    trained.export(tmp_path)
    ours = Chain(trained, Sampler(num_steps=4, eta=0.0)).sample(PROMPTS[0], SEEDS)
    kept, pipeline.unet = pipeline.unet, pipeline.unet.from_pretrained(tmp_path / "unet")
    try:
        theirs = drawn_by(pipeline, ours.latents_GSCHW[:, 0], 1.0)
    finally:
        pipeline.unet = kept
    assert torch.allclose(ours.latents_GSCHW[:, -1], theirs, rtol=1e-4, atol=1e-4)


def test_another_family_is_refused_with_those_that_are_supported(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "_class_name": "KandinskyPipeline"}))
    with pytest.raises(ModelError, match=r"not supported.*KandinskyPipeline.*StableDiffusionPipeline"):
        Policy(str(other), trainable=Lora(), seed=0)


def test_a_missing_part_is_named(model: Path, tmp_path: Path) -> None:
    for part in (folder.name for folder in model.iterdir() if folder.is_dir() and folder.name != "feature_extractor"):
        torn = shutil.copytree(model, tmp_path / part)
        shutil.rmtree(torn / part)
        with pytest.raises(ModelError, match=rf"the {part} of the base model"):
            Policy(str(torn), trainable=Lora(), seed=0)


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
