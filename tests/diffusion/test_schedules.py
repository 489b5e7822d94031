"""Our step constants against diffusers' own scheduler, and the closed forms of K-T1 and K-T4."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from diffusion.kernels import transition
from diffusion.schedules import StepConstants, make_schedule, noise_level

Prediction = Literal["epsilon", "v_prediction", "sample"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")


def ddim_scheduler(
    *, prediction_type: str = "epsilon", set_alpha_to_one: bool = False, num_steps: int = 20
) -> DDIMScheduler:
    """The scheduler of Stable Diffusion 1.x."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    scheduler.set_timesteps(num_steps)
    return scheduler


def schedule_of(
    scheduler: DDIMScheduler,
    *,
    eta: float = 1.0,
    kernel: Literal["ddim", "ddpm"] = "ddim",
    last_step: Literal["unscored", "clamp"] = "clamp",
) -> StepConstants:
    """Our constants for a diffusers scheduler's timesteps."""
    return make_schedule(scheduler.alphas_cumprod, scheduler.timesteps, kernel=kernel, eta=eta, last_step=last_step)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("last_step", ["unscored", "clamp"])
def test_every_ddim_step_is_the_one_that_diffusers_takes(
    prediction_type: Prediction, eta: float, last_step: Literal["unscored", "clamp"]
) -> None:
    scheduler = ddim_scheduler(prediction_type=prediction_type, set_alpha_to_one=last_step == "unscored")
    constants = schedule_of(scheduler, eta=eta, last_step=last_step)
    generator = torch.Generator().manual_seed(0)
    for step, timestep in enumerate(scheduler.timesteps):
        state, output, noise = torch.randn((3, 1, 4, 8, 8), generator=generator).unbind()
        theirs = scheduler.step(output, timestep, state, eta=eta, variance_noise=noise).prev_sample
        ours = transition(
            state,
            output,
            constants.at(torch.tensor([step])),
            prediction_type=prediction_type,
            noise_NCHW=noise,
        ).next_state_NCHW
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_ddpm_ancestral_over_all_timesteps_is_diffusers_small_variance() -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    constants = make_schedule(
        scheduler.alphas_cumprod, torch.arange(999, -1, -1), kernel="ddpm", eta=1.0, last_step="unscored"
    )
    generator = torch.Generator().manual_seed(0)
    for timestep in (999, 500, 1, 0):
        state, output = torch.randn((2, 1, 4, 8, 8), generator=generator).unbind()
        noise = torch.randn(state.shape, generator=torch.Generator().manual_seed(timestep))
        theirs = scheduler.step(output, timestep, state, generator=torch.Generator().manual_seed(timestep)).prev_sample
        ours = transition(
            state,
            output,
            constants.at(torch.tensor([999 - timestep])),
            prediction_type="epsilon",
            noise_NCHW=noise,
        ).next_state_NCHW
        # diffusers floors the variance at 1e-20 and rounds alphas to fp32.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_noise_levels_are_those_of_the_forward_process_and_of_a_chains_steps() -> None:
    alpha_bar, constants = ddim_scheduler().alphas_cumprod, schedule_of(ddim_scheduler(num_steps=50))
    level = noise_level(alpha_bar, constants.timestep_N)
    assert torch.equal(level.signal_N, constants.signal_N)
    assert torch.equal(level.noise_N, constants.noise_N)
    torch.testing.assert_close(level.signal_N**2, alpha_bar.double()[constants.timestep_N], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        level.signal_N**2 + level.noise_N**2, torch.ones_like(level.signal_N), rtol=0, atol=1e-12
    )


def test_time_runs_from_noise_to_image() -> None:
    constants = schedule_of(ddim_scheduler(num_steps=50))
    assert constants.timestep_N.tolist() == list(range(981, 0, -20))
    assert (constants.signal_N.diff() > 0).all()
    assert len(constants) == 50


@given(num_steps=st.integers(2, 200), eta=st.floats(0.01, 1.0))
def test_all_steps_but_the_last_are_scored_unless_it_is_clamped(num_steps: int, eta: float) -> None:
    scheduler = ddim_scheduler(num_steps=num_steps)
    unscored = schedule_of(scheduler, eta=eta, last_step="unscored")
    clamped = schedule_of(scheduler, eta=eta, last_step="clamp")
    assert unscored.scored_N.tolist() == [True] * (num_steps - 1) + [False]
    assert clamped.scored_N.all()
    assert (clamped.sigma_N > 0).all()
    assert unscored.sigma_N[-1] == 0


@given(num_steps=st.integers(1, 200))
def test_a_deterministic_chain_has_no_scored_step(num_steps: int) -> None:
    constants = schedule_of(ddim_scheduler(num_steps=num_steps), eta=0.0)
    assert not constants.scored_N.any()
    assert (constants.sigma_N == 0).all()


@pytest.mark.parametrize("kernel", ["ddim", "ddpm"])
@given(num_steps=st.integers(2, 100))
def test_with_the_true_noise_each_step_keeps_the_forward_marginal(
    kernel: Literal["ddim", "ddpm"], num_steps: int
) -> None:
    """From x = A x0 + S eps the next state has mean A' x0 and variance S'^2 over eps and the drawn noise."""
    constants = schedule_of(ddim_scheduler(num_steps=num_steps), kernel=kernel, last_step="unscored")
    signal_next = torch.cat([constants.signal_N[1:], torch.ones(1)])
    to_clean = constants.mean_clean_N + constants.mean_state_N * constants.signal_N
    to_noise = constants.mean_noise_N + constants.mean_state_N * constants.noise_N
    torch.testing.assert_close(to_clean, signal_next, rtol=0, atol=1e-12)
    variance = to_noise**2 + constants.sigma_N**2
    torch.testing.assert_close(variance, 1 - signal_next**2, rtol=0, atol=1e-12)


def test_constants_are_double_precision() -> None:
    constants = schedule_of(ddim_scheduler())
    assert constants.timestep_N.dtype == torch.int64
    assert constants.scored_N.dtype == torch.bool
    floats = (constants.signal_N, constants.noise_N, constants.sigma_N, constants.mean_clean_N)
    assert {value.dtype for value in floats} == {torch.float64}


def test_a_scored_step_without_variance_is_refused() -> None:
    alpha_bar = ddim_scheduler().alphas_cumprod
    with pytest.raises(ValueError, match="zero variance"):
        make_schedule(alpha_bar, torch.tensor([500, 500, 1]), kernel="ddim", eta=1.0, last_step="unscored")
