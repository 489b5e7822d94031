"""The transition kernel against closed forms: K-T1 to K-T4, K-T8, and the guidance arithmetic of K-T7; the
teacher-forced kernel (S-T11) and the kernel KL (B8)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.kernels import (
    Transition,
    guide,
    kernel_kl_latent_mean,
    log_prob_latent_sum,
    log_ratio_difference_form,
    noised,
    predicted_noise_and_clean,
    teacher_forced_transition,
    transition,
)
from diffusion.schedules import StepConstants, make_schedule

Kernel = Literal["ddim", "ddpm"]
KERNELS: tuple[Kernel, ...] = ("ddim", "ddpm")
ALPHA_BAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
"""The scaled-linear schedule of Stable Diffusion 1.x."""


def schedule(timesteps: list[int], *, kernel: Kernel = "ddim", eta: float = 1.0, clamp: bool = False) -> StepConstants:
    """Constants of a chain on the SD schedule; `clamp` keeps noise in the last step."""
    return make_schedule(
        ALPHA_BAR,
        torch.tensor(timesteps),
        kernel=kernel,
        eta=eta,
        last_step="clamp" if clamp else "unscored",
    )


def step_of(constants: StepConstants, step: int, num_chains: int = 1) -> StepConstants:
    """One step's constants for each of N chains."""
    return constants.at(torch.full((num_chains,), step))


def scalar(*values: float) -> Tensor:
    """One-entry latents, (N, 1, 1, 1) fp64."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw(constants: StepConstants, state: Tensor, output: Tensor, noise: Tensor, wire: torch.dtype) -> Transition:
    """Draws with an epsilon-predicting network's output."""
    return transition(state, output, constants, prediction_type="epsilon", noise_NCHW=noise, wire_dtype=wire)


def score(constants: StepConstants, state: Tensor, output: Tensor, next_state: Tensor) -> Transition:
    """Scores a given next state with an epsilon-predicting network's output."""
    return transition(state, output, constants, prediction_type="epsilon", next_state_NCHW=next_state)


def log_density(point: Tensor, mean: Tensor, sigma_N: Tensor) -> Tensor:
    """ln N(point; mean, sigma^2 I) by torch.distributions, summed over latent entries in fp64."""
    sigma = sigma_N.double().view(-1, 1, 1, 1)
    return torch.distributions.Normal(mean.double(), sigma).log_prob(point.double()).flatten(1).sum(1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_step_from_500_to_480_has_the_published_mean_and_variance(kernel: Kernel) -> None:
    constants = step_of(schedule([500, 480], kernel=kernel), 0)
    drawn = draw(constants, scalar(1.3), scalar(-0.4), scalar(0.0), torch.float64)
    assert drawn.mean_NCHW.item() == pytest.approx(1.40725, abs=5e-6)
    assert drawn.sigma_N.item() ** 2 == pytest.approx(0.086689, abs=5e-7)


@given(state=st.floats(-5, 5), output=st.floats(-5, 5), timestep=st.integers(20, 999), gap=st.integers(1, 19))
def test_ddim_with_eta_one_is_ddpm_ancestral(state: float, output: float, timestep: int, gap: int) -> None:
    ddim, ddpm = (
        draw(
            step_of(schedule([timestep, timestep - gap], kernel=kernel), 0),
            scalar(state),
            scalar(output),
            scalar(0.7),
            torch.float64,
        )
        for kernel in KERNELS
    )
    assert torch.equal(ddim.sigma_N, ddpm.sigma_N)
    # Relative to the size of the terms: the two may cancel to nearly nothing.
    scale = abs(state) + abs(output) + 1e-300
    assert abs(ddim.mean_NCHW - ddpm.mean_NCHW).item() <= 1e-12 * scale


@pytest.mark.parametrize("kernel", KERNELS)
def test_drawing_then_scoring_gives_the_density_of_the_drawn_noise(kernel: Kernel) -> None:
    constants = step_of(schedule([500, 480], kernel=kernel), 0, num_chains=3)
    state, output, noise = (normal(3, 4, 5, 6, seed=seed) for seed in range(3))
    drawn = draw(constants, state, output, noise, torch.float64)
    num_entries = 4 * 5 * 6
    expected = (
        -0.5 * noise.square().sum((1, 2, 3))
        - num_entries * drawn.sigma_N.log()
        - num_entries / 2 * math.log(2 * math.pi)
    )
    torch.testing.assert_close(drawn.log_prob_N, expected, rtol=0, atol=1e-9)
    assert torch.equal(score(constants, state, output, drawn.next_state_NCHW).log_prob_N, drawn.log_prob_N)


@pytest.mark.parametrize("kernel", KERNELS)
def test_with_a_half_precision_wire_the_density_is_that_of_the_rounded_point(kernel: Kernel) -> None:
    constants = step_of(schedule([500, 480], kernel=kernel), 0, num_chains=3)
    state, output, noise = (normal(3, 4, 5, 6, seed=seed) for seed in range(3))
    drawn = draw(constants, state, output, noise, torch.float16)
    arrived = drawn.next_state_NCHW.half()
    assert torch.equal(arrived.double(), drawn.next_state_NCHW)
    expected = log_density(arrived, drawn.mean_NCHW, drawn.sigma_N)
    torch.testing.assert_close(drawn.log_prob_N, expected, rtol=0, atol=1e-9)
    assert torch.equal(score(constants, state, output, arrived).log_prob_N, drawn.log_prob_N)
    exact = draw(constants, state, output, noise, torch.float64)
    assert (exact.log_prob_N - drawn.log_prob_N).abs().min() > 1e-6


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("timesteps", "step"), [([999, 949], 0), ([500, 480], 0), ([41, 21, 1], 1), ([1], 0)])
def test_a_one_dimensional_kernel_integrates_to_one(kernel: Kernel, timesteps: list[int], step: int) -> None:
    constants = schedule(timesteps, kernel=kernel, clamp=True)
    grid = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    state, output = scalar(0.9).expand(len(grid), 1, 1, 1), scalar(0.2).expand(len(grid), 1, 1, 1)
    scored = score(step_of(constants, step, len(grid)), state, output, grid.view(-1, 1, 1, 1))
    assert torch.trapezoid(scored.log_prob_N.exp(), grid).item() == pytest.approx(1, abs=1e-6)


def test_a_one_dimensional_kernel_with_partial_noise_integrates_to_one() -> None:
    constants = step_of(schedule([500, 480], eta=0.3), 0, 20_001)
    grid = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    state = scalar(0.9).expand(len(grid), 1, 1, 1)
    scored = score(constants, state, 0.2 * state, grid.view(-1, 1, 1, 1))
    assert torch.trapezoid(scored.log_prob_N.exp(), grid).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_last_step_is_taken_but_has_no_density(kernel: Kernel) -> None:
    constants = step_of(schedule([21, 1], kernel=kernel), 1, num_chains=2)
    state, output, noise = (normal(2, 1, 2, 2, seed=seed, dtype=torch.float32) for seed in range(3))
    output.requires_grad_()
    drawn = draw(constants, state, output, noise, torch.float32)
    assert torch.equal(drawn.log_prob_N, torch.zeros(2, dtype=torch.float64))
    signal, level = constants.signal_N[0].float(), constants.noise_N[0].float()
    clean = (state - level * output) / signal
    torch.testing.assert_close(drawn.next_state_NCHW, clean)
    (gradient,) = torch.autograd.grad(drawn.log_prob_N.sum(), output)
    assert torch.equal(gradient, torch.zeros_like(output))


def test_an_unscored_step_beside_a_scored_one_leaves_its_density_and_gradient_alone() -> None:
    constants = schedule([21, 1]).at(torch.tensor([0, 1]))
    state, output, target = (normal(2, 1, 2, 2, seed=seed) for seed in range(3))
    output.requires_grad_()
    both = score(constants, state, output, target).log_prob_N
    (gradient,) = torch.autograd.grad(both.sum(), output)
    alone = score(step_of(schedule([21, 1]), 0), state[:1], output[:1], target[:1]).log_prob_N
    (gradient_alone,) = torch.autograd.grad(alone.sum(), output)
    assert torch.isfinite(both).all()
    assert both[0] == alone[0]
    assert both[1] == 0
    assert torch.equal(gradient, gradient_alone)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_clamped_last_step_keeps_noise_and_a_density(kernel: Kernel) -> None:
    constants = step_of(schedule([21, 1], kernel=kernel, clamp=True), 1)
    drawn = draw(constants, scalar(0.3), scalar(0.1), scalar(1.5), torch.float64)
    assert drawn.sigma_N.item() == pytest.approx(0.0206, abs=5e-5)
    expected = -0.5 * 1.5**2 - drawn.sigma_N.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(drawn.log_prob_N, expected, rtol=0, atol=1e-9)


@given(state=st.floats(-4, 4), noise=st.floats(-4, 4), timestep=st.integers(1, 999))
def test_equivalent_outputs_of_all_prediction_types_give_one_transition(
    state: float, noise: float, timestep: int
) -> None:
    constants = step_of(schedule([timestep], clamp=True), 0)
    signal, level = constants.signal_N.item(), constants.noise_N.item()
    clean = (state - level * noise) / signal
    outputs = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - level * clean}
    next_state = scalar(0.4 * state)
    scored = {
        kind: transition(scalar(state), scalar(output), constants, prediction_type=kind, next_state_NCHW=next_state)
        for kind, output in outputs.items()
    }
    for kind, output in outputs.items():
        found_noise, found_clean = predicted_noise_and_clean(scalar(state), scalar(output), constants, kind)
        assert found_noise.item() == pytest.approx(noise, abs=1e-9)
        assert found_clean.item() == pytest.approx(clean, rel=1e-9, abs=1e-9)
        torch.testing.assert_close(scored[kind].mean_NCHW, scored["epsilon"].mean_NCHW, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scored[kind].log_prob_N, scored["epsilon"].log_prob_N, rtol=1e-6, atol=1e-6)


def test_guidance_one_and_zero_are_the_two_branches() -> None:
    unconditional, conditional = normal(2, 3, seed=0), normal(2, 3, seed=1)
    torch.testing.assert_close(guide(unconditional, conditional, 1.0), conditional, rtol=0, atol=1e-12)
    assert torch.equal(guide(unconditional, conditional, 0.0), unconditional)


def means_a_hair_apart(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x_{t-1}, mean 1, mean 2, sigma, scored) in fp32: means 1.3e-4 sigma apart in 16,384 entries, at
    the least sigma of the SD schedule."""
    shape = (1, 4, 64, 64)
    sigma = torch.tensor([0.0206])
    mean_one = normal(*shape, seed=3 * seed, dtype=torch.float32)
    mean_two = mean_one + 1.3e-4 * sigma * normal(*shape, seed=3 * seed + 1, dtype=torch.float32)
    point = mean_one + sigma * normal(*shape, seed=3 * seed + 2, dtype=torch.float32)
    return point, mean_one, mean_two, sigma, torch.tensor([True])


def exact_log_ratio(point: Tensor, mean_one: Tensor, mean_two: Tensor, sigma: Tensor) -> Tensor:
    """The log-ratio of the given fp32 numbers, computed in fp64 throughout."""
    return log_density(point, mean_one, sigma) - log_density(point, mean_two, sigma)


def test_a_difference_of_log_probabilities_is_exact_to_1e8_in_latent_mean() -> None:
    for seed in range(20):
        point, one, two, sigma, scored = means_a_hair_apart(seed)
        subtracted = log_prob_latent_sum(point, one, sigma, scored) - log_prob_latent_sum(point, two, sigma, scored)
        error = (subtracted - exact_log_ratio(point, one, two, sigma)) / point.numel()
        assert abs(error.item()) < 1e-8


def test_the_difference_form_is_exact_to_1e10_in_latent_mean() -> None:
    for seed in range(20):
        point, one, two, sigma, _ = means_a_hair_apart(seed)
        error = log_ratio_difference_form(point, one, two, sigma) - exact_log_ratio(point, one, two, sigma)
        assert abs(error.item()) / point.numel() < 1e-10


def test_sums_in_single_precision_would_err_by_a_tenth_of_the_smallest_window() -> None:
    errors = []
    for seed in range(20):
        point, one, two, sigma, _ = means_a_hair_apart(seed)
        first, second = (torch.distributions.Normal(mean, sigma).log_prob(point).mean() for mean in (one, two))
        exact = exact_log_ratio(point, one, two, sigma).item() / point.numel()
        errors.append((first - second).item() - exact)
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) > 3e-8


def test_log_probabilities_are_double_precision_whatever_the_latents_are() -> None:
    constants = step_of(schedule([500, 480]), 0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        drawn = draw(constants, scalar(0.5).to(dtype), scalar(0.25).to(dtype), scalar(1.0).to(dtype), torch.float64)
        assert drawn.log_prob_N.dtype == torch.float64
        assert drawn.mean_NCHW.dtype == torch.promote_types(dtype, torch.float32)


def test_a_step_is_either_drawn_or_scored() -> None:
    constants = step_of(schedule([500, 480]), 0)
    state = scalar(0.5)
    with pytest.raises(ValueError, match="either noise_NCHW"):
        transition(state, state, constants, prediction_type="epsilon")
    with pytest.raises(ValueError, match="either noise_NCHW"):
        transition(state, state, constants, prediction_type="epsilon", noise_NCHW=state, next_state_NCHW=state)


def test_the_density_of_a_chain_does_not_depend_on_who_else_is_in_the_batch() -> None:
    whole = schedule([901, 500, 480, 21, 1])
    steps = torch.tensor([3, 0, 4, 1, 2])
    state, output, target = (normal(5, 2, 3, 3, seed=seed, dtype=torch.float32) for seed in range(3))
    together = score(whole.at(steps), state, output, target).log_prob_N
    for n in range(5):
        row = slice(n, n + 1)
        alone = score(whole.at(steps[row]), state[row], output[row], target[row]).log_prob_N
        assert torch.equal(together[row], alone)


def test_every_step_uses_the_constants_of_its_own_index() -> None:
    whole = schedule([901, 500, 480, 21, 1])
    picked = whole.at(torch.tensor([4, 1]))
    for field in dataclasses.fields(StepConstants):
        assert torch.equal(getattr(picked, field.name), getattr(whole, field.name)[[4, 1]])


# S-T11: trajectories of real images. The chain is linear and Gaussian, so means and covariances say all of it, and
# noises of -1 and 1 in all combinations have those of the normal law exactly.

FALLING = [901, 500, 480, 21]


def all_trajectories(constants: StepConstants, image: float) -> Tensor:
    """Teacher-forced trajectories of one image under all combinations of two-point noises, (N, S) fp64."""
    noise_NS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(constants) + 1)), dtype=torch.float64)
    noises = [noise_N.view(-1, 1, 1, 1) for noise_N in noise_NS.unbind(1)]
    clean = torch.full_like(noises[0], image)
    states = [noised(clean, noises[0], step_of(constants, 0, len(clean)))]
    for step, noise in enumerate(noises[1:]):
        at = step_of(constants, step, len(clean))
        drawn = teacher_forced_transition(states[-1], clean, at, noise_NCHW=noise, wire_dtype=torch.float64)
        states.append(drawn.next_state_NCHW)
    return torch.stack([state.flatten() for state in states], dim=1)


@pytest.mark.parametrize(("kernel", "eta"), [("ddim", 0.0), ("ddim", 0.3), ("ddim", 1.0), ("ddpm", 1.0)])
@pytest.mark.parametrize("clamp", [False, True])
def test_every_state_of_a_real_images_trajectory_has_the_forward_marginal(
    kernel: Kernel, eta: float, clamp: bool
) -> None:
    states_NS = all_trajectories(schedule(FALLING, kernel=kernel, eta=eta, clamp=clamp), 0.8)
    final = ALPHA_BAR[:1] if clamp else torch.ones(1, dtype=torch.float64)
    alpha_bar_S = torch.cat([ALPHA_BAR[FALLING], final])
    torch.testing.assert_close(states_NS.mean(0), alpha_bar_S.sqrt() * 0.8, rtol=0, atol=1e-9)
    torch.testing.assert_close(states_NS.var(0, correction=0), 1 - alpha_bar_S, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_with_eta_one_a_real_images_trajectory_is_the_forward_process_read_backwards(kernel: Kernel) -> None:
    states_NS = all_trajectories(schedule(FALLING, kernel=kernel), 0.8)[:, :-1]
    alpha_bar_S = ALPHA_BAR[FALLING]
    # The forward process: x_t = sqrt(abar_t / abar_u) x_u + fresh noise, for every less noisy u.
    noisier, cleaner = alpha_bar_S[:, None], alpha_bar_S[None]
    covariance_SS = torch.minimum(noisier / cleaner, cleaner / noisier).sqrt() * (1 - torch.maximum(noisier, cleaner))
    torch.testing.assert_close(torch.cov(states_NS.T, correction=0), covariance_SS, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("kernel", "eta"), [("ddim", 0.3), ("ddim", 1.0), ("ddpm", 1.0)])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_network_that_knows_the_image_draws_its_teacher_forced_trajectory(
    kernel: Kernel, eta: float, kind: Literal["epsilon", "v_prediction", "sample"]
) -> None:
    constants = schedule(FALLING, kernel=kernel, eta=eta).at(torch.arange(len(FALLING)))
    state, clean, noise = (normal(len(FALLING), 2, 3, 3, seed=seed) for seed in range(3))
    signal, level = (value.view(-1, 1, 1, 1) for value in (constants.signal_N, constants.noise_N))
    epsilon = (state - signal * clean) / level
    output = {"epsilon": epsilon, "v_prediction": signal * epsilon - level * clean, "sample": clean}[kind]
    known = transition(
        state, output, constants, prediction_type=kind, noise_NCHW=noise, wire_dtype=torch.float64
    ).next_state_NCHW
    forced = teacher_forced_transition(state, clean, constants, noise_NCHW=noise, wire_dtype=torch.float64)
    torch.testing.assert_close(forced.next_state_NCHW, known, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("wire", [torch.float32, torch.float16])
def test_the_unscored_last_step_lands_exactly_on_the_real_image(kernel: Kernel, wire: torch.dtype) -> None:
    constants = step_of(schedule([21, 1], kernel=kernel), 1, num_chains=3)
    state, clean, noise = (normal(3, 2, 3, 3, seed=seed, dtype=torch.float32) for seed in range(3))
    drawn = teacher_forced_transition(state, clean, constants, noise_NCHW=noise, wire_dtype=wire)
    assert torch.equal(drawn.next_state_NCHW, clean.to(wire).float())
    assert torch.equal(drawn.log_prob_N, torch.zeros(3, dtype=torch.float64))


# B8: the KL of one step.


def kernel_kl(mean: Tensor, mean_ref: Tensor, sigma_N: Tensor) -> Tensor:
    """The KL of steps that are all scored."""
    return kernel_kl_latent_mean(mean, mean_ref, sigma_N, torch.ones_like(sigma_N, dtype=torch.bool))


def test_means_a_tenth_apart_at_half_a_sigma_have_the_published_kl() -> None:
    mean, sigma_N = normal(2, 4, 3, 3, seed=0), torch.full((2,), 0.5, dtype=torch.float64)
    expected_N = torch.full((2,), 0.02, dtype=torch.float64)
    for sign in (1, -1):
        torch.testing.assert_close(kernel_kl(mean, mean + sign * 0.1, sigma_N), expected_N, rtol=0, atol=1e-9)


def test_the_kernel_kl_is_the_kl_of_the_gaussians_averaged_over_latent_entries() -> None:
    mean, mean_ref = normal(3, 4, 3, 3, seed=0), normal(3, 4, 3, 3, seed=1)
    sigma_N = torch.tensor([0.02, 0.5, 2.0], dtype=torch.float64)
    here, there = (torch.distributions.Normal(value, sigma_N.view(-1, 1, 1, 1)) for value in (mean, mean_ref))
    expected_N = torch.distributions.kl_divergence(here, there).flatten(1).mean(1)
    torch.testing.assert_close(kernel_kl(mean, mean_ref, sigma_N), expected_N, rtol=1e-12, atol=0)


def test_the_kernel_kl_is_the_expected_log_ratio_of_drawn_steps() -> None:
    """The log-ratio is linear in the noise, so a noise and its negative have its expectation between them."""
    mean, mean_ref, noise = (normal(3, 4, 3, 3, seed=seed) for seed in range(3))
    sigma_N = torch.tensor([0.02, 0.5, 2.0], dtype=torch.float64)
    step = sigma_N.view(-1, 1, 1, 1) * noise
    log_ratios = [log_ratio_difference_form(mean + side, mean, mean_ref, sigma_N) for side in (step, -step)]
    expected_N = sum(log_ratios) / 2 / mean[0].numel()
    torch.testing.assert_close(kernel_kl(mean, mean_ref, sigma_N), expected_N, rtol=1e-9, atol=0)


def test_the_kernel_kl_pulls_the_mean_to_the_reference_and_is_zero_there() -> None:
    mean_ref, sigma_N = normal(2, 4, 3, 3, seed=0), torch.tensor([0.5, 2.0], dtype=torch.float64)
    mean = (mean_ref + 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(kernel_kl(mean, mean_ref, sigma_N).sum(), mean)
    expected = (0.1 / sigma_N.square() / mean[0].numel()).view(-1, 1, 1, 1).expand_as(mean)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=0)
    assert torch.equal(kernel_kl(mean_ref, mean_ref, sigma_N), torch.zeros_like(sigma_N))


@pytest.mark.parametrize("unscored_mean", [0.3, math.inf, math.nan])
def test_an_unscored_step_has_no_kl_and_no_gradient(unscored_mean: float) -> None:
    mean, mean_ref = scalar(0.6, unscored_mean).requires_grad_(), scalar(0.5, 0.0)
    sigma_N, scored_N = torch.tensor([0.5, 0.0], dtype=torch.float64), torch.tensor([True, False])
    kl_N = kernel_kl_latent_mean(mean, mean_ref, sigma_N, scored_N)
    (gradient,) = torch.autograd.grad(kl_N.sum(), mean)
    torch.testing.assert_close(kl_N, torch.tensor([0.02, 0.0], dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(gradient, scalar(0.4, 0.0), rtol=0, atol=1e-9)


def test_the_kernel_kl_of_single_precision_means_a_hair_apart_keeps_six_digits() -> None:
    _, one, two, sigma, scored = means_a_hair_apart(seed=0)
    kl_N = kernel_kl_latent_mean(one, two, sigma, scored)
    exact = ((one.double() - two.double()) / sigma.double()).square().mean() / 2
    assert kl_N.dtype == torch.float64
    assert exact > 1e-9
    assert kl_N.item() == pytest.approx(exact.item(), rel=1e-6)
