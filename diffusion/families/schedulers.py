"""A base model's scheduler, for what is in its files alone: noise levels, and the steps that its pipeline takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusion.families.loading import load
from diffusion.kernels import PredictionType
from diffusion.process import Flow, VariancePreserving, told_share
from diffusion.schedules import StepConstants, make_flow_schedule, make_schedule
from protocol.errors import ModelError
from protocol.recipe import Sampler


class DiffusionScheduler:
    """Of models that predict noise, v or x0."""

    def __init__(self, source: str, **corrections: int) -> None:
        """Reads a folder or hub id. `corrections`: what the model's pipeline puts right in the scheduler's settings by
        itself. Raises ModelError."""
        self._scheduler = load(DDIMScheduler, source, "scheduler", **corrections)
        self.process = VariancePreserving(self._scheduler.alphas_cumprod)
        self.prediction_type: PredictionType = self._scheduler.config.prediction_type
        known = [kind for kind in get_args(PredictionType) if kind != "flow"]
        if self.prediction_type not in known:
            raise ModelError(
                "the base model predicts something unknown", value=self.prediction_type, expected=f"one of {known}"
            )

    def steps(self, sampler: Sampler) -> StepConstants:
        """Returns the constants of a sampler's T steps. Raises ModelError."""
        if sampler.kernel == "flow_grpo" or sampler.kernel == "dance_grpo":
            raise _other_kernel(sampler.kernel, "a diffusion model", "ddim or ddpm")
        self._scheduler.set_timesteps(sampler.num_steps)
        timesteps_T = self._scheduler.timesteps.cpu()
        if sampler.last_step == "clamp" and timesteps_T[-1] == 0:
            raise ModelError(
                "sampler.last_step: clamp stops at timestep 0, but this model's last step starts there",
                value=timesteps_T.tolist(),
                do="set sampler.last_step: unscored, or give the model's scheduler steps_offset 1",
            )
        return make_schedule(
            self.process.alpha_bar, timesteps_T, kernel=sampler.kernel, eta=sampler.eta, last_step=sampler.last_step
        )


class FlowScheduler:
    """Of flow-matching models. Which shares of noise a sampler visits, and training draws, depends on the number of
    image tokens where the model's scheduler shifts by it."""

    prediction_type: PredictionType = "flow"

    def __init__(self, source: str, num_tokens: int, *, even_shares: bool) -> None:
        """Reads a folder or hub id. `even_shares`: the model's pipeline spreads a sampler's shares of noise evenly from
        1 to 1/T before they are shifted, instead of leaving that to the scheduler. Raises ModelError."""
        self._scheduler = load(FlowMatchEulerDiscreteScheduler, source, "scheduler")
        self._even_shares = even_shares
        config = self._scheduler.config
        self._shift = {"mu": shift_of(num_tokens, config)} if config.use_dynamic_shifting else {}
        self.process = Flow(self._training_shares())

    def steps(self, sampler: Sampler) -> StepConstants:
        """Returns the constants of a sampler's T steps. Raises ModelError."""
        if sampler.kernel == "ddim" or sampler.kernel == "ddpm":
            raise _other_kernel(sampler.kernel, "a flow-matching model", "flow_grpo or dance_grpo")
        num_steps = sampler.num_steps
        even = {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps)} if self._even_shares else {}
        self._scheduler.set_timesteps(None if even else num_steps, **even, **self._shift)
        share_T = self._scheduler.sigmas[:-1].cpu().double()
        return make_flow_schedule(share_T, told_share(share_T), kernel=sampler.kernel, eta=sampler.eta)

    def _training_shares(self) -> torch.Tensor:
        """Returns the shares of noise of all timesteps of training, the smallest first."""
        num_timesteps = self._scheduler.config.num_train_timesteps
        if not self._shift:
            shares: torch.Tensor = self._scheduler.sigmas.flip(0).double()
            return shares
        self._scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_timesteps, num_timesteps), **self._shift)
        of_all: torch.Tensor = self._scheduler.sigmas[:-1].cpu().flip(0).double()
        return of_all


def shift_of(num_tokens: int, config: Mapping[str, Any]) -> float:
    """Returns the exponent by which a schedule is shifted towards noise: a line in the number of image tokens (Esser et
    al., arXiv 2403.03206, Section 5.3.2, as diffusers' pipelines have it)."""
    few, many = config["base_image_seq_len"], config["max_image_seq_len"]
    low, high = config["base_shift"], config["max_shift"]
    return float(low + (num_tokens - few) * (high - low) / (many - few))


def _other_kernel(kernel: str, kind: str, expected: str) -> ModelError:
    return ModelError(f"sampler.kernel is not for {kind}", value=kernel, expected=expected, do="correct sampler.kernel")
