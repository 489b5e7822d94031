"""The constants of a sampler's T steps, in fp64 (algorithms.md 0.6).

For every kernel here the mean is linear, so one form serves all:

    mu = mean_clean * x0_hat + mean_noise * eps + mean_state * x_t,        x_{t-1} ~ N(mu, sigma^2 I)

Time axes are in sampling order: entry 0 is the noisiest step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseLevel:
    """What N noised latents A x0 + S noise are made of: A and S as signal_N and noise_N, fp64, and timestep_N: the
    timesteps of training, or in a flow's sampler, which stands between those, what the network is told."""

    timestep_N: Tensor
    signal_N: Tensor
    noise_N: Tensor


def noise_level(alpha_bar: Tensor, timestep_N: Tensor) -> NoiseLevel:
    """Returns the levels of training timesteps: A = sqrt(abar), S = sqrt(1 - abar)."""
    now_N = alpha_bar.double()[timestep_N]
    return NoiseLevel(timestep_N, now_N.sqrt(), (1 - now_N).sqrt())


@dataclass(frozen=True)
class StepConstants(NoiseLevel):
    """Constants of N steps (or of a whole schedule, N = T). All fp64 but `timestep_N` and `scored_N`.

    A worked example, the SD schedule, one step from timestep 500 to 480 with eta 1: timestep 500,
    signal sqrt(abar_500), noise sqrt(1 - abar_500), sigma 0.2944, scored True.
    """

    mean_clean_N: Tensor
    mean_noise_N: Tensor
    mean_state_N: Tensor
    sigma_N: Tensor
    scored_N: Tensor

    def at(self, step_N: Tensor) -> StepConstants:
        """Returns the constants of the given steps, (N,) indices into this schedule."""
        return StepConstants(*(getattr(self, field.name)[step_N] for field in fields(self)))

    @property
    def length_N(self) -> Tensor:
        """Of a whole flow schedule: by how much each step lowers the noise's share."""
        return self.noise_N - torch.cat([self.noise_N[1:], self.noise_N.new_zeros(1)])

    def to(self, device: torch.device) -> StepConstants:
        """Returns the same constants on a device."""
        return StepConstants(*(getattr(self, field.name).to(device) for field in fields(self)))

    def __len__(self) -> int:
        return len(self.timestep_N)


def make_schedule(
    alpha_bar: Tensor,
    timesteps_T: Tensor,
    *,
    kernel: Literal["ddim", "ddpm"],
    eta: float,
    last_step: Literal["unscored", "clamp"],
) -> StepConstants:
    """Returns the constants of a variance-preserving chain over `timesteps_T` (falling).

    alpha_bar: (1000,) cumulative signal levels of training. DDIM with eta is Song et al.'s
    (arXiv 2010.02502, Eq. 12, 16); DDPM ancestral is Ho et al.'s with the posterior ("small") variance.
    `last_step="unscored"` lands on alpha_bar = 1 whatever the model's scheduler says: sigma is 0 there, the
    step has no density and gives a clean image. `"clamp"` ends at timestep 0, noise included.
    """
    alpha_bar = alpha_bar.double()
    timestep_T = timesteps_T.long()
    final = alpha_bar.new_ones(1) if last_step == "unscored" else alpha_bar[:1]
    now_T = alpha_bar[timestep_T]
    next_T = torch.cat([alpha_bar[timestep_T[1:]], final])
    sigma_T = eta * torch.sqrt((1 - next_T) / (1 - now_T) * (1 - now_T / next_T))
    scored_T = _scored(sigma_T, next_T, eta)
    clean_T, noise_T, state_T = _mean_coefficients(kernel, now_T, next_T, sigma_T)
    return StepConstants(timestep_T, now_T.sqrt(), (1 - now_T).sqrt(), clean_T, noise_T, state_T, sigma_T, scored_T)


def make_flow_schedule(
    share_T: Tensor, told_T: Tensor, *, kernel: Literal["flow_grpo", "dance_grpo"], eta: float
) -> StepConstants:
    """Returns the constants of a flow's SDE over falling shares of noise `share_T`, of which the first may be 1.

    Euler-Maruyama's steps of one family (algorithms.md 0.6), with d = s - s' and a noise level nu(s):

        mu = x - d v + nu^2 d score / 2,     sigma = nu sqrt(d),     score = -(x + (1 - s) v) / s

    flow_grpo: nu^2 = eta^2 s / (1 - s), where s = 1 divides by the next share's complement instead (Flow-GRPO, arXiv
    2505.05470, Eq. 12, and its code). dance_grpo: nu = eta (DanceGRPO, arXiv 2505.07818, Eq. 8, and its code). With
    x = (1 - s) x0 + s noise the mean has no part of x by itself. The last step lands on the clean latent, without
    noise and unscored; Flow-GRPO scores it.
    Raises ValueError for shares that do not fall inside 0 to 1.
    """
    share_T = share_T.double()
    next_T = torch.cat([share_T[1:], share_T.new_zeros(1)])
    if not bool(((share_T > next_T) & (share_T <= 1)).all()):
        raise ValueError(f"shares of noise must fall from at most 1 to 0, but are {share_T.tolist()}")
    length_T = share_T - next_T
    if kernel == "flow_grpo":
        nu_square_T = eta**2 * share_T / (1 - torch.where(share_T == 1, next_T, share_T))
    else:
        nu_square_T = torch.full_like(share_T, eta**2)
    nu_square_T[-1] = 0
    scored_T = nu_square_T > 0
    noise_T = next_T - nu_square_T * length_T / (2 * share_T)
    sigma_T = (nu_square_T * length_T).sqrt()
    return StepConstants(
        told_T, 1 - share_T, share_T, 1 - next_T, noise_T, torch.zeros_like(share_T), sigma_T, scored_T
    )


def _scored(sigma_T: Tensor, next_T: Tensor, eta: float) -> Tensor:
    """Steps that land on a clean latent have no density; any other step without noise is an error."""
    scored_T = (next_T < 1) & (eta > 0)
    if bool((sigma_T[scored_T] <= 0).any()):
        raise ValueError(f"a scored step has zero variance: sigma is {sigma_T.tolist()}")
    return scored_T


def _mean_coefficients(kernel: str, now_T: Tensor, next_T: Tensor, sigma_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zero_T = torch.zeros_like(now_T)
    if kernel == "ddim":
        # Rounding can leave 1 - abar' - sigma^2 a hair below zero when eta is 1.
        return next_T.sqrt(), (1 - next_T - sigma_T**2).clamp(min=0).sqrt(), zero_T
    beta_T = 1 - now_T / next_T
    clean_T = next_T.sqrt() * beta_T / (1 - now_T)
    return clean_T, zero_T, (now_T / next_T).sqrt() * (1 - next_T) / (1 - now_T)
