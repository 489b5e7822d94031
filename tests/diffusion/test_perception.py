"""Perceptual errors against closed forms, diffusers and a real U-Net: N1 to N7, N10 to N14."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffusion.conditioning import Conditioning
from diffusion.kernels import noised, predicted_noise_and_clean
from diffusion.perception import (
    Blocks,
    Encode,
    Encoder,
    InputConstants,
    Norm,
    Target,
    make_encoder,
    perceptual_error,
    perceptual_target,
    step_constants,
    uniform_constants,
)
from diffusion.policy import Policy
from diffusion.schedules import noise_level
from diffusion.weights import weights_digest
from learner.algorithms.preference import preference
from protocol.algorithms import Perception
from protocol.errors import ModelError
from protocol.recipe import Full, Lora

ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
"""The scaled-linear schedule of Stable Diffusion 1.x."""

BLOCKS: tuple[Blocks, ...] = ("down", "down_mid", "mid", "multi")
NORMS: tuple[Norm, ...] = ("none", "relative", "k2")
WEIGHTS = ("frozen_base", "random_init", "live")
PROMPTS = ("a red seven", "a blue one", "", "a green four")


@dataclasses.dataclass(frozen=True)
class Problem:
    """N noised latents, the noise in them, an estimate of it, and what the encoder's input needs besides."""

    state: Tensor
    noise: Tensor
    estimate: Tensor
    step_noise: Tensor
    constants: InputConstants
    told: Conditioning

    def target(self, encode: Encode, norm: Norm = "none") -> Target:
        return perceptual_target(self.state, self.noise, self.step_noise, self.told, self.constants, encode, norm=norm)

    def error(self, encode: Encode, norm: Norm = "none", estimate: Tensor | None = None) -> Tensor:
        """The errors of an estimate, by default the problem's own."""
        return perceptual_error(self.estimate if estimate is None else estimate, self.target(encode, norm), encode)

    def gradient(self, encode: Encode, norm: Norm = "none") -> Tensor:
        """The gradient of the sum of errors in the estimate."""
        estimate = self.estimate.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self.error(encode, norm, estimate).sum(), estimate)
        return gradient

    def noise_error(self) -> Tensor:
        """The errors in noise space, latent_mean."""
        return (self.estimate - self.noise).square().flatten(1).mean(1)

    def item(self, index: int) -> Problem:
        """One item by itself."""
        at = torch.tensor([index])
        constants = InputConstants(*(getattr(self.constants, f.name)[at] for f in dataclasses.fields(self.constants)))
        latents = (self.state, self.noise, self.estimate, self.step_noise)
        return Problem(*(latent[at] for latent in latents), constants, self.told[at])

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype; constants stay fp64."""
        latents = (self.state, self.noise, self.estimate, self.step_noise)
        return Problem(
            *(latent.to(dtype) for latent in latents), self.constants, Conditioning(self.told.text_NLE.to(dtype))
        )


def make_problem(
    timesteps: Sequence[int],
    *,
    constants: InputConstants | None = None,
    told: Conditioning | None = None,
    shape: tuple[int, int, int] = (4, 8, 8),
    seed: int = 0,
) -> Problem:
    """Gaussian latents in fp64, and an estimate that is off by 0.3 an entry."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise, off, step_noise = torch.randn(4, len(timesteps), *shape, generator=generator, dtype=torch.float64)
    timestep = torch.tensor(timesteps)
    state = noised(x0, noise, noise_level(ALPHA_BAR, timestep))
    constants = constants or step_constants(ALPHA_BAR, timestep)
    told = told or Conditioning(torch.zeros(len(timesteps), 1, 1))
    return Problem(state, noise, noise + 0.3 * off, step_noise, constants, told)


def identity(state: Tensor, timestep: Tensor, told: Conditioning) -> list[Tensor]:
    """The encoder that is none."""
    return [state]


def linear(weight_VD: Tensor) -> Encode:
    """f(x) = W x."""
    return lambda state, timestep, told: [state.flatten(1) @ weight_VD.to(state.dtype).T]


def curved(state: Tensor, timestep: Tensor, told: Conditioning) -> list[Tensor]:
    """A smooth encoder with two blocks of different sizes."""
    return [torch.tanh(state), torch.sin(3 * state[:, :1]) + timestep[:, None, None, None] / 1000]


def random_matrix(*shape: int, seed: int = 5) -> Tensor:
    """A Gaussian matrix in fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the encoder's input ----------------------------------------------------------------------------------


def test_the_step_has_the_squared_factors_of_the_published_schedule() -> None:
    square = step_constants(ALPHA_BAR, torch.arange(1000)).k_N.square()
    at = {1: 4.3e-4, 50: 2.5e-5, 162: 1.7e-5, 500: 3.219e-5, 900: 1.1e-4, 999: 1.5e-4}
    for timestep, expected in at.items():
        assert square[timestep].item() == pytest.approx(expected, rel=0.03)
    assert square[1:].argmin().item() == 161
    assert square.mean().item() == pytest.approx(5.07e-5, rel=2e-3)
    shares = [part.sum() / square.sum() for part in square.split([100, 150, 250, 250, 250])]
    torch.testing.assert_close(
        torch.stack(shares), torch.tensor([0.086, 0.051, 0.118, 0.236, 0.509]).double(), atol=6e-4, rtol=0
    )


def test_a_batched_step_is_the_ddpm_step_of_diffusers_at_every_timestep() -> None:
    """N7: `fixed_small`, the posterior variance; timestep 0 has no step."""
    timesteps = range(1, 1000)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.alphas_cumprod = ALPHA_BAR
    problem = make_problem(timesteps, shape=(1, 2, 2))
    theirs = []
    for row, timestep in enumerate(timesteps):
        generator = torch.Generator().manual_seed(timestep)
        problem.step_noise[row] = torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64)[0]
        noise, state = problem.noise[row : row + 1], problem.state[row : row + 1]
        theirs.append(scheduler.step(noise, timestep, state, generator.manual_seed(timestep)).prev_sample)
    (ours,) = problem.target(identity).features
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=0, atol=1e-10)


def test_a_step_lands_one_timestep_lower_and_never_below_0() -> None:
    assert step_constants(ALPHA_BAR, torch.tensor([999, 500, 1, 0])).timestep_N.tolist() == [998, 499, 0, 0]


@pytest.mark.parametrize("norm", NORMS)
def test_at_timestep_0_every_estimate_has_error_0_and_gradient_0(norm: Norm) -> None:
    """N4."""
    problem = make_problem([0, 400, 0])
    target = problem.target(curved, norm)
    assert torch.equal(target.features[0][[0, 2]], torch.tanh(problem.state[[0, 2]]))
    assert target.dead_N.tolist() == [True, False, True]
    assert target.usable_N.all()
    assert (problem.error(curved, norm) > 0).tolist() == [False, True, False]
    assert problem.gradient(curved, norm).flatten(1).abs().sum(1).gt(0).tolist() == [False, True, False]


def test_a_dead_item_has_error_0_though_kernels_with_and_without_a_graph_round_differently() -> None:
    def encode(state: Tensor, timestep: Tensor, told: Conditioning) -> list[Tensor]:
        return [state + 1e-6 * torch.is_grad_enabled()]

    assert (make_problem([0, 400]).error(encode, "k2") > 0).tolist() == [False, True]


def test_uniform_input_is_the_predicted_image_renoised_with_the_predicted_noise() -> None:
    """N10."""
    now, fresh = torch.tensor([1, 300, 700, 999]), torch.tensor([999, 301, 20, 0])
    problem = make_problem(now.tolist(), constants=uniform_constants(ALPHA_BAR, now, fresh))
    noise, clean = predicted_noise_and_clean(
        problem.state,
        problem.noise,
        noise_level(ALPHA_BAR, now),
        "epsilon",  # type: ignore[arg-type]
    )
    (ours,) = problem.target(identity).features
    torch.testing.assert_close(ours, noised(clean, noise, noise_level(ALPHA_BAR, fresh)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(problem.error(identity), problem.constants.k_N**2 * problem.noise_error())
    assert problem.constants.timestep_N.tolist() == fresh.tolist()


def test_renoised_to_its_own_timestep_the_state_comes_back_whatever_the_estimate() -> None:
    """N10."""
    timestep = torch.arange(1000)
    constants = uniform_constants(ALPHA_BAR, timestep, timestep)
    problem = make_problem(timestep.tolist(), constants=constants, shape=(1, 1, 2))
    target = problem.target(identity)
    assert torch.equal(target.features[0], problem.state)
    assert target.dead_N.all()
    assert not problem.error(curved).any()


def test_the_uniform_factor_squared_has_the_published_mean_median_and_maximum() -> None:
    """N10."""
    now, fresh = torch.cartesian_prod(torch.arange(0, 1000, 3), torch.arange(0, 1000, 3)).unbind(1)
    square = uniform_constants(ALPHA_BAR, now, fresh).k_N.square()
    assert square.mean().item() == pytest.approx(6.3, abs=0.1)
    assert square.median().item() == pytest.approx(0.55, abs=0.01)
    assert 205 < square.max().item() < 215


# --- closed forms -----------------------------------------------------------------------------------------


def logit_and_gradient(error_Q2: Tensor, ref_Q2: Tensor, beta: float, estimate: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of one pair, and the loss's gradient in the estimate."""
    loss, metrics = preference(error_Q2, ref_Q2, torch.ones(1), beta=beta, normaliser=1)
    (gradient,) = torch.autograd.grad(loss, estimate, retain_graph=True)
    return metrics["pairs/margin"][0], gradient


@pytest.mark.parametrize("timestep", [1, 500, 999])
def test_with_identity_features_ncp_dpo_is_diffusion_dpo_up_to_k_squared(timestep: int) -> None:
    """N1: a pair is two items of one timestep, winner first."""
    problem = make_problem([timestep] * 2)
    ref = problem.noise + 0.5 * make_problem([timestep] * 2, seed=1).noise
    square = problem.constants.k_N[0].item() ** 2
    estimate = problem.estimate.clone().requires_grad_()
    noise_errors = [(e - problem.noise).square().flatten(1).mean(1)[None] for e in (estimate, ref)]
    errors = [problem.error(identity, estimate=e)[None] for e in (estimate, ref)]
    normed = [problem.error(identity, "k2", e)[None] for e in (estimate, ref)]
    logit, gradient = logit_and_gradient(noise_errors[0], noise_errors[1], 3.0, estimate)
    for pair, beta in ((errors, 3.0 / square), (normed, 3.0)):
        own_logit, own_gradient = logit_and_gradient(pair[0], pair[1], beta, estimate)
        torch.testing.assert_close(own_logit, logit, rtol=1e-8, atol=0)
        torch.testing.assert_close(own_gradient, gradient, rtol=1e-8, atol=1e-12)
    constant_beta, _ = logit_and_gradient(errors[0], errors[1], 3.0, estimate)
    assert (constant_beta / logit).item() == pytest.approx(square, rel=1e-8)


def test_an_orthonormal_encoder_scales_the_noise_error() -> None:
    """N2: c^2 k^2 e."""
    problem = make_problem([3, 250, 980], shape=(2, 3, 3))
    orthonormal, _ = torch.linalg.qr(random_matrix(18, 18))
    expected = 1.7**2 * problem.constants.k_N**2 * problem.noise_error()
    torch.testing.assert_close(problem.error(linear(1.7 * orthonormal)), expected, rtol=1e-8, atol=0)


def test_the_gradient_through_a_linear_encoder_is_its_gram_matrix_times_the_difference() -> None:
    """N2: 2 k^2 W^T W (eps - noise), over V features."""
    problem = make_problem([3, 250, 980], shape=(2, 3, 3))
    weight_VD = random_matrix(11, 18)
    difference_ND = (problem.estimate - problem.noise).flatten(1)
    expected = 2 * problem.constants.k_N[:, None] ** 2 * difference_ND @ weight_VD.T @ weight_VD / 11
    torch.testing.assert_close(problem.gradient(linear(weight_VD)).flatten(1), expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_the_true_noise_has_error_0_and_gradient_0(norm: Norm) -> None:
    """N4."""
    problem = make_problem([0, 1, 500, 999])
    exact = dataclasses.replace(problem, estimate=problem.noise)
    assert not exact.error(curved, norm).any()
    assert not exact.gradient(curved, norm).any()


def test_shared_step_noise_cancels_in_a_linear_encoder() -> None:
    """N5."""
    problem = make_problem([2, 500, 999])
    other = dataclasses.replace(problem, step_noise=make_problem([2, 500, 999], seed=1).step_noise)
    encode = linear(random_matrix(20, 256))
    torch.testing.assert_close(other.error(encode), problem.error(encode), rtol=1e-8, atol=0)


def test_step_noise_that_is_not_shared_adds_twice_its_variance() -> None:
    """N5, by Monte Carlo over 262,144 entries: 0.3 % standard error."""
    problem = make_problem([500], shape=(4, 256, 256))
    other = dataclasses.replace(problem, step_noise=make_problem([500], shape=(4, 256, 256), seed=1).step_noise)
    unshared = dataclasses.replace(problem.target(identity), features=other.target(identity).features)
    added = perceptual_error(problem.estimate, unshared, identity) - problem.error(identity)
    assert added.item() == pytest.approx(2 * problem.constants.sigma_N.item() ** 2, rel=0.01)
    assert added.item() > 2000 * problem.error(identity).item()


def test_blocks_count_alike_whatever_their_size() -> None:
    problem = make_problem([300, 700])

    def only(block: int) -> Encode:
        return lambda *inputs: curved(*inputs)[block : block + 1]

    for norm in NORMS:
        each = torch.stack([problem.error(only(block), norm) for block in (0, 1)])
        torch.testing.assert_close(problem.error(curved, norm), each.mean(0), rtol=1e-12, atol=0)


def test_relative_errors_do_not_depend_on_the_features_scale() -> None:
    problem = make_problem([300, 700])
    weight_VD = random_matrix(20, 256)
    error = problem.error(linear(weight_VD), "relative")
    energy = problem.target(linear(weight_VD)).features[0].square().mean(1)
    torch.testing.assert_close(error, problem.error(linear(weight_VD)) / energy, rtol=1e-12, atol=0)
    torch.testing.assert_close(problem.error(linear(1e3 * weight_VD), "relative"), error, rtol=1e-9, atol=0)


def test_features_without_energy_make_an_item_unusable_and_no_nan() -> None:
    def encode(state: Tensor, timestep: Tensor, told: Conditioning) -> list[Tensor]:
        return [state, torch.where(timestep[:, None] == 299, 0.0, state.flatten(1))]

    problem = make_problem([300, 700])
    assert problem.target(encode, "relative").usable_N.tolist() == [False, True]
    assert problem.target(encode, "none").usable_N.tolist() == [True, True]
    assert (problem.error(encode, "relative") > 0).tolist() == [False, True]
    gradient = problem.gradient(encode, "relative")
    assert not gradient[0].any()
    assert gradient[1].any()
    assert torch.isfinite(gradient).all()


def bf16_rounded(encode: Encode) -> Encode:
    """The encoder behind an input in half precision, with straight-through gradients."""
    return lambda state, *rest: encode(state + (state.bfloat16().to(state.dtype) - state).detach(), *rest)


def test_fp32_gives_the_logit_and_the_gradient_and_a_bf16_input_does_not() -> None:
    """N11: 62 pairs; theta's estimate differs from the reference's by 10 % of the latter's error."""
    timesteps = [*range(8, 1000, 16)] * 2
    problem = make_problem(timesteps)
    ref = problem.estimate
    trained = dataclasses.replace(problem, estimate=ref + 0.03 * make_problem(timesteps, seed=1).noise)

    def logits(problem: Problem, encode: Encode) -> Tensor:
        change_N = problem.error(encode) - problem.error(encode, estimate=ref.to(problem.state.dtype))
        winner, loser = change_N.double().chunk(2)
        return loser - winner

    def deviation(value: Tensor, exact: Tensor) -> float:
        return ((value - exact).norm() / exact.norm()).item()

    single, rounded = trained.to(torch.float32), bf16_rounded(identity)
    assert single.error(identity).dtype == torch.float32
    assert deviation(logits(single, identity), logits(trained, identity)) < 1e-3
    assert deviation(single.gradient(identity), trained.gradient(identity)) < 1e-4
    assert deviation(logits(single, rounded), logits(trained, identity)) > 0.3
    assert deviation(single.gradient(rounded), trained.gradient(identity)) > 0.3


# --- the U-Net's own encoder ------------------------------------------------------------------------------


def load(source: str, trainable: Lora | Full | None = None, dtype: torch.dtype = torch.float32) -> Policy:
    """A policy of the tiny model, without its decoder, whose weights have moved."""
    policy = Policy(source, trainable=trainable or Lora(rank=2, alpha=2.0), seed=0, dtype=dtype, with_decoder=False)
    policy.keep_reference()
    train_a_little(policy)
    return policy


@pytest.fixture(scope="module")
def lora(tiny_model: str) -> Policy:
    """A policy whose weights nobody changes."""
    return load(tiny_model)


def train_a_little(policy: Policy, seed: int = 1) -> None:
    """Moves every trained weight, as optimizer steps would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_state().values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def problem_of(policy: Policy, timesteps: Sequence[int] = (1, 200, 600, 999)) -> Problem:
    """Items of the policy's prompts, in its dtype."""
    told = policy.condition(PROMPTS[: len(timesteps)])
    return make_problem(timesteps, told=told).to(policy.dtype)


def features(encode: Encode, problem: Problem) -> Tensor:
    """All features of the items' own states."""
    with torch.no_grad():
        blocks = encode(problem.state, problem.constants.timestep_N, problem.told)
    return torch.cat([block.flatten(1) for block in blocks], dim=1)


def predict(policy: Policy, problem: Problem) -> Tensor:
    """The network's estimate of the items' noise."""
    timestep = problem.constants.timestep_N + 1
    return policy.denoiser(problem.state, timestep, encoder_hidden_states=problem.told.text_NLE).sample


def frozen_base(policy: Policy, blocks: Blocks = "down") -> Encoder:
    """The published encoder."""
    return make_encoder(policy, Perception(blocks=blocks), 0)


@contextmanager
def hooked(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Collects what modules return."""
    seen: list[Any] = []
    handles = [module.register_forward_hook(lambda _, __, output: seen.append(output)) for module in modules]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("trainable", [Lora(rank=2, alpha=2.0), Full(form="full")])
def test_features_are_the_hidden_states_of_a_full_pass_of_the_base(tiny_model: str, trainable: Lora | Full) -> None:
    """N13."""
    policy = load(tiny_model, trainable)
    problem = problem_of(policy)
    with (
        policy.reference(policy.denoiser) as base,
        torch.no_grad(),
        hooked([*base.down_blocks, base.mid_block]) as outputs,
    ):
        base(problem.state, problem.constants.timestep_N, encoder_hidden_states=problem.told.text_NLE)
    *down, middle = [output[0] if isinstance(output, tuple) else output for output in outputs]
    expected = {"down": down[-1:], "mid": [middle], "down_mid": [down[-1], middle], "multi": [*down, middle]}
    for blocks in BLOCKS:
        own = frozen_base(policy, blocks)(problem.state, problem.constants.timestep_N, problem.told)
        assert len(own) == len(expected[blocks])
        assert all(torch.equal(a, b) for a, b in zip(own, expected[blocks], strict=True))


def test_identity_blocks_are_the_latent_itself(lora: Policy) -> None:
    encode, problem = frozen_base(lora, "identity"), problem_of(lora)
    assert torch.equal(problem.error(encode), problem.error(identity))
    assert encode.num_forward == 0


@pytest.mark.parametrize("blocks", BLOCKS)
def test_no_up_block_is_run_and_every_encoded_latent_is_counted(lora: Policy, blocks: Blocks) -> None:
    """N14: one encoding an item for the target, one for each estimate."""
    encode, problem = frozen_base(lora, blocks), problem_of(lora)
    estimate = predict(lora, problem).detach().requires_grad_()
    never = [*lora.denoiser.up_blocks, lora.denoiser.conv_out, *([lora.denoiser.mid_block] if blocks == "down" else [])]
    with hooked(never) as outputs:
        target = problem.target(encode)
        assert encode.num_forward == 4
        perceptual_error(estimate, target, encode).sum().backward()
        assert encode.num_forward == 8
    assert not outputs


@pytest.mark.parametrize("trainable", [Lora(rank=2, alpha=2.0), Full(form="full")])
def test_training_leaves_the_frozen_encoder_bit_for_bit(tiny_model: str, trainable: Lora | Full) -> None:
    """N6."""
    policy = load(tiny_model, trainable)
    encode, problem = frozen_base(policy, "multi"), problem_of(policy)
    target, before = problem.target(encode), features(encode, problem)
    with policy.reference(policy.denoiser) as base:
        frozen = {name: p for name, p in base.named_parameters() if "lora" not in name}
        digest = weights_digest(frozen)
    trained = [p for p in policy.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    errors = []
    for _ in range(3):
        error = perceptual_error(predict(policy, problem), target, encode)
        errors.append(error.sum().item())
        optimizer.zero_grad()
        error.sum().backward()
        optimizer.step()
    assert errors[0] > errors[1] > errors[2]
    assert torch.equal(features(encode, problem), before)
    assert weights_digest(frozen) == digest
    assert all(parameter.grad is None for parameter in frozen.values())


def settings_of(weights: str) -> Perception:
    """All blocks of an encoder of the given weights."""
    return Perception.model_validate({"blocks": "multi", "encoder_weights": weights})


@pytest.mark.parametrize("trainable", [Lora(rank=2, alpha=2.0), Full(form="full")])
def test_gradients_reach_the_weights_through_the_estimate_alone(tiny_model: str, trainable: Lora | Full) -> None:
    """N6: the chain rule over estimate -> weights is the whole gradient."""
    policy = load(tiny_model, trainable, torch.float64)
    trained = [p for p in policy.denoiser.parameters() if p.requires_grad]
    for weights in WEIGHTS:
        encode, problem = make_encoder(policy, settings_of(weights), 0), problem_of(policy)
        estimate = predict(policy, problem)
        error = problem.error(encode, "k2", estimate).sum()
        whole = torch.autograd.grad(error, trained, retain_graph=True, materialize_grads=True)
        problem = dataclasses.replace(problem, estimate=estimate.detach())
        by_parts = torch.autograd.grad(estimate, trained, problem.gradient(encode, "k2"), materialize_grads=True)
        assert sum(float(part.abs().sum()) for part in whole) > 0
        for one, other in zip(whole, by_parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert all(parameter.requires_grad for parameter in trained)


def test_the_target_has_no_graph(lora: Policy) -> None:
    """N6."""
    problem = problem_of(lora)
    problem = dataclasses.replace(problem, noise=problem.noise.clone().requires_grad_())
    target = problem.target(make_encoder(lora, settings_of("live"), 0), "relative")
    assert not any(tensor.requires_grad for tensor in (*target.features, target.input_NCHW, target.divisor_BN))


def test_an_encoder_that_cuts_the_graph_is_detected(lora: Policy) -> None:
    """N6."""
    encode, problem = frozen_base(lora), problem_of(lora)
    estimate = predict(lora, problem)
    with pytest.raises(ValueError, match="no gradient would reach the network"):
        problem.error(torch.no_grad()(encode), estimate=estimate)
    assert not problem.error(encode, estimate=estimate.detach()).requires_grad


def test_encoders_keep_their_weights_where_the_reference_is_evaluated(lora: Policy) -> None:
    """A probe runs its encoder there too, and leaves adapters as it found them."""
    problem = problem_of(lora)
    encoders = [make_encoder(lora, settings_of(weights), 0) for weights in WEIGHTS]
    outside = [features(encode, problem) for encode in encoders]
    with torch.no_grad():
        trained = predict(lora, problem)
        with lora.reference(lora.denoiser):
            base = predict(lora, problem)
            inside = [features(encode, problem) for encode in encoders]
            assert torch.equal(predict(lora, problem), base)
        assert torch.equal(predict(lora, problem), trained)
    assert not torch.equal(trained, base)
    assert all(torch.equal(a, b) for a, b in zip(outside, inside, strict=True))
    assert not any(torch.equal(outside[a], outside[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("trainable", [Lora(rank=2, alpha=2.0), Full(form="full")])
def test_only_the_live_encoder_follows_training(tiny_model: str, trainable: Lora | Full) -> None:
    policy = load(tiny_model, trainable)
    problem = problem_of(policy)
    encoders = [make_encoder(policy, settings_of(weights), 0) for weights in WEIGHTS]
    before = [features(encode, problem) for encode in encoders]
    train_a_little(policy, seed=2)
    same = [torch.equal(features(encode, problem), old) for encode, old in zip(encoders, before, strict=True)]
    assert same == [True, True, False]


def test_random_weights_depend_on_the_seed_alone(lora: Policy) -> None:
    problem, settings = problem_of(lora), settings_of("random_init")
    first = features(make_encoder(lora, settings, 3), problem)
    torch.manual_seed(17)
    expected_next = torch.rand(1)
    torch.manual_seed(17)
    assert torch.equal(features(make_encoder(lora, settings, 3), problem), first)
    assert torch.equal(torch.rand(1), expected_next)
    assert not torch.equal(features(make_encoder(lora, settings, 4), problem), first)


def test_a_batch_in_any_order_is_its_items_one_by_one(tiny_model: str) -> None:
    """N12: in fp64, where rounding cannot hide a mixed-up item."""
    policy = load(tiny_model, dtype=torch.float64)
    encode, problem = frozen_base(policy, "multi"), problem_of(policy)
    for norm in NORMS:
        items = [problem.item(index).error(encode, norm) for index in (3, 1, 0, 2)]
        torch.testing.assert_close(problem.error(encode, norm)[[3, 1, 0, 2]], torch.cat(items), rtol=1e-6, atol=0)


def test_untrained_ncp_dpo_has_loss_ln_2_accuracy_one_half_and_a_gradient(tiny_model: str) -> None:
    """N3: items 0 and 1 are a pair, and so are 2 and 3."""
    policy = Policy(tiny_model, trainable=Lora(rank=2, alpha=2.0), seed=0, with_decoder=False)
    encode = frozen_base(policy)
    problem = problem_of(policy, (300, 300, 800, 800))
    target = problem.target(encode)
    with torch.no_grad(), policy.reference(policy.denoiser):
        error_ref = perceptual_error(predict(policy, problem), target, encode)
    error = perceptual_error(predict(policy, problem), target, encode)
    loss, metrics = preference(error.view(2, 2), error_ref.view(2, 2), torch.ones(2), beta=2500.0, normaliser=2)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert metrics["pairs/accuracy"].tolist() == [1.0, 2.0]
    assert any(p.grad is not None and bool(p.grad.any()) for p in policy.denoiser.parameters())


# --- refusals ---------------------------------------------------------------------------------------------


def test_an_encoder_in_bf16_is_refused(tiny_model: str) -> None:
    policy = load(tiny_model, dtype=torch.bfloat16)
    for weights in WEIGHTS:
        with pytest.raises(ModelError, match=r"must compute in fp32.*set learner\.precision: fp32"):
            make_encoder(policy, settings_of(weights), 0)


@pytest.mark.parametrize("name", ["state", "noise", "step_noise"])
def test_latents_in_half_precision_not_finite_or_of_another_shape_are_refused(name: str) -> None:
    problem = make_problem([5, 6])
    value = getattr(problem, name)
    infinite = value.clone()
    infinite[1, 0, 0, 0] = math.inf
    wrong = {"is fp32, but": value.bfloat16(), "non-finite": infinite, "of one shape": value[:1]}
    for message, latent in wrong.items():
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(problem, **{name: latent}).target(identity)


def test_an_estimate_in_half_precision_or_of_another_shape_is_refused() -> None:
    problem = make_problem([5, 6])
    for message, estimate in (("is fp32, but", problem.estimate.half()), ("of one shape", problem.estimate[:1])):
        with pytest.raises(ValueError, match=message):
            problem.error(identity, estimate=estimate)


@pytest.mark.parametrize("timestep", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(timestep: int) -> None:
    inside, outside = torch.tensor([5, 6]), torch.tensor([5, timestep])
    with pytest.raises(ValueError, match="from 0 to 999"):
        step_constants(ALPHA_BAR, outside)
    with pytest.raises(ValueError, match="from 0 to 999"):
        uniform_constants(ALPHA_BAR, inside, outside)
