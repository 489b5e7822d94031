"""Stable Diffusion 1.5 at its real size, with random weights: a group is sampled, learnt from, and exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from bench.models import make_sd15
from diffusion.chain import Chain
from diffusion.policy import Policy
from diffusion.weights import weights_digest
from learner.engine import Engine
from learner.update import Tools
from learner.updaters import make_updater
from protocol.groups import Group
from protocol.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("gang_of_one")]
PROMPT, G = "a photograph of a lighthouse at dusk", 2


def recipe_of(model: Path) -> Recipe:
    """Two siblings of two steps, of which one is scored; rollouts and learner share their batch."""
    return Recipe.model_validate(
        {
            "rounds": 1,
            "model": {"path": str(model)},
            "prompts": {"train": "of the test"},
            "batch": {"num_groups": 1, "group_size": G},
            "sampler": {"num_steps": 2},
            "rewards": [{"name": "jpeg_compressibility"}],
            "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
            "learner": {"learning_rate": 1e-3, "micro_batch_size": G, "gradient_checkpointing": True},
        }
    )


def sampled(chain: Chain) -> Group:
    """A group as a rollout makes it, of which the second sibling is the better one."""
    drawn = chain.sample(PROMPT, range(G))
    arrays = {
        "latents_GSCHW": drawn.latents_GSCHW.numpy(),
        "log_prob_GT": drawn.log_prob_GT.numpy(),
        "scored_T": drawn.scored_T.numpy(),
        "reward_G": np.arange(G, dtype=np.float32),
    }
    return Group("000000-0000", 0, 0, PROMPT, 0, "", chain.description, "", "w", 0.0, 0.0, G, 2 * G, arrays)


def base_digest(policy: Policy) -> str:
    """The digest of the pretrained weights below the adapters, by the names that they had without."""
    state = policy.denoiser.state_dict()
    return weights_digest({name.replace(".base_layer", ""): t for name, t in state.items() if "lora_" not in name})


def test_a_real_u_net_learns_on_one_step_and_its_adapter_is_exported(tmp_path: Path) -> None:
    recipe = recipe_of(make_sd15(tmp_path / "sd15"))
    policy = Policy.from_recipe(recipe, with_decoder=False)
    policy.forget_activations()
    engine = Engine(policy.denoiser, recipe.learner, torch.device("cpu"))
    chain = Chain(policy, recipe.sampler)
    group = sampled(chain)
    assert group.arrays["latents_GSCHW"].shape == (G, 3, 4, 64, 64)
    assert group.non_finite_field() is None

    report = make_updater(Tools(recipe, chain, engine, lambda: None)).learn([group], 0, None)

    assert report.parity_max_abs == 0, "the learner computes what the rollout has stored"
    assert report.kl == 0, "the policy began as its reference"
    assert np.isfinite(report.loss).all()
    assert report.loss != [0.0]
    assert report.grad_norm[0] > 0
    assert base_digest(policy) == policy.base_digest
    state = policy.trainable_state()
    assert len(state) == 2 * 160
    assert all(tensor.isfinite().all() and tensor.any() for tensor in state.values()), "adapters end in 0 at first"

    policy.export(tmp_path / "export")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "sd15", dtype=torch.bfloat16)
    pipeline.load_lora_weights(tmp_path / "export")
    loaded = {
        name.replace("default_0", "default"): p for name, p in pipeline.unet.named_parameters() if "lora_" in name
    }
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor.to(torch.bfloat16)) for name, tensor in state.items())
