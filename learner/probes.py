"""Probes: the scalars of a network that a loss needs, and how they are evaluated (algorithms.md 0.5).

    TransitionProbe   log pi(x_{t-1} | x_t, c) of (group, sibling, step) items, guidance included
    ErrorProbe        mean squared error of the predicted noise at noised images, or of features (NCP)

A probe is called with a denoiser, so that policy, reference and opponent are evaluated alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from diffusion.chain import Chain
from diffusion.kernels import Transition, kernel_kl_latent_mean
from diffusion.perception import (
    Encoder,
    Target,
    perceptual_error,
    perceptual_target,
    step_constants,
    uniform_constants,
)
from diffusion.policy import Denoiser, Policy
from learner.batching import RoundBatch
from protocol.algorithms import Perception


@dataclass
class Costs:
    """Network evaluations so far on this rank, one latent and one branch each (algorithms.md 7.1)."""

    unet_forward: int = 0
    unet_backward: int = 0
    encoder_forward: int = 0


class Probe(Protocol):
    """Values of one loss, evaluated in micro-batches."""

    @property
    def width(self) -> int:
        """Latents that one item evaluates; a backward pass goes through as many, for each branch of guidance."""
        ...

    @property
    def num_branches(self) -> int:
        """Branches of guidance."""
        ...

    @property
    def num_evaluations(self) -> int:
        """U-Net evaluations that one item costs."""
        ...

    @property
    def value_shape(self) -> tuple[int, ...]:
        """Shape of one item's values."""
        ...

    @property
    def filler_1K(self) -> Tensor:
        """An item to evaluate on a rank that has none left while others have; its value does not count."""
        ...

    def __call__(self, denoiser: Denoiser, item_NK: Tensor) -> Tensor:
        """Returns the values of N items, (N, ...): fp64 log-probabilities or fp32 errors."""
        ...


@dataclass(frozen=True)
class TransitionProbe:
    """Log-probabilities of a round's steps, (N,) fp64 latent_sum; with `ref_mean_PGTCHW` also each step's exact KL to
    the pretrained model, (N, 2). Items are (group, sibling, step)."""

    chain: Chain
    batch: RoundBatch
    ref_mean_PGTCHW: Tensor | None = None

    width = 1

    @property
    def num_branches(self) -> int:
        """Two with guidance."""
        return self.chain.sampler.num_branches

    num_evaluations = num_branches

    @property
    def filler_1K(self) -> Tensor:
        """The first step of the first trajectory: every rank has one."""
        return torch.zeros((1, 3), dtype=torch.long)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """A number, or two with the KL."""
        return () if self.ref_mean_PGTCHW is None else (2,)

    def __call__(self, denoiser: Denoiser, item_NK: Tensor) -> Tensor:
        """Scores the stored next states."""
        scored = self._step(denoiser, item_NK)
        if self.ref_mean_PGTCHW is None:
            return scored.log_prob_N
        ref_mean_NCHW = self.ref_mean_PGTCHW[tuple(item_NK.unbind(1))]
        scored_N = self.chain.schedule.scored_N[item_NK[:, 2]]
        kl_N = kernel_kl_latent_mean(scored.mean_NCHW, ref_mean_NCHW, scored.sigma_N, scored_N)
        return torch.stack([scored.log_prob_N, kl_N.double()], dim=1)

    def means(self, denoiser: Denoiser, item_NK: Tensor) -> Tensor:
        """Returns the kernels' means, (N, C, H, W)."""
        return self._step(denoiser, item_NK).mean_NCHW

    def _step(self, denoiser: Denoiser, item_NK: Tensor) -> Transition:
        group_N, sibling_N, step_N = item_NK.unbind(1)
        return self.chain.step(
            denoiser,
            self.batch.latents_PGSCHW[group_N, sibling_N, step_N],
            step_N,
            self.chain.policy.embed_all(self.batch.prompts)[group_N],
            next_state_NCHW=self.batch.latents_PGSCHW[group_N, sibling_N, step_N + 1],
        )


@dataclass(frozen=True)
class Noised:
    """K noised latents of each of U units: states_UKCHW, the noise that is in them, timestep_UK, and one prompt a unit.
    On the learner's device. One row more than units is a filler, of a rank that has no unit too."""

    states_UKCHW: Tensor
    noise_UKCHW: Tensor
    timestep_UK: Tensor
    prompts: tuple[str, ...]

    @staticmethod
    def of(states_UKCHW: Tensor, noise_UKCHW: Tensor, timestep_UK: Tensor, prompts: Sequence[str]) -> Noised:
        """Adds the filler."""

        def longer(value: Tensor) -> Tensor:
            return torch.cat([value, torch.ones_like(value[:1]) if len(value) else value.new_ones(1, *value.shape[1:])])

        return Noised(longer(states_UKCHW), longer(noise_UKCHW), longer(timestep_UK), (*prompts, ""))

    def __len__(self) -> int:
        return len(self.prompts) - 1


@dataclass(frozen=True)
class ErrorProbe:
    """Errors of the noise that the conditional branch predicts, latent_mean, (N, K) fp32; `with_reference` also the
    pretrained model's, (N, 2 K), evaluated in the same micro-batch and without a graph. Items are (unit,)."""

    policy: Policy
    noised: Noised
    with_reference: bool = False

    num_branches = 1

    @property
    def width(self) -> int:
        """K."""
        return self.noised.states_UKCHW.shape[1]

    @property
    def num_evaluations(self) -> int:
        """K, and as many of the reference."""
        return self.width * (1 + self.with_reference)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """An error an evaluation."""
        return (self.num_evaluations,)

    @property
    def filler_1K(self) -> Tensor:
        """The row behind the units."""
        return torch.tensor([[len(self.noised)]])

    def __call__(self, denoiser: Denoiser, item_NK: Tensor) -> Tensor:
        """Evaluates all latents of N units in one batch."""
        unit_N = item_NK[:, 0]
        rows = self._rows(unit_N)
        error_of = self._error_of(rows)
        errors = [error_of(self._predict(denoiser, rows))]
        if self.with_reference:
            with torch.no_grad(), self.policy.reference(denoiser) as reference:
                errors.append(error_of(self._predict(reference, rows)))
        return torch.cat([error_N.view(len(unit_N), self.width) for error_N in errors], dim=1)

    def _rows(self, unit_N: Tensor) -> Rows:
        """Returns all latents of N units, one after the other."""
        embedding_NLE = self.policy.embed_all([self.noised.prompts[unit] for unit in unit_N.tolist()])
        return Rows(
            unit_N.repeat_interleave(self.width),
            self.noised.states_UKCHW[unit_N].flatten(0, 1),
            self.noised.noise_UKCHW[unit_N].flatten(0, 1),
            self.noised.timestep_UK[unit_N].flatten(),
            embedding_NLE.repeat_interleave(self.width, 0),
        )

    def _predict(self, denoiser: Denoiser, rows: Rows) -> Tensor:
        return self.policy.predict_noise(denoiser, rows.state_NCHW, rows.timestep_N, rows.embedding_NLE)

    def _error_of(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        """Returns what gives the errors (N,) of a prediction (N, C, H, W)."""
        return lambda predicted_NCHW: (predicted_NCHW - rows.noise_NCHW).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Rows:
    """N latents of a micro-batch, and the unit that each belongs to."""

    unit_N: Tensor
    state_NCHW: Tensor
    noise_NCHW: Tensor
    timestep_N: Tensor
    embedding_NLE: Tensor


@dataclass(frozen=True)
class PerceptualProbe(ErrorProbe):
    """Errors between features of the frozen encoder, one denoising step further (NCP). Step noise and, for the uniform
    input, the fresh timestep are one for all latents of a unit, policy, reference and target."""

    encoder: Encoder = field(kw_only=True)
    settings: Perception = field(kw_only=True)
    step_noise_UCHW: Tensor = field(kw_only=True)
    fresh_timestep_U: Tensor = field(kw_only=True)

    def _error_of(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        """Encodes the true noise's states once for all estimates."""
        target = self._target(rows)
        return lambda predicted_NCHW: perceptual_error(predicted_NCHW, target, self.encoder)

    def _target(self, rows: Rows) -> Target:
        alpha_bar = self.policy.alpha_bar
        if self.settings.input == "uniform":
            constants = uniform_constants(alpha_bar, rows.timestep_N, self.fresh_timestep_U[rows.unit_N])
        else:
            constants = step_constants(alpha_bar, rows.timestep_N)
        step_noise_NCHW = self.step_noise_UCHW[rows.unit_N]
        return perceptual_target(
            rows.state_NCHW,
            rows.noise_NCHW,
            step_noise_NCHW,
            rows.embedding_NLE,
            constants,
            self.encoder,
            norm=self.settings.norm,
        )
