"""The policy: a text-to-image model from diffusers, the parts of it that are trained, and its reference.

With `families`, which says what differs between base models, the only home of `diffusers` and `peft`. Nothing here
draws noise or knows of tickets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from diffusion.conditioning import Conditioning
from diffusion.families import family_of
from diffusion.families.loading import load
from diffusion.kernels import PredictionType, guide, predicted_noise_and_clean
from diffusion.schedules import StepConstants, make_schedule, noise_level
from diffusion.weights import State, weights_digest
from protocol.errors import ModelError
from protocol.memory import MAX_CACHED_PROMPTS
from protocol.paths import model_source
from protocol.recipe import Full, Lora, Recipe, Sampler
from protocol.seeds import Purpose, derive_seed

# Every process of a run loads the model; their progress bars would bury the run's own.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

Denoiser = Callable[..., Any]
"""A U-Net, or an engine that wraps it: called as its family calls it."""


class Policy:
    """A latent diffusion model, frozen but for its trainable part.

    All networks are in eval mode (dropout off) in one compute dtype, so that policy, reference and rollouts
    compute alike (algorithms.md 0.7 rule 3).
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
    ) -> None:
        """Loads a folder or hub id. `seed` fixes the adapters' initial weights. Raises ModelError."""
        self.source, self.dtype, self.device = source, dtype, torch.device(device)
        self.trainable = trainable
        self.denoiser: UNet2DConditionModel = self._frozen(
            load(UNet2DConditionModel, source, "unet", torch_dtype=dtype)
        )
        self.family = family_of(source)(source, dtype)
        for network in self.family.networks:
            self._frozen(network)
        self.vae: AutoencoderKL | None = None
        if with_decoder:
            self.vae = self._frozen(load(AutoencoderKL, source, "vae", torch_dtype=dtype))
        self.base_digest = weights_digest(self.denoiser.state_dict())
        self._scheduler = load(DDIMScheduler, source, "scheduler")
        self._encoded: dict[str, Conditioning] = {}
        self._frozen_denoiser: UNet2DConditionModel | None = None
        self._adapters_enabled = True
        self.num_evaluations = 0
        """Latents that `predict` has evaluated so far, each branch of guidance by itself."""
        self._make_trainable(seed)

    @classmethod
    def from_recipe(cls, recipe: Recipe, device: torch.device | str = "cpu", *, with_decoder: bool = True) -> Policy:
        """Loads a recipe's base model with its trainable part, as learner, rollouts and evaluation all do."""
        return cls(
            model_source(recipe.model.path),
            trainable=recipe.model.trainable,
            seed=recipe.seed,
            dtype=torch.bfloat16 if recipe.learner.precision == "bf16" else torch.float32,
            device=device,
            with_decoder=with_decoder,
        )

    @property
    def latent_shape_CHW(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        config = self.denoiser.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def image_side(self) -> int:
        """Side of an image in pixels: the autoencoder halves at each block but the last."""
        assert self.vae is not None, "this policy was loaded without its autoencoder"
        side: int = self.latent_shape_CHW[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)
        return side

    @property
    def prediction_type(self) -> PredictionType:
        """What the network's output stands for."""
        kind = self._scheduler.config.prediction_type
        if kind not in get_args(PredictionType):
            raise ModelError(
                "the base model predicts something unknown", value=kind, expected=f"one of {get_args(PredictionType)}"
            )
        known: PredictionType = kind
        return known

    @property
    def alpha_bar(self) -> Tensor:
        """The cumulative signal levels of training, (1000,) or as many as the model's timesteps, on its device."""
        levels: Tensor = self._scheduler.alphas_cumprod
        return levels.to(self.device)

    def schedule(self, sampler: Sampler) -> StepConstants:
        """Returns the constants of a sampler's T steps on this model's noise schedule. Raises ModelError."""
        self._scheduler.set_timesteps(sampler.num_steps)
        timesteps_T = self._scheduler.timesteps.cpu()
        if sampler.last_step == "clamp" and timesteps_T[-1] == 0:
            raise ModelError(
                "sampler.last_step: clamp stops at timestep 0, but this model's last step starts there",
                value=timesteps_T.tolist(),
                do="set sampler.last_step: unscored, or give the model's scheduler steps_offset 1",
            )
        return make_schedule(
            self._scheduler.alphas_cumprod,
            timesteps_T,
            kernel=sampler.kernel,
            eta=sampler.eta,
            last_step=sampler.last_step,
        ).to(self.device)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """Returns N prompts as the network is told them, from a cache. Each is encoded by itself; the empty one is what
        guidance leads away from."""
        return Conditioning.cat([self._encode(prompt) for prompt in prompts])

    def _encode(self, prompt: str) -> Conditioning:
        if prompt not in self._encoded:
            if len(self._encoded) >= MAX_CACHED_PROMPTS:
                self._encoded.pop(next(iter(self._encoded)))
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
        """Returns the guided network output, (N, C, H, W) fp32. Guidance 1 evaluates one branch only."""
        state_NCHW = state_NCHW.to(self.dtype)
        self.num_evaluations += len(state_NCHW) * (1 if guidance_scale == 1.0 else 2)
        if guidance_scale == 1.0:
            return self.family.call(denoiser, state_NCHW, timestep_N, conditioning).float()
        output = self.family.call(
            denoiser,
            torch.cat([state_NCHW, state_NCHW]),
            torch.cat([timestep_N, timestep_N]),
            Conditioning.cat([self.condition([""]).expand(len(conditioning)), conditioning]),
        )
        unconditional_NCHW, conditional_NCHW = output.float().chunk(2)
        return guide(unconditional_NCHW, conditional_NCHW, guidance_scale)

    def predict_noise(
        self, denoiser: Denoiser, state_NCHW: Tensor, timestep_N: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Returns the noise that the conditional branch predicts in N noised latents, (N, C, H, W) fp32, whatever the
        network's output stands for."""
        output_NCHW = self.predict(denoiser, state_NCHW, timestep_N, conditioning, 1.0)
        level = noise_level(self.alpha_bar, timestep_N)
        return predicted_noise_and_clean(state_NCHW, output_NCHW, level, self.prediction_type)[0]

    @torch.no_grad()
    def encode(self, images_NHWC: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the latents of uint8 images (N, H, W, 3): fp32 (N, C, h, w) each, on
        the CPU, in the units that the U-Net sees. Each image is encoded by itself."""
        assert self.vae is not None, "this policy was loaded without its autoencoder"
        pixels = torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1
        posteriors = [self.vae.encode(image[None].to(self.device, self.dtype)).latent_dist for image in pixels]
        scale = self.vae.config.scaling_factor
        mean, std = (torch.cat([getattr(p, name) for p in posteriors]).float().cpu() for name in ("mean", "std"))
        return mean * scale, std * scale

    @torch.no_grad()
    def decode(self, latent_NCHW: Tensor) -> np.ndarray:
        """Returns images, uint8 (N, H, W, 3)."""
        assert self.vae is not None, "this policy was loaded without its decoder"
        latent = latent_NCHW.to(self.device, self.dtype) / self.vae.config.scaling_factor
        pixels = (self.vae.decode(latent).sample.float() / 2 + 0.5).clamp(0, 1)
        images: np.ndarray = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return images

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
        """Makes backward passes compute again what is inside the U-Net's blocks, instead of keeping it."""
        self.denoiser.enable_gradient_checkpointing()

    def keep_reference(self) -> None:
        """Full fine-tuning: keeps a frozen copy of the weights as they are now. LoRA needs none."""
        if isinstance(self.trainable, Full):
            self._frozen_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)

    def export(self, folder: Path) -> None:
        """Writes what a plain diffusers pipeline loads: `pytorch_lora_weights.safetensors` for
        `load_lora_weights`, or a `unet/` folder for `UNet2DConditionModel.from_pretrained`."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.trainable, Full):
            self.denoiser.save_pretrained(folder / "unet")
            return
        layers = {name: t.detach().cpu().float() for name, t in get_peft_model_state_dict(self.denoiser).items()}
        # Without its metadata a reader would take alpha to be the rank.
        metadata = self.denoiser.peft_config["default"].to_dict()
        self.family.pipeline.save_lora_weights(
            str(folder), unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
        )

    def _switch_adapters(self, enabled: bool) -> None:
        if enabled != self._adapters_enabled:
            assert not isinstance(self.trainable, Full), "keep_reference makes the reference of full fine-tuning"
            (self.denoiser.enable_adapters if enabled else self.denoiser.disable_adapters)()
            self._adapters_enabled = enabled

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
