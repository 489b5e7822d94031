"""The transition kernel: one function that draws a denoising step or scores a drawn one.

Sampler and learner both call `transition`; there is no second definition of a step's density anywhere.
Precision (algorithms.md 0.7): elementwise arithmetic in fp32 (fp64 stays fp64), sums over latent entries and
log-probabilities in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion.schedules import NoiseLevel, StepConstants

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
"""What a network's output stands for: the noise, v (Salimans and Ho, arXiv 2202.00512), x0, or a flow's velocity."""


@dataclass(frozen=True)
class Transition:
    """A step of N chains: where it went, and how likely that was.

    next_state_NCHW is already rounded to the wire's dtype; log_prob_N is latent_sum, fp64, and 0 at unscored
    steps.
    """

    next_state_NCHW: Tensor
    log_prob_N: Tensor
    mean_NCHW: Tensor
    sigma_N: Tensor


def transition(
    state_NCHW: Tensor,
    output_NCHW: Tensor,
    constants: StepConstants,
    *,
    prediction_type: PredictionType,
    noise_NCHW: Tensor | None = None,
    next_state_NCHW: Tensor | None = None,
    wire_dtype: torch.dtype = torch.float32,
) -> Transition:
    """Draws x_{t-1} from `noise_NCHW`, or scores the given `next_state_NCHW`: exactly one of the two.

    output_NCHW is the network's output, guidance included. A drawn state is rounded to the wire's dtype before
    it is scored, so that whoever replays the step sees the same numbers (ddpo-pytorch rounds after scoring, and
    its first ratio is not 1).
    """
    if (noise_NCHW is None) == (next_state_NCHW is None):
        raise ValueError("give either noise_NCHW, to draw, or next_state_NCHW, to score")
    dtype = torch.promote_types(state_NCHW.dtype, torch.float32)
    state_NCHW = state_NCHW.to(dtype)
    mean_NCHW = _mean(state_NCHW, output_NCHW.to(dtype), constants, prediction_type)
    if next_state_NCHW is None:
        assert noise_NCHW is not None
        sigma = _spread(constants.sigma_N, mean_NCHW)
        next_state_NCHW = (mean_NCHW + sigma * noise_NCHW.to(dtype)).to(wire_dtype)
    next_state_NCHW = next_state_NCHW.to(dtype)
    return Transition(
        next_state_NCHW,
        log_prob_latent_sum(next_state_NCHW, mean_NCHW, constants.sigma_N, constants.scored_N),
        mean_NCHW,
        constants.sigma_N,
    )


def noised(clean_NCHW: Tensor, noise_NCHW: Tensor, level: NoiseLevel) -> Tensor:
    """Returns A x0 + S noise, fp32 or fp64; steps' constants are the levels that the steps start from."""
    clean_NCHW = clean_NCHW.to(torch.promote_types(clean_NCHW.dtype, torch.float32))
    return _spread(level.signal_N, clean_NCHW) * clean_NCHW + _spread(level.noise_N, clean_NCHW) * noise_NCHW


def teacher_forced_transition(
    state_NCHW: Tensor,
    clean_NCHW: Tensor,
    constants: StepConstants,
    *,
    noise_NCHW: Tensor,
    wire_dtype: torch.dtype = torch.float32,
) -> Transition:
    """Draws a step of real images' trajectories, with the kernel of a network that knows x0 (algorithms.md 0.6).

    The image stands for x0_hat and (x_t - A x0)/S for eps, so for every eta each state keeps the forward marginal
    N(A x0, S^2 I), a flow's up to the error of Euler's step, and an unscored last step lands on the image.
    log_prob_N is this kernel's density, no policy's.
    """
    return transition(
        state_NCHW, clean_NCHW, constants, prediction_type="sample", noise_NCHW=noise_NCHW, wire_dtype=wire_dtype
    )


def log_prob_latent_sum(next_state_NCHW: Tensor, mean_NCHW: Tensor, sigma_N: Tensor, scored_N: Tensor) -> Tensor:
    """Returns ln N(x_{t-1}; mean, sigma^2 I) summed over latent entries, (N,) fp64; 0 where unscored."""
    safe_sigma_N = torch.where(scored_N, sigma_N, torch.ones_like(sigma_N))
    residual = (next_state_NCHW - mean_NCHW) / _spread(safe_sigma_N, mean_NCHW)
    square_sum_N = residual.double().square().flatten(1).sum(1)
    num_entries = mean_NCHW[0].numel()
    normaliser_N = num_entries * (safe_sigma_N.double().log() + 0.5 * math.log(2 * math.pi))
    return torch.where(scored_N, -0.5 * square_sum_N - normaliser_N, torch.zeros_like(square_sum_N))


def log_ratio_difference_form(
    next_state_NCHW: Tensor, mean_one_NCHW: Tensor, mean_two_NCHW: Tensor, sigma_N: Tensor
) -> Tensor:
    """Returns ln pi_1 - ln pi_2 of N steps, (N,) fp64, latent_sum, without cancellation (0.7 rule 2)."""
    product = (mean_one_NCHW - mean_two_NCHW) * (2 * next_state_NCHW - mean_one_NCHW - mean_two_NCHW)
    return product.double().flatten(1).sum(1) / (2 * sigma_N.double() ** 2)


def kernel_kl_latent_mean(mean_NCHW: Tensor, mean_ref_NCHW: Tensor, sigma_N: Tensor, scored_N: Tensor) -> Tensor:
    """Returns KL(N(mean, sigma^2 I) from N(mean_ref, sigma^2 I)) / D, (N,) fp64; 0 where unscored.

    Differentiable in the means. This is the exact KL; Flow-GRPO's divides by the variance per unit of time instead,
    and so is smaller by the factor of the step's length (algorithms.md 5.5).
    """
    difference = mean_NCHW - mean_ref_NCHW
    difference = torch.where(scored_N.view(-1, 1, 1, 1), difference, torch.zeros_like(difference))
    safe_sigma_N = torch.where(scored_N, sigma_N, torch.ones_like(sigma_N))
    return (difference / _spread(safe_sigma_N, difference)).double().square().flatten(1).mean(1) / 2


def predicted_noise_and_clean(
    state_NCHW: Tensor, output_NCHW: Tensor, level: NoiseLevel, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """Returns (eps, x0_hat) from the network's output in its own parametrisation (algorithms.md 0.6)."""
    signal = _spread(level.signal_N, state_NCHW)
    noise = _spread(level.noise_N, state_NCHW)
    if prediction_type == "epsilon":
        return output_NCHW, (state_NCHW - noise * output_NCHW) / signal
    if prediction_type == "v_prediction":
        return signal * output_NCHW + noise * state_NCHW, signal * state_NCHW - noise * output_NCHW
    if prediction_type == "flow":
        return state_NCHW + signal * output_NCHW, state_NCHW - noise * output_NCHW
    return (state_NCHW - signal * output_NCHW) / noise, output_NCHW


def guide(unconditional_NCHW: Tensor, conditional_NCHW: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): u + scale * (c - u)."""
    return unconditional_NCHW + guidance_scale * (conditional_NCHW - unconditional_NCHW)


def _mean(state_NCHW: Tensor, output_NCHW: Tensor, constants: StepConstants, prediction_type: PredictionType) -> Tensor:
    noise_NCHW, clean_NCHW = predicted_noise_and_clean(state_NCHW, output_NCHW, constants, prediction_type)
    return (
        _spread(constants.mean_clean_N, state_NCHW) * clean_NCHW
        + _spread(constants.mean_noise_N, state_NCHW) * noise_NCHW
        + _spread(constants.mean_state_N, state_NCHW) * state_NCHW
    )


def _spread(value_N: Tensor, like_NCHW: Tensor) -> Tensor:
    return value_N.to(like_NCHW.dtype).view(-1, *[1] * (like_NCHW.dim() - 1))
