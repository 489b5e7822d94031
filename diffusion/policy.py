"""The policy: a text-to-image model from diffusers, the parts of it that are trained, and its reference.

With `families`, which says what differs between base models, the only home of `diffusers` and `peft`. Nothing here
draws noise or knows of tickets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from diffusion.conditioning import Conditioning
from diffusion.families import family_of
from diffusion.families.loading import load, load_config
from diffusion.kernels import PredictionType, guide
from diffusion.peak_memory import release_unused
from diffusion.process import Process, VariancePreserving
from diffusion.schedules import StepConstants
from diffusion.starting_lora import (
    Layers,
    adapter_layers,
    add_to_weights,
    joined,
    read_starting_lora,
    save_layers,
    tensors_of,
)
from diffusion.weights import State, weights_digest
from protocol.errors import ModelError
from protocol.memory import MAX_CACHED_PROMPTS
from protocol.models import evaluations, latent_shape, vae_factor
from protocol.paths import model_source
from protocol.recipe import Full, Lora, Recipe, Sampler
from protocol.requirements import check_model
from protocol.seeds import Purpose, derive_seed
from protocol.starting_lora import StartingLora

# Every process of a run loads the model; their progress bars would bury the run's own.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The compute dtype of each `learner.precision`."""

Denoiser = Callable[..., Any]
"""A U-Net or transformer, or an engine that wraps it: called as its family calls it."""


class Policy:
    """A latent diffusion model, frozen but for its trainable part.

    All networks are in eval mode (dropout off) in one compute dtype, so that policy, reference and rollouts
    compute alike (algorithms.md 0.7 rule 3); only an autoencoder that overflows in fp16 stays in fp32.
    """

    def __init__(
        self,
        source: str,
        *,
        trainable: Lora | Full,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        with_decoder: bool = True,
        resolution: int | None = None,
        lora: StartingLora | None = None,
    ) -> None:
        """Loads a folder or hub id, for images of `resolution` pixels or the model's own size, and adds `lora` into it.
        `seed` fixes the adapters' initial weights. Raises ModelError."""
        self.source, self.dtype, self.device = source, dtype, torch.device(device)
        if dtype == torch.float32:
            # torch rounds the factors of an fp32 convolution to 10 bits on a GPU, unless it is told not to.
            cudnn: Any = torch.backends.cudnn
            cudnn.conv.fp32_precision = "ieee"
        self.trainable = trainable
        # Added to weights of half precision, most of a LoRA would be rounded away.
        loaded = dtype if lora is None else torch.float32
        kind = family_of(source)
        self.denoiser = load(kind.denoiser, source, kind.part, torch_dtype=loaded)
        vae_config = load_config(AutoencoderKL, source, "vae")
        self._vae_factor = vae_factor(vae_config)
        self.latent_shape_CHW = latent_shape(kind.pipeline.__name__, self.denoiser.config, vae_config, resolution)
        self.family = kind(source, loaded, self.latent_shape_CHW)
        networks = {self.family.part: self.denoiser, **self.family.networks}
        self.starting: Layers = {} if lora is None else read_starting_lora(lora, self.family.pipeline, networks)
        """The layers of the starting LoRA, which are in the weights."""
        # Of what is added, not of the sum, whose last bits differ between machines.
        self.base_digest = weights_digest({**self.denoiser.state_dict(), **tensors_of(self.starting)})
        if self.starting:
            add_to_weights(self.starting, networks, dtype)
        for network in networks.values():
            self._frozen(network)
        self.process = self._placed(self.family.scheduler.process)
        self.vae: AutoencoderKL | None = None
        if with_decoder:
            self.vae = self._frozen(_load_vae(source, dtype))
        self._encoded: dict[str, Conditioning] = {}
        self._frozen_denoiser: Any = None
        self.average_denoiser: Any = None
        """Where `keep_average` was called: a network like `denoiser`, frozen, whose weights the caller sets."""
        self._adapters_enabled = True
        self.num_evaluations = 0
        """Latents that `predict` has evaluated so far, each branch of guidance by itself."""
        self._make_trainable(seed)

    @classmethod
    def from_recipe(cls, recipe: Recipe, device: torch.device | str = "cpu", *, with_decoder: bool = True) -> Policy:
        """Loads a recipe's base model with its trainable part, as learner, rollouts and evaluation all do."""
        policy = cls(
            model_source(recipe.model.path),
            trainable=recipe.model.trainable,
            seed=recipe.seed,
            dtype=DTYPES[recipe.learner.precision],
            device=device,
            with_decoder=with_decoder,
            resolution=recipe.model.resolution,
            lora=recipe.model.lora,
        )
        # A hub id's files are seen here first.
        check_model(recipe, policy.prediction_type)
        return policy

    @property
    def image_side(self) -> int:
        """Side of an image in pixels."""
        return self.latent_shape_CHW[1] * self._vae_factor

    @property
    def prediction_type(self) -> PredictionType:
        """What the network's output stands for."""
        return self.family.scheduler.prediction_type

    @property
    def alpha_bar(self) -> Tensor:
        """The cumulative signal levels of training, (1000,) or as many as the model's timesteps, on its device. Raises
        ModelError for a flow-matching model."""
        if not isinstance(self.process, VariancePreserving):
            raise ModelError("a flow-matching model has no cumulative signal levels", value=self.source)
        return self.process.alpha_bar

    def num_branches(self, guidance_scale: float) -> int:
        """Returns how often guidance evaluates the network."""
        return evaluations(guidance_scale, embeds_guidance=self.family.embeds_guidance)

    def schedule(self, sampler: Sampler) -> StepConstants:
        """Returns the constants of a sampler's T steps on this model's noise schedule. Raises ModelError."""
        return self.family.scheduler.steps(sampler).to(self.device)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """Returns N prompts as the network is told them, from a cache. Each is encoded by itself; the empty one is what
        guidance leads away from."""
        return Conditioning.cat([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        if prompt not in self._encoded:
            if len(self._encoded) >= MAX_CACHED_PROMPTS:
                self._encoded.pop(next(iter(self._encoded)))
            self._bring(*self.family.networks.values())
            self._encoded[prompt] = self.family.encode(prompt)
        return self._encoded[prompt]

    def predict(
        self,
        denoiser: Denoiser,
        state_NCHW: Tensor,
        timestep_N: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
    ) -> Tensor:
        """Returns the guided network output, (N, C, H, W) fp32, at what the network is told as timesteps."""
        state_NCHW = state_NCHW.to(self.dtype)
        num_branches = self.num_branches(guidance_scale)
        self.num_evaluations += len(state_NCHW) * num_branches
        if self.family.embeds_guidance:
            conditioning = conditioning.guided(guidance_scale)
        if num_branches == 1:
            return self.family.call(denoiser, state_NCHW, timestep_N, conditioning).float()
        output = self.family.call(
            denoiser,
            torch.cat([state_NCHW, state_NCHW]),
            torch.cat([timestep_N, timestep_N]),
            Conditioning.cat([self.condition([""]).expand(len(conditioning)), conditioning]),
        )
        unconditional_NCHW, conditional_NCHW = output.float().chunk(2)
        return guide(unconditional_NCHW, conditional_NCHW, guidance_scale)

    def predict_target(
        self, denoiser: Denoiser, state_NCHW: Tensor, timestep_N: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Returns what the conditional branch predicts of the target (`Process.target`) in latents noised at N
        timesteps of training, (N, C, H, W) fp32: the noise, whatever the network's output stands for, or a velocity."""
        output_NCHW = self.predict(denoiser, state_NCHW, self.process.told(timestep_N), conditioning, 1.0)
        return self.process.predicted_target(state_NCHW, output_NCHW, timestep_N, self.prediction_type)

    @torch.no_grad()
    def encode(self, images_NHWC: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the latents of uint8 images (N, H, W, 3): fp32 (N, C, h, w) each, on
        the CPU, in the units that the network sees. Each image is encoded by itself."""
        assert self.vae is not None, "this policy was loaded without its autoencoder"
        self._bring(self.vae)
        pixels = torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1
        posteriors = [self.vae.encode(image[None].to(self.device, self.vae.dtype)).latent_dist for image in pixels]
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor or 0.0
        mean, std = (torch.cat([getattr(p, name) for p in posteriors]).float().cpu() for name in ("mean", "std"))
        return (mean - shift) * scale, std * scale

    @torch.no_grad()
    def decode(self, latent_NCHW: Tensor) -> np.ndarray:
        """Returns images, uint8 (N, H, W, 3)."""
        assert self.vae is not None, "this policy was loaded without its decoder"
        self._bring(self.vae)
        latent = latent_NCHW.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        latent = latent + (self.vae.config.shift_factor or 0.0)
        pixels = (self.vae.decode(latent).sample.float() / 2 + 0.5).clamp(0, 1)
        images: np.ndarray = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return images

    def set_aside(self) -> None:
        """Moves what stands beside the denoiser, text encoders and autoencoder, to main memory until it is used again,
        and gives back what memory is not in use."""
        for network in (self.vae, *self.family.networks.values()):
            if network is not None:
                network.to("cpu")
        release_unused(self.device)

    def trainable_state(self) -> dict[str, Tensor]:
        """Returns the trained parameters by name; the tensors are the live ones."""
        return {name: p.data for name, p in self.denoiser.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_trainable_state(self, state: State) -> None:
        """Copies weights into the trained parameters. Raises ModelError unless names and shapes agree."""
        own = self.trainable_state()
        wrong = sorted(set(own) ^ set(state)) or [n for n in own if own[n].shape != state[n].shape]
        if wrong:
            raise ModelError(
                f"weights do not fit this model, first at {wrong[0]}",
                expected=f"{len(own)} tensors as model.trainable makes them",
                do="use the recipe that the weights were trained with",
            )
        for name, parameter in own.items():
            parameter.copy_(state[name])

    @contextmanager
    def reference(self, denoiser: Denoiser) -> Iterator[Denoiser]:
        """Yields the pretrained network: `denoiser` with adapters off, or the frozen copy."""
        if self._frozen_denoiser is not None:
            yield self._frozen_denoiser
            return
        with self.adapters(enabled=False):
            yield denoiser

    @contextmanager
    def adapters(self, *, enabled: bool) -> Iterator[None]:
        """Within it the adapters are on or off, and afterwards as they were before, so that uses may be nested."""
        before = self._adapters_enabled
        self._switch_adapters(enabled)
        try:
            yield
        finally:
            self._switch_adapters(before)

    def forget_activations(self) -> None:
        """Makes backward passes compute again what is inside the network's blocks, instead of keeping it."""
        self.denoiser.enable_gradient_checkpointing()

    def keep_reference(self) -> None:
        """Full fine-tuning: keeps a frozen copy of the weights as they are now. LoRA needs none."""
        if isinstance(self.trainable, Full):
            self._frozen_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)

    def keep_average(self) -> None:
        """Keeps a second, frozen network, which holds the weights as they are now until the caller sets others."""
        self.average_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)

    def export(self, folder: Path) -> None:
        """Writes what a plain diffusers pipeline loads: `pytorch_lora_weights.safetensors` for `load_lora_weights` on
        the base model, which has the starting LoRA's layers too, or a folder for each network that is not the base's.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.trainable, Full):
            self.save_networks(folder)
            return
        trained = adapter_layers(get_peft_model_state_dict(self.denoiser), self.trainable.alpha / self.trainable.rank)
        save_layers(joined(self.starting, {self.family.part: trained}), self.family.pipeline, folder)

    def save_networks(self, folder: Path) -> None:
        """Writes the denoiser and the text encoders that the starting LoRA has changed, each to a folder of its own."""
        for part, network in self.changed_networks.items():
            network.save_pretrained(folder / part)

    @property
    def changed_networks(self) -> dict[str, Any]:
        """The networks that are not the base model's, by part of the pipeline."""
        encoders = {part: network for part, network in self.family.networks.items() if part in self.starting}
        return {self.family.part: self.denoiser, **encoders}

    def _switch_adapters(self, enabled: bool) -> None:
        if enabled != self._adapters_enabled:
            assert not isinstance(self.trainable, Full), "keep_reference makes the reference of full fine-tuning"
            (self.denoiser.enable_adapters if enabled else self.denoiser.disable_adapters)()
            self._adapters_enabled = enabled

    def _placed(self, process: Process) -> Process:
        """Puts a process's levels on the policy's device."""
        return type(process)(*(getattr(process, field.name).to(self.device) for field in fields(process)))

    def _bring(self, *networks: Any) -> None:
        """Puts networks that may have been set aside on the policy's device."""
        for network in networks:
            network.to(self.device)

    def _frozen(self, network: Any) -> Any:
        return network.to(self.device).eval().requires_grad_(False)

    def _make_trainable(self, seed: int) -> None:
        if isinstance(self.trainable, Full):
            self.denoiser.requires_grad_(True)
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, Purpose.ADAPTER_INIT))
            self.denoiser.add_adapter(_lora_config(self.trainable))
        for parameter in self.denoiser.parameters():
            parameter.data = parameter.data.to(self.device, self.dtype)
        self.denoiser.eval()


def _lora_config(lora: Lora) -> LoraConfig:
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))


def _load_vae(source: str, dtype: torch.dtype) -> AutoencoderKL:
    """Returns the autoencoder, in fp32 instead of fp16 where its `force_upcast` says that activations overflow, as
    Stable Diffusion XL's do: what diffusers' pipeline of it does. bf16 has the range of fp32."""
    if dtype == torch.float16 and load_config(AutoencoderKL, source, "vae").get("force_upcast", True):
        dtype = torch.float32
    return load(AutoencoderKL, source, "vae", torch_dtype=dtype)
