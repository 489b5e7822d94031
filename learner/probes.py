"""Probes: the scalars of a network that a loss needs, and how they are evaluated (algorithms.md 0.5).

    TransitionProbe   log pi(x_{t-1} | x_t, c) of (group, sibling, step) items, guidance included
    ErrorProbe        mean squared error of the predicted noise, or a flow's velocity, at noised images
    WalkProbe         the same at states that the policy visits itself (Diffusion-Sharpening's released code)
    PerceptualProbe   mean squared error of features (NCP)

A probe is called with a denoiser, so that policy, reference and opponent are evaluated alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from diffusion.chain import Chain
from diffusion.conditioning import Conditioning
from diffusion.excursion import walk_again
from diffusion.kernels import Transition, kernel_kl_latent_mean
from diffusion.perception import (
    Encode,
    Encoder,
    InputConstants,
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
        """Network evaluations that one item costs."""
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
    """Log-probabilities of a round's steps, (N,) fp64 latent_sum; with `ref_mean_PGTCHW` also each step's KL to the
    pretrained model, (N, 2): the exact one, times `kl_factor_T` where that is given. Items are (group, sibling,
    step)."""

    chain: Chain
    batch: RoundBatch
    ref_mean_PGTCHW: Tensor | None = None
    kl_factor_T: Tensor | None = None

    width = 1

    @property
    def num_branches(self) -> int:
        """Two with guidance."""
        return self.chain.num_branches

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
        if self.kl_factor_T is not None:
            kl_N = kl_N * self.kl_factor_T[item_NK[:, 2]]
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
            self.chain.policy.condition(self.batch.prompts)[group_N],
            next_state_NCHW=self.batch.latents_PGSCHW[group_N, sibling_N, step_N + 1],
        )


@dataclass(frozen=True)
class Noised:
    """K noised latents of each of U units: states_UKCHW, target_UKCHW (`Process.target`: the noise that is in them, or
    a flow's velocity), timestep_UK, and one prompt a unit. On the learner's device. One row more than units is a
    filler, of a rank that has no unit too."""

    states_UKCHW: Tensor
    target_UKCHW: Tensor
    timestep_UK: Tensor
    prompts: tuple[str, ...]

    @staticmethod
    def of(states_UKCHW: Tensor, target_UKCHW: Tensor, timestep_UK: Tensor, prompts: Sequence[str]) -> Noised:
        """Adds the filler."""

        def longer(value: Tensor) -> Tensor:
            return torch.cat([value, torch.ones_like(value[:1]) if len(value) else value.new_ones(1, *value.shape[1:])])

        return Noised(longer(states_UKCHW), longer(target_UKCHW), longer(timestep_UK), (*prompts, ""))

    def __len__(self) -> int:
        return len(self.prompts) - 1


@dataclass(frozen=True)
class ErrorProbe:
    """Errors of the noise, or a flow's velocity, that the conditional branch predicts, latent_mean, (N, K) fp32;
    `with_reference` also the pretrained model's, (N, 2 K), evaluated in the same micro-batch and without a graph. Items
    are (unit,)."""

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
        rows = self._rows(item_NK[:, 0])
        error_of = self._error_of(rows)
        rows, predicted_NCHW = self._visit(denoiser, rows)
        values = [error_of(predicted_NCHW)]
        if self.with_reference:
            with torch.no_grad(), self.policy.reference(denoiser) as reference:
                values.append(error_of(self._predict(reference, rows)))
        values += self._noted(predicted_NCHW.detach(), rows)
        return torch.cat([value_N.view(len(item_NK), self.width) for value_N in values], dim=1)

    def _rows(self, unit_N: Tensor) -> Rows:
        """Returns all latents of N units, one after the other."""
        conditioning = self.policy.condition([self.noised.prompts[unit] for unit in unit_N.tolist()])
        return Rows(
            unit_N.repeat_interleave(self.width),
            self.noised.states_UKCHW[unit_N].flatten(0, 1),
            self.noised.target_UKCHW[unit_N].flatten(0, 1),
            self.noised.timestep_UK[unit_N].flatten(),
            conditioning.repeat_interleave(self.width),
        )

    def _predict(self, denoiser: Denoiser, rows: Rows) -> Tensor:
        return self.policy.predict_target(denoiser, rows.state_NCHW, rows.timestep_N, rows.conditioning)

    def _visit(self, denoiser: Denoiser, rows: Rows) -> tuple[Rows, Tensor]:
        """Returns the states that policy and reference are evaluated at, and the policy's prediction."""
        return rows, self._predict(denoiser, rows)

    def _error_of(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        """Returns what gives the errors (N,) of a prediction (N, C, H, W)."""
        return functools.partial(_target_error, rows)

    def _noted(self, predicted_NCHW: Tensor, rows: Rows) -> list[Tensor]:  # noqa: ARG002
        """Returns what else is reported of the policy's prediction, (N,) each: nothing."""
        return []


@dataclass(frozen=True)
class Rows:
    """N latents of a micro-batch, and the unit that each belongs to."""

    unit_N: Tensor
    state_NCHW: Tensor
    target_NCHW: Tensor
    timestep_N: Tensor
    conditioning: Conditioning


def _target_error(rows: Rows, predicted_NCHW: Tensor) -> Tensor:
    return (predicted_NCHW - rows.target_NCHW).square().flatten(1).mean(1)


@dataclass(frozen=True)
class WalkProbe(ErrorProbe):
    """Errors at states that the policy visits itself, with a graph through the steps between them, as the released code
    of Diffusion-Sharpening has it: M states a candidate, one candidate's after the other's, of which the first alone is
    taken as it is given. The reference is evaluated at the same states."""

    num_states: int = field(kw_only=True)
    wire_dtype: torch.dtype = field(kw_only=True)

    def _visit(self, denoiser: Denoiser, rows: Rows) -> tuple[Rows, Tensor]:
        firsts = slice(None, None, self.num_states)
        conditioning = rows.conditioning[firsts]
        states_NMCHW, predicted_NMCHW = walk_again(
            lambda state, timestep: self.policy.predict(
                denoiser, state, self.policy.process.told(timestep), conditioning, 1.0
            ),
            rows.state_NCHW[firsts],
            rows.timestep_N.view(-1, self.num_states),
            self.policy.process,
            prediction_type=self.policy.prediction_type,
            wire_dtype=self.wire_dtype,
        )
        return replace(rows, state_NCHW=states_NMCHW.flatten(0, 1)), predicted_NMCHW.flatten(0, 1)


@dataclass(frozen=True)
class PerceptualProbe(ErrorProbe):
    """Errors between features of the frozen encoder, one denoising step further (NCP), and behind them the policy's
    errors in noise, without a graph: (N, num_evaluations + K). Step noise and, for the uniform input, the fresh
    timestep are one for all latents of a unit, policy, reference and target. `features` are those of all units'
    targets, one tensor (U K, ...) a block, where `TargetProbe` has encoded them before."""

    encoder: Encoder = field(kw_only=True)
    settings: Perception = field(kw_only=True)
    step_noise_UCHW: Tensor = field(kw_only=True)
    fresh_timestep_U: Tensor = field(kw_only=True)
    features: Sequence[Tensor] | None = field(default=None, kw_only=True)

    @property
    def value_shape(self) -> tuple[int, ...]:
        """An error an evaluation, and the errors in noise."""
        return (self.num_evaluations + self.width,)

    def k_NK(self, unit_N: Tensor) -> Tensor:
        """Returns by how much each latent's estimate moves the encoder's input, fp64: identity features have k^2 times
        the error in noise, and where k is 0 every estimate has error 0."""
        timestep_N = self.noised.timestep_UK[unit_N].flatten()
        return self._constants(timestep_N, unit_N.repeat_interleave(self.width)).k_N.view(-1, self.width)

    def target(self, unit_N: Tensor) -> Target:
        """Encodes the true noise's states of all latents of N units."""
        return self._target(self._rows(unit_N))

    def _error_of(self, rows: Rows) -> Callable[[Tensor], Tensor]:
        """Encodes the true noise's states once for all estimates."""
        target = self._target(rows)
        return lambda predicted_NCHW: perceptual_error(predicted_NCHW, target, self.encoder)

    def _noted(self, predicted_NCHW: Tensor, rows: Rows) -> list[Tensor]:
        return [_target_error(rows, predicted_NCHW)]

    def _target(self, rows: Rows) -> Target:
        return perceptual_target(
            rows.state_NCHW,
            rows.target_NCHW,
            self.step_noise_UCHW[rows.unit_N],
            rows.conditioning,
            self._constants(rows.timestep_N, rows.unit_N),
            self.encoder if self.features is None else self._look_up(rows),
            norm=self.settings.norm,
        )

    def _constants(self, timestep_N: Tensor, unit_N: Tensor) -> InputConstants:
        alpha_bar = self.policy.alpha_bar
        if self.settings.input == "uniform":
            return uniform_constants(alpha_bar, timestep_N, self.fresh_timestep_U[unit_N])
        return step_constants(alpha_bar, timestep_N)

    def _look_up(self, rows: Rows) -> Encode:
        """Returns features that are there instead of encoding."""
        assert self.features is not None
        member_N = torch.arange(len(rows.unit_N)) % self.width
        # A filler's errors do not count, so it may have any latent's features.
        place_N = (rows.unit_N * self.width + member_N).clamp(max=len(self.features[0]) - 1)
        found = [block[place_N].to(rows.state_NCHW.device) for block in self.features]
        return lambda *_: found


class TargetProbe:
    """Whether targets have features to divide by: (N, K) bool; no evaluation of the network. It keeps the features, in
    main memory, so that nothing is encoded twice."""

    num_branches = 1
    num_evaluations = 0

    def __init__(self, probe: PerceptualProbe) -> None:
        self._probe = probe
        self._features: list[Sequence[Tensor]] = []

    @property
    def width(self) -> int:
        """K."""
        return self._probe.width

    @property
    def value_shape(self) -> tuple[int, ...]:
        """A flag a latent."""
        return (self.width,)

    @property
    def filler_1K(self) -> Tensor:
        """The row behind the units."""
        return self._probe.filler_1K

    def __call__(self, denoiser: Denoiser, item_NK: Tensor) -> Tensor:  # noqa: ARG002
        """Encodes the targets of N units."""
        target = self._probe.target(item_NK[:, 0])
        self._features.append([block.cpu() for block in target.features])
        return target.usable_N.view(len(item_NK), self.width)

    def encoded(self) -> PerceptualProbe:
        """Returns the probe with the features of all units, which must have been evaluated in their order."""
        return replace(self._probe, features=[torch.cat(blocks) for blocks in zip(*self._features, strict=True)])
