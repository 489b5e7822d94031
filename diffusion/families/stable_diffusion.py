"""Stable Diffusion 1.x and 2.x: one text encoder, cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from diffusion.conditioning import Conditioning
from diffusion.families.loading import check_tokenizer, load, token_ids
from diffusion.families.schedulers import DiffusionScheduler


class StableDiffusion:
    """What Stable Diffusion 1.x and 2.x do their own way."""

    pipeline = StableDiffusionPipeline
    """Of diffusers: what loads the whole model, and writes adapters."""
    denoiser = UNet2DConditionModel
    """The network that is trained."""
    part = "unet"
    """Its folder, and the prefix of its adapters' names."""
    embeds_guidance = False
    """Whether the network is told the guidance scale, instead of being evaluated with and without the prompt."""

    def __init__(
        self,
        source: str,
        dtype: torch.dtype,
        latent_shape_CHW: tuple[int, int, int],  # noqa: ARG002
    ) -> None:
        """Loads the text encoder and the scheduler of a folder or hub id. Raises ModelError."""
        # Its pipeline switches clip_sample off too, which our steps never do.
        self.scheduler = DiffusionScheduler(source, steps_offset=1)
        self.tokenizer = load(CLIPTokenizer, source, "tokenizer")
        self.text_encoder = load(CLIPTextModel, source, "text_encoder", dtype=dtype)
        check_tokenizer(self.tokenizer, self.text_encoder.config, source, "tokenizer")

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What encodes text, by part of the pipeline, to be frozen and put on a device."""
        return {"text_encoder": self.text_encoder}

    def encode(self, prompt: str) -> Conditioning:
        """Returns one prompt, by itself. The empty one is what guidance leads away from."""
        tokens = token_ids(self.tokenizer, prompt).to(self.text_encoder.device)
        return Conditioning(self.text_encoder(tokens)[0])

    @staticmethod
    def call(denoiser: Any, state_NCHW: Tensor, timestep_N: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the U-Net's output, (N, C, H, W)."""
        output: Tensor = denoiser(state_NCHW, timestep_N, encoder_hidden_states=conditioning.text_NLE).sample
        return output
