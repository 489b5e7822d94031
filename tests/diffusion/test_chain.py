"""Sampling and replaying whole trajectories: K-T11 (replay is exact), K-T12 (no draw depends on company); real
images' trajectories (S-T11)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from diffusion.chain import Chain, Trajectories
from diffusion.kernels import noised, teacher_forced_transition
from diffusion.noise import initial_noise, step_noise
from diffusion.policy import Policy
from learner.batching import items_where
from learner.parity import TOLERANCE_WITHOUT_WINDOW
from protocol.recipe import Lora, Sampler

PROMPT = "a red seven"
SEEDS = (11, 12, 13)


def make_chain(source: str, *, trained: bool = True, **sampler: Any) -> Chain:
    """A chain of four steps over the tiny model, its adapters moved away from the base."""
    policy = Policy(source, trainable=Lora(rank=2, alpha=2.0), seed=0)
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.trainable_state().values():
        parameter.add_(0.1 * trained * torch.randn(parameter.shape, generator=generator))
    return Chain(policy, Sampler(**{"num_steps": 4, **sampler}))


@torch.no_grad()
def replay(chain: Chain, drawn: Trajectories, micro_batch_size: int) -> Tensor:
    """Scores a group as the learner does: micro-batches of (sibling, step) items, (G, T) fp64."""
    latents_GSCHW = drawn.latents_GSCHW.float()
    result_GT = torch.zeros_like(drawn.log_prob_GT)
    scored_1GT = drawn.scored_T.expand_as(result_GT)[None]
    for item_N3 in items_where(scored_1GT).split(micro_batch_size):
        _, sibling_N, step_N = item_N3.unbind(1)
        result_GT[sibling_N, step_N] = chain.step(
            chain.policy.denoiser,
            latents_GSCHW[sibling_N, step_N],
            step_N,
            chain.policy.condition([PROMPT])[torch.zeros_like(sibling_N)],
            next_state_NCHW=latents_GSCHW[sibling_N, step_N + 1],
        ).log_prob_N
    return result_GT


def equal(first: Trajectories, second: Trajectories) -> bool:
    """True if two groups agree bit for bit."""
    return torch.equal(first.latents_GSCHW, second.latents_GSCHW) and torch.equal(first.log_prob_GT, second.log_prob_GT)


@pytest.mark.parametrize(("kernel", "last_step"), [("ddim", "unscored"), ("ddpm", "clamp")])
@pytest.mark.parametrize("wire_dtype", ["float32", "float16"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_replaying_a_group_in_the_samplers_batches_gives_the_same_bits(
    tiny_model: str, kernel: str, wire_dtype: str, guidance_scale: float, last_step: str
) -> None:
    chain = make_chain(
        tiny_model, kernel=kernel, wire_dtype=wire_dtype, guidance_scale=guidance_scale, last_step=last_step
    )
    drawn = chain.sample(PROMPT, SEEDS)
    assert torch.equal(replay(chain, drawn, micro_batch_size=len(SEEDS)), drawn.log_prob_GT)


@pytest.mark.parametrize("wire_dtype", ["float32", "float16"])
@pytest.mark.parametrize("micro_batch_size", [1, 4, 100])
def test_replaying_a_group_in_other_batches_agrees_within_the_parity_tolerance(
    tiny_model: str, wire_dtype: str, micro_batch_size: int
) -> None:
    chain = make_chain(tiny_model, wire_dtype=wire_dtype, guidance_scale=4.0)
    drawn = chain.sample(PROMPT, SEEDS)
    gap_GT = (replay(chain, drawn, micro_batch_size) - drawn.log_prob_GT).abs()
    assert gap_GT.max().item() / drawn.latents_GSCHW[0, 0].numel() < TOLERANCE_WITHOUT_WINDOW


def test_trajectories_start_at_the_seeds_noise_and_say_what_they_are(tiny_model: str) -> None:
    for wire_dtype in (torch.float32, torch.float16):
        chain = make_chain(tiny_model, wire_dtype=str(wire_dtype).removeprefix("torch."))
        drawn = chain.sample(PROMPT, SEEDS)
        start = initial_noise(SEEDS, chain.policy.latent_shape_CHW, shared=False).to(wire_dtype)
        assert drawn.latents_GSCHW.dtype == wire_dtype
        assert torch.equal(drawn.latents_GSCHW[:, 0], start)
        assert drawn.log_prob_GT.dtype == torch.float64
        assert drawn.scored_T.tolist() == [True, True, True, False]
        assert (drawn.log_prob_GT[:, -1] == 0).all()
        assert (drawn.log_prob_GT[:, :-1] != 0).all()


def test_every_step_is_driven_by_the_noise_of_its_own_key(tiny_model: str) -> None:
    chain = make_chain(tiny_model, last_step="clamp")
    shape_CHW = chain.policy.latent_shape_CHW
    states = chain.sample(PROMPT, SEEDS).latents_GSCHW.unbind(1)
    for step in range(len(chain.schedule)):
        step_N = torch.full((len(SEEDS),), step)
        with torch.no_grad():
            scored = chain.step(
                chain.policy.denoiser,
                states[step],
                step_N,
                chain.policy.condition([PROMPT] * len(SEEDS)),
                next_state_NCHW=states[step + 1],
            )
        noise = (states[step + 1] - scored.mean_NCHW) / scored.sigma_N.view(-1, 1, 1, 1).float()
        torch.testing.assert_close(noise, step_noise(SEEDS, step, shape_CHW), rtol=1e-3, atol=1e-3)


def test_siblings_that_share_initial_noise_part_at_the_first_step(tiny_model: str) -> None:
    drawn = make_chain(tiny_model, share_initial_noise=True).sample(PROMPT, SEEDS)
    states = drawn.latents_GSCHW.flatten(2)
    assert len(torch.unique(states[:, 0], dim=0)) == 1
    assert len(torch.unique(states[:, 1], dim=0)) == len(SEEDS)


def test_a_group_does_not_depend_on_what_was_sampled_before_or_on_global_randomness(tiny_model: str) -> None:
    expected = make_chain(tiny_model).sample(PROMPT, SEEDS)
    chain = make_chain(tiny_model)
    torch.manual_seed(99)
    for prompt, seeds in (("a blue one", (1, 2)), ("", (11,)), (PROMPT, (13, 12, 11))):
        chain.sample(prompt, seeds)
    assert equal(chain.sample(PROMPT, SEEDS), expected)


def test_sampling_leaves_the_global_generator_alone(tiny_model: str) -> None:
    chain = make_chain(tiny_model)
    state = torch.get_rng_state()
    chain.sample(PROMPT, SEEDS)
    assert torch.equal(torch.get_rng_state(), state)


def test_permuting_the_seeds_permutes_the_siblings(tiny_model: str) -> None:
    chain = make_chain(tiny_model)
    forward, backward = chain.sample(PROMPT, SEEDS), chain.sample(PROMPT, SEEDS[::-1])
    torch.testing.assert_close(backward.latents_GSCHW.flip(0), forward.latents_GSCHW, rtol=0, atol=1e-4)


def test_the_caller_is_told_after_each_step(tiny_model: str) -> None:
    calls: list[int] = []
    make_chain(tiny_model).sample(PROMPT, SEEDS, after_step=lambda: calls.append(len(calls)))
    assert calls == [0, 1, 2, 3]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_deterministic_chain_is_the_diffusers_pipeline(tiny_model: str, guidance_scale: float) -> None:
    chain = make_chain(
        tiny_model, trained=False, num_steps=6, eta=0.0, guidance_scale=guidance_scale, last_step="clamp"
    )
    drawn = chain.sample(PROMPT, SEEDS)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [PROMPT] * len(SEEDS),
        num_inference_steps=6,
        guidance_scale=guidance_scale,
        latents=drawn.latents_GSCHW[:, 0].clone(),
        output_type="latent",
    ).images
    torch.testing.assert_close(drawn.latents_GSCHW[:, -1], theirs, rtol=1e-4, atol=1e-4)
    assert not drawn.scored_T.any()


def test_the_velocity_model_samples_what_its_outputs_mean(tiny_velocity_model: str) -> None:
    chain = make_chain(tiny_velocity_model, trained=False, num_steps=6, eta=0.0, last_step="clamp")
    drawn = chain.sample(PROMPT, SEEDS)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_velocity_model)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [PROMPT] * len(SEEDS),
        num_inference_steps=6,
        guidance_scale=1.0,
        latents=drawn.latents_GSCHW[:, 0].clone(),
        output_type="latent",
    ).images
    torch.testing.assert_close(drawn.latents_GSCHW[:, -1], theirs, rtol=1e-4, atol=1e-4)


def test_chains_of_equal_settings_have_equal_descriptions(tiny_model: str) -> None:
    assert make_chain(tiny_model).description == make_chain(tiny_model, trained=False).description


def test_the_description_changes_with_every_setting(tiny_model: str) -> None:
    chain = make_chain(tiny_model)
    changes: list[dict[str, Any]] = [
        {"kernel": "ddpm"},
        {"num_steps": 5},
        {"eta": 0.5},
        {"guidance_scale": 2.0},
        {"last_step": "clamp"},
        {"share_initial_noise": True},
        {"wire_dtype": "float16"},
    ]
    changed = [Chain(chain.policy, Sampler(**{"num_steps": 4, **change})) for change in changes]
    assert len({chain.description, *(other.description for other in changed)}) == len(changes) + 1
    assert {name for change in changes for name in change} == set(Sampler.model_fields)


def test_the_description_changes_with_the_prediction_type(tiny_model: str, tiny_velocity_model: str) -> None:
    assert make_chain(tiny_model).description != make_chain(tiny_velocity_model).description


def test_sampling_is_the_same_on_arrays_that_crossed_the_wire(tiny_model: str) -> None:
    """The wire carries numpy arrays of the wire's dtype; nothing of the chain is lost in them."""
    chain = make_chain(tiny_model, wire_dtype="float16")
    drawn = chain.sample(PROMPT, SEEDS)
    arrived = Trajectories(
        *(
            torch.from_numpy(np.frombuffer(t.numpy().tobytes(), t.numpy().dtype).reshape(t.shape).copy())
            for t in (drawn.latents_GSCHW, drawn.log_prob_GT, drawn.scored_T)
        )
    )
    assert torch.equal(replay(chain, arrived, micro_batch_size=len(SEEDS)), drawn.log_prob_GT)


# Trajectories of real images.


def real_images(chain: Chain, num_images: int = len(SEEDS)) -> Tensor:
    """Latents that no model made, (N, C, H, W) fp32, on the wire's grid."""
    shape_CHW = chain.policy.latent_shape_CHW
    images_NCHW = 0.5 * torch.randn(num_images, *shape_CHW, generator=torch.Generator().manual_seed(8))
    return images_NCHW.to(chain.wire_dtype).float()


@pytest.mark.parametrize(("kernel", "last_step"), [("ddim", "unscored"), ("ddpm", "clamp")])
@pytest.mark.parametrize("wire_dtype", ["float32", "float16"])
def test_a_real_images_trajectory_is_fed_the_states_and_the_noises_that_others_can_replay(
    tiny_model: str, kernel: str, wire_dtype: str, last_step: str
) -> None:
    chain = make_chain(tiny_model, kernel=kernel, wire_dtype=wire_dtype, last_step=last_step)
    images_NCHW, shape_CHW = real_images(chain), chain.policy.latent_shape_CHW
    latents_NSCHW = chain.teacher_forced(images_NCHW, SEEDS)
    assert latents_NSCHW.dtype == chain.wire_dtype
    assert latents_NSCHW.shape == (len(SEEDS), len(chain.schedule) + 1, *shape_CHW)
    step_of_all = [chain.schedule.at(torch.full((len(SEEDS),), step)) for step in range(len(chain.schedule))]
    start = noised(images_NCHW, initial_noise(SEEDS, shape_CHW, shared=False), step_of_all[0])
    assert torch.equal(latents_NSCHW[:, 0], start.to(chain.wire_dtype))
    for step, constants in enumerate(step_of_all):
        drawn = teacher_forced_transition(
            latents_NSCHW[:, step].float(), images_NCHW, constants, noise_NCHW=step_noise(SEEDS, step, shape_CHW)
        )
        assert torch.equal(latents_NSCHW[:, step + 1], drawn.next_state_NCHW.to(chain.wire_dtype))


@pytest.mark.parametrize("wire_dtype", ["float32", "float16"])
def test_a_real_images_trajectory_ends_at_the_image_unless_the_last_step_is_clamped(
    tiny_model: str, wire_dtype: str
) -> None:
    ddim = make_chain(tiny_model, wire_dtype=wire_dtype)
    changes: list[dict[str, Any]] = [{"kernel": "ddpm"}, {"last_step": "clamp"}]
    ddpm, clamped = (Chain(ddim.policy, ddim.sampler.model_copy(update=change)) for change in changes)
    images_NCHW = real_images(ddim)
    for chain in (ddim, ddpm):
        assert torch.equal(chain.teacher_forced(images_NCHW, SEEDS)[:, -1].float(), images_NCHW)
    gap = clamped.teacher_forced(images_NCHW, SEEDS)[:, -1].float() - images_NCHW
    assert 0.01 < gap.std().item() < 0.1


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_states_of_real_images_have_the_forward_marginals(tiny_model: str, eta: float) -> None:
    chain = make_chain(tiny_model, eta=eta)
    images_NCHW = real_images(chain, num_images=200)
    latents_NSCHW = chain.teacher_forced(images_NCHW, range(200))
    for step in range(len(chain.schedule)):
        signal, level = chain.schedule.signal_N[step], chain.schedule.noise_N[step]
        noise = (latents_NSCHW[:, step] - signal * images_NCHW) / level
        # Five standard errors.
        assert abs(noise.mean().item()) < 5 / noise.numel() ** 0.5
        assert noise.var().item() == pytest.approx(1, abs=5 * (2 / noise.numel()) ** 0.5)


def test_a_real_images_trajectory_depends_on_its_own_image_and_seed_and_on_no_network(tiny_model: str) -> None:
    chain = make_chain(tiny_model)
    images_NCHW, state = real_images(chain), torch.get_rng_state()
    together = chain.teacher_forced(images_NCHW, SEEDS)
    assert torch.equal(chain.teacher_forced(images_NCHW[[2, 1]], (SEEDS[2], SEEDS[1])), together[[2, 1]])
    assert torch.equal(make_chain(tiny_model, trained=False).teacher_forced(images_NCHW, SEEDS), together)
    shared = Chain(chain.policy, Sampler(num_steps=4, share_initial_noise=True, guidance_scale=4.0))
    assert torch.equal(shared.teacher_forced(images_NCHW, SEEDS), together)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_policy_finds_a_density_at_every_scored_step_of_a_real_images_trajectory(tiny_model: str) -> None:
    chain = make_chain(tiny_model, guidance_scale=4.0)
    latents_NSCHW = chain.teacher_forced(real_images(chain), SEEDS)
    scored_T = chain.schedule.scored_N
    arrived = Trajectories(latents_NSCHW, torch.zeros(len(SEEDS), len(scored_T), dtype=torch.float64), scored_T)
    log_prob_GT = replay(chain, arrived, micro_batch_size=5)
    assert torch.isfinite(log_prob_GT).all()
    assert (log_prob_GT[:, :-1] != 0).all()
    assert (log_prob_GT[:, -1] == 0).all()


def test_the_caller_is_told_after_each_step_of_a_real_images_trajectory(tiny_model: str) -> None:
    calls: list[int] = []
    chain = make_chain(tiny_model)
    chain.teacher_forced(real_images(chain), SEEDS, after_step=lambda: calls.append(len(calls)))
    assert calls == [0, 1, 2, 3]


def test_real_images_without_a_seed_each_or_of_another_shape_are_refused(tiny_model: str) -> None:
    chain = make_chain(tiny_model)
    images_NCHW = real_images(chain)
    for wrong in (images_NCHW[:1], images_NCHW[:, :, :-1], images_NCHW[0]):
        with pytest.raises(ValueError, match="3 seeds need latents of shape"):
            chain.teacher_forced(wrong, SEEDS)
