"""Chains small enough to know everything about, stepped by the production kernel.

The "network" is a vector of drifts, one a step. Expectations are exact: Gaussian noise is replaced by equally
likely points that have its first moments, and all combinations of them are enumerated as groups.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.kernels import Transition, transition
from diffusion.schedules import StepConstants
from learner.algorithms.prdp import prdp
from learner.two_pass import differentiate
from protocol.algorithms import Prdp

TWO_POINTS = (-1.0, 1.0)
"""Equally likely points with the moments of N(0, 1) up to the third."""

SIX_POINTS = (-(3.0**0.5), 0.0, 0.0, 0.0, 0.0, 3.0**0.5)
"""Equally likely points with the moments of N(0, 1) up to the fifth."""


@dataclass(frozen=True)
class LinearChain:
    """x_{t-1} = decay_t x_t + shift_t + sigma_t z_t, in one dimension; axes in sampling order, t = T first."""

    decay_T: tuple[float, ...]
    sigma_T: tuple[float, ...]

    def sample(self, shift_T: Tensor, start_PG: Tensor, noise_PGT: Tensor) -> Tensor:
        """Returns states_PGS."""
        states = [start_PG]
        for step in range(len(self.sigma_T)):
            drawn = self._step(shift_T, states[-1], step, noise_PG=noise_PGT[..., step])
            states.append(drawn.next_state_NCHW.view_as(start_PG))
        return torch.stack(states, dim=2).detach()

    def log_prob(self, shift_T: Tensor, states_PGS: Tensor) -> Tensor:
        """Returns log_prob_PGT of given states, differentiable in the shifts."""
        scored = [
            self._step(shift_T, states_PGS[..., step], step, next_PG=states_PGS[..., step + 1]).log_prob_N
            for step in range(len(self.sigma_T))
        ]
        return torch.stack([log_prob.view(states_PGS.shape[:2]) for log_prob in scored], dim=2)

    def _step(
        self,
        shift_T: Tensor,
        state_PG: Tensor,
        step: int,
        *,
        noise_PG: Tensor | None = None,
        next_PG: Tensor | None = None,
    ) -> Transition:
        state_NCHW = state_PG.reshape(-1, 1, 1, 1)
        return transition(
            state_NCHW,
            shift_T[step].expand_as(state_NCHW),
            self._constants(step, len(state_NCHW)),
            prediction_type="epsilon",
            noise_NCHW=None if noise_PG is None else noise_PG.reshape(-1, 1, 1, 1),
            next_state_NCHW=None if next_PG is None else next_PG.reshape(-1, 1, 1, 1),
            wire_dtype=torch.float64,
        )

    def _constants(self, step: int, num_chains: int) -> StepConstants:
        def fill(value: float) -> Tensor:
            return torch.full((num_chains,), value, dtype=torch.float64)

        return StepConstants(
            timestep_N=torch.zeros(num_chains, dtype=torch.long),
            signal_N=fill(1),
            noise_N=fill(0),
            mean_clean_N=fill(0),
            mean_noise_N=fill(1),
            mean_state_N=fill(self.decay_T[step]),
            sigma_N=fill(self.sigma_T[step]),
            scored_N=torch.ones(num_chains, dtype=torch.bool),
        )


def all_groups(points: tuple[float, ...], num_draws: int) -> Tensor:
    """Returns all groups of two siblings with `num_draws` noises each, (P, 2, num_draws) fp64."""
    rows = torch.tensor(list(itertools.product(points, repeat=2 * num_draws)), dtype=torch.float64)
    return rows.view(-1, 2, num_draws)


def papers_settings(**changes: object) -> Prdp:
    """PRDP as the equations write it: sums over entries and steps, no scale, and no window unless given."""
    whole = {
        "name": "prdp",
        "kl_weight": 1.0,
        "clip_eps": None,
        "latent_reduce": "latent_sum",
        "time_reduce": "time_sum",
        "loss_scale": "none",
    }
    return Prdp.model_validate({**whole, **changes})


def prdp_loss(log_prob_PGT: Tensor, old_PGT: Tensor, ref_PGT: Tensor, reward_PG: Tensor, settings: Prdp) -> Tensor:
    """The loss of groups whose steps are all scored, with one latent entry."""
    loss, _ = prdp(
        log_prob_PGT,
        old_PGT.detach(),
        ref_PGT.detach(),
        torch.ones(log_prob_PGT.shape[0], log_prob_PGT.shape[2], dtype=torch.bool),
        reward_PG.detach(),
        settings=settings,
        num_latent_entries=1,
        normaliser=len(log_prob_PGT),
    )
    return loss


def gradient(log_prob_PGT: Tensor, old_PGT: Tensor, ref_PGT: Tensor, reward_PG: Tensor, settings: Prdp) -> Tensor:
    """dLoss/dlogp of the same, (P, G, T)."""
    _, omega, _ = differentiate(
        lambda value: (prdp_loss(value, old_PGT, ref_PGT, reward_PG, settings), {}), log_prob_PGT
    )
    return omega
