"""Stable Diffusion XL (Podell et al., arXiv 2307.01952): two text encoders, a pooled prompt, and the image's size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusion.conditioning import Conditioning
from diffusion.families.loading import check_tokenizer, load, load_config, token_ids
from diffusion.families.schedulers import DiffusionScheduler
from protocol.models import vae_factor


class StableDiffusionXl:
    """What Stable Diffusion XL does its own way. Images are asked for at the size that the model makes, not cropped."""

    pipeline = StableDiffusionXLPipeline
    denoiser = UNet2DConditionModel
    part = "unet"
    embeds_guidance = False

    def __init__(self, source: str, dtype: torch.dtype, latent_shape_CHW: tuple[int, int, int]) -> None:
        """Loads the text encoders and the scheduler of a folder or hub id. Raises ModelError."""
        self.scheduler = DiffusionScheduler(source)
        self.tokenizers = [load(CLIPTokenizer, source, part) for part in ("tokenizer", "tokenizer_2")]
        self.text_encoders = [
            load(CLIPTextModel, source, "text_encoder", dtype=dtype),
            load(CLIPTextModelWithProjection, source, "text_encoder_2", dtype=dtype),
        ]
        for tokenizer, encoder, part in zip(
            self.tokenizers, self.text_encoders, ("tokenizer", "tokenizer_2"), strict=True
        ):
            check_tokenizer(tokenizer, encoder.config, source, part)
        factor = vae_factor(load_config(AutoencoderKL, source, "vae"))
        height, width = (factor * side for side in latent_shape_CHW[1:])
        self._size = (height, width, 0, 0, height, width)
        self._empty_is_zero = bool(DiffusionPipeline.load_config(source).get("force_zeros_for_empty_prompt", True))

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What encodes text, by part of the pipeline, to be frozen and put on a device."""
        return dict(zip(("text_encoder", "text_encoder_2"), self.text_encoders, strict=True))

    def encode(self, prompt: str) -> Conditioning:
        """Returns one prompt, by itself: both encoders' last hidden layer but one, and the second's pooled text. The
        empty prompt is zeros where the model says so, as the pipeline has it without a negative prompt."""
        read = [
            encoder(token_ids(tokenizer, prompt).to(encoder.device), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        ]
        text_1LE, pooled_1P = torch.cat([each.hidden_states[-2] for each in read], dim=-1), read[1].text_embeds
        if prompt == "" and self._empty_is_zero:
            text_1LE, pooled_1P = torch.zeros_like(text_1LE), torch.zeros_like(pooled_1P)
        size_16 = torch.tensor([self._size], device=text_1LE.device, dtype=text_1LE.dtype)
        return Conditioning(text_1LE, pooled_1P, size_16)

    @staticmethod
    def call(denoiser: Any, state_NCHW: Tensor, timestep_N: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the U-Net's output, (N, C, H, W)."""
        output: Tensor = denoiser(
            state_NCHW,
            timestep_N,
            encoder_hidden_states=conditioning.text_NLE,
            added_cond_kwargs={"text_embeds": conditioning.pooled_NP, "time_ids": conditioning.size_N6},
        ).sample
        return output
