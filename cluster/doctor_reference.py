"""Diffusers as it comes, to hold our own code against: a plain pipeline, and its schedulers' own steps."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from torch import Tensor

from protocol.recipe import Sampler

NEVER_NEEDED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class PlainRun:
    """What a plain pipeline gave its scheduler, step by step: states and guided network outputs, (T, C, H, W) fp32, and
    timesteps, all on the CPU."""

    state_TCHW: Tensor
    timestep_T: Tensor
    output_TCHW: Tensor


class PlainPipeline:
    """A pipeline that `DiffusionPipeline.from_pretrained` makes, sampling by DDIM, with no code of ours in it."""

    def __init__(self, source: str, dtype: torch.dtype, device: str) -> None:
        with _quiet():
            absent = {name: None for name in NEVER_NEEDED if name in DiffusionPipeline.load_config(source)}
            self._pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **absent).to(
                device
            )
        self._pipeline.scheduler = DDIMScheduler.from_config(self._pipeline.scheduler.config)
        self._pipeline.set_progress_bar_config(disable=True)

    def add_lora(self, file: Path, scale: float) -> None:
        """Loads a LoRA as diffusers does it."""
        with _quiet():
            self._pipeline.load_lora_weights(str(file), adapter_name="starting")
            self._pipeline.set_adapters("starting", scale)

    @property
    def name(self) -> str:
        """The pipeline's class."""
        return type(self._pipeline).__name__

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """The scheduler's configuration as the pipeline uses it: some correct what old models' files say."""
        return dict(self._pipeline.scheduler.config)

    def run(self, prompt: str, noise_CHW: Tensor, num_steps: int, guidance_scale: float) -> PlainRun:
        """Samples one image, and notes what the scheduler is given."""
        scheduler, noted = self._pipeline.scheduler, []
        step = scheduler.step
        signature = inspect.signature(step)

        @functools.wraps(step)
        def noting(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            noted.append((given["sample"][0], torch.as_tensor(given["timestep"]), given["model_output"][0]))
            return step(*args, **kwargs)

        scheduler.step = noting
        try:
            self._pipeline(
                prompt,
                latents=noise_CHW[None].to(self._pipeline.device, self._pipeline.dtype),
                num_inference_steps=num_steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            )
        finally:
            scheduler.step = step
        states, timesteps, outputs = zip(*noted, strict=True)
        return PlainRun(
            torch.stack(states).float().cpu(), torch.stack(timesteps).long().cpu(), torch.stack(outputs).float().cpu()
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what diffusers says of files that it corrects, which a finding tells where it matters."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "The following alpha_pattern keys", RuntimeWarning)
            yield
    finally:
        diffusers.utils.logging.set_verbosity(before)


@dataclass(frozen=True)
class PlainSteps:
    """A diffusers scheduler's own T steps from the same inputs: where each led, (T, N, C, H, W); the timesteps that
    it took them at; which of them it steps to the next timestep of its own grid; and its configuration."""

    next_TNCHW: Tensor
    timestep_T: Tensor
    to_next_T: Tensor
    config: dict[str, Any]


def plain_steps(
    config: dict[str, Any], sampler: Sampler, state_NCHW: Tensor, output_NCHW: Tensor, seed: int
) -> PlainSteps:
    """Takes every step of a schedule by diffusers' scheduler, with noise of one seed a step, on the CPU.

    The last step follows the sampler's own rule, as `set_alpha_to_one` has it for DDIM.
    """
    kind = DDIMScheduler if sampler.kernel == "ddim" else DDPMScheduler
    last = {"set_alpha_to_one": sampler.last_step == "unscored"} if kind is DDIMScheduler else {}
    scheduler = kind.from_config(config, **last)
    scheduler.set_timesteps(sampler.num_steps)
    options = {"eta": sampler.eta} if kind is DDIMScheduler else {}
    nexts = []
    for number, timestep in enumerate(scheduler.timesteps):
        generator = torch.Generator().manual_seed(seed + number)
        nexts.append(scheduler.step(output_NCHW, timestep, state_NCHW, generator=generator, **options).prev_sample)
    timestep_T = scheduler.timesteps.long()
    stride = scheduler.config.num_train_timesteps // sampler.num_steps
    to_next_T = torch.ones(len(timestep_T), dtype=torch.bool)
    if kind is DDIMScheduler:
        to_next_T[:-1] = timestep_T[:-1] - timestep_T[1:] == stride
        to_next_T[-1] = timestep_T[-1] < stride
    return PlainSteps(torch.stack(nexts), timestep_T, to_next_T, dict(scheduler.config))
