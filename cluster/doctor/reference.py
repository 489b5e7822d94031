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
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
)
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
    """A pipeline that `DiffusionPipeline.from_pretrained` makes, with no code of ours in it. It samples by DDIM, or by
    Euler's steps if it is a flow's, whatever scheduler its files name."""

    def __init__(self, source: str, dtype: torch.dtype, device: str) -> None:
        with _quiet():
            index = DiffusionPipeline.load_config(source)
            absent = {name: None for name in index if name in NEVER_NEEDED or _left_out(index[name])}
            loaded = DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **absent)
        self._pipeline = loaded.to(device)
        self.is_flow = hasattr(self._pipeline, "transformer")
        kind = FlowMatchEulerDiscreteScheduler if self.is_flow else DDIMScheduler
        self._pipeline.scheduler = kind.from_config(self._pipeline.scheduler.config)
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

    def steps(self, sampler: Sampler, state_NCHW: Tensor, output_NCHW: Tensor, seed: int) -> PlainSteps:
        """Takes every step of a sampler by diffusers' scheduler, on the CPU: with noise of one seed a step, but for
        flows, whose scheduler has none."""
        scheduler = self._pipeline.scheduler
        if not self.is_flow:
            return _diffusion_steps(dict(scheduler.config), sampler, state_NCHW, output_NCHW, seed)
        noise_CHW = state_NCHW[0].to(self._pipeline.device)
        self._call("", noise_CHW, sampler.num_steps, 1.0, callback_on_step_end=_no_more_steps)
        return _flow_steps(scheduler, state_NCHW, output_NCHW)

    def run(self, prompt: str, noise_CHW: Tensor, num_steps: int, guidance_scale: float) -> PlainRun:
        """Samples one image, and notes what the scheduler is given."""
        scheduler, noted = self._pipeline.scheduler, []
        step = scheduler.step
        signature = inspect.signature(step)

        @functools.wraps(step)
        def noting(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            noted.append((given["sample"], torch.as_tensor(given["timestep"]), given["model_output"]))
            return step(*args, **kwargs)

        scheduler.step = noting
        try:
            self._call(prompt, noise_CHW, num_steps, guidance_scale)
        finally:
            scheduler.step = step
        states, timesteps, outputs = zip(*noted, strict=True)
        state_TCHW, output_TCHW = (self._unpacked(torch.cat(each), noise_CHW.shape) for each in (states, outputs))
        return PlainRun(state_TCHW, torch.stack(timesteps).cpu(), output_TCHW)

    def _call(self, prompt: str, noise_CHW: Tensor, num_steps: int, guidance_scale: float, **options: Any) -> None:
        pipeline, (channels, height, width) = self._pipeline, noise_CHW.shape
        latent = noise_CHW[None].to(pipeline.device, pipeline.dtype)
        if isinstance(pipeline, FluxPipeline):
            latent = pipeline._pack_latents(latent, 1, channels, height, width)
            if not pipeline.transformer.config.guidance_embeds:
                options |= {"true_cfg_scale": guidance_scale, "negative_prompt": ""}
        pipeline(
            prompt,
            latents=latent,
            height=height * pipeline.vae_scale_factor,
            width=width * pipeline.vae_scale_factor,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            **options,
        )

    def _unpacked(self, latent_TX: Tensor, shape_CHW: torch.Size) -> Tensor:
        """Returns latents as the network has them, as (T, C, H, W) fp32 on the CPU: FLUX's are tokens."""
        if isinstance(self._pipeline, FluxPipeline):
            factor = self._pipeline.vae_scale_factor
            height, width = (side * factor for side in shape_CHW[1:])
            latent_TX = self._pipeline._unpack_latents(latent_TX, height, width, factor)
        return latent_TX.float().cpu()


def _left_out(entry: Any) -> bool:
    """Of model_index.json: a part that the model has been saved without, as Stable Diffusion 3 may be without T5."""
    return isinstance(entry, list | tuple) and entry[0] is None


def _no_more_steps(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    pipeline._interrupt = True
    return tensors


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


def _diffusion_steps(
    config: dict[str, Any], sampler: Sampler, state_NCHW: Tensor, output_NCHW: Tensor, seed: int
) -> PlainSteps:
    """The last step follows the sampler's own rule, as `set_alpha_to_one` has it for DDIM."""
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


def _flow_steps(scheduler: Any, state_NCHW: Tensor, output_NCHW: Tensor) -> PlainSteps:
    """The steps that a pipeline has set its scheduler to, by Euler's method whatever its configuration says."""
    euler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, stochastic_sampling=False)
    euler.timesteps, euler.sigmas = scheduler.timesteps.cpu(), scheduler.sigmas.cpu()
    nexts = [euler.step(output_NCHW, timestep, state_NCHW).prev_sample for timestep in euler.timesteps]
    every_T = torch.ones(len(nexts), dtype=torch.bool)
    return PlainSteps(torch.stack(nexts), euler.timesteps, every_T, dict(scheduler.config))
