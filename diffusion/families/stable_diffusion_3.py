"""Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206): a transformer, flow matching, three text encoders."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from diffusion.conditioning import Conditioning
from diffusion.families.loading import check_tokenizer, load, load_config, token_ids
from diffusion.families.schedulers import FlowScheduler

NUM_T5_TOKENS = 256


class StableDiffusion3:
    """What Stable Diffusion 3 does its own way. A model whose third encoder, T5, was left out to save memory is told
    zeros in its place, as its pipeline does."""

    pipeline = StableDiffusion3Pipeline
    denoiser = SD3Transformer2DModel
    part = "transformer"
    embeds_guidance = False

    def __init__(self, source: str, dtype: torch.dtype, latent_shape_CHW: tuple[int, int, int]) -> None:
        """Loads the text encoders and the scheduler of a folder or hub id. Raises ModelError."""
        config = load_config(SD3Transformer2DModel, source, "transformer")
        self.tokenizers = [load(CLIPTokenizer, source, part) for part in ("tokenizer", "tokenizer_2")]
        self.clips = [
            load(CLIPTextModelWithProjection, source, part, dtype=dtype) for part in ("text_encoder", "text_encoder_2")
        ]
        for tokenizer, encoder, part in zip(self.tokenizers, self.clips, ("tokenizer", "tokenizer_2"), strict=True):
            check_tokenizer(tokenizer, encoder.config, source, part)
        self.t5, self.t5_tokenizer, self._width = None, None, int(config["joint_attention_dim"])
        if DiffusionPipeline.load_config(source).get("text_encoder_3", (None, None))[0] is not None:
            self.t5_tokenizer = load(T5TokenizerFast, source, "tokenizer_3")
            self.t5 = load(T5EncoderModel, source, "text_encoder_3", dtype=dtype)
            check_tokenizer(self.t5_tokenizer, self.t5.config, source, "tokenizer_3")
        _, height, width = latent_shape_CHW
        num_tokens = (height // config["patch_size"]) * (width // config["patch_size"])
        self.scheduler = FlowScheduler(source, num_tokens, even_shares=False)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What encodes text, by part of the pipeline, to be frozen and put on a device."""
        clips = dict(zip(("text_encoder", "text_encoder_2"), self.clips, strict=True))
        return clips if self.t5 is None else {**clips, "text_encoder_3": self.t5}

    def encode(self, prompt: str) -> Conditioning:
        """Returns one prompt, by itself: both CLIPs' last hidden layer but one side by side, filled with zeros to T5's
        width, T5's tokens behind them, and the CLIPs' pooled texts."""
        read = [
            encoder(token_ids(tokenizer, prompt).to(encoder.device), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, self.clips, strict=True)
        ]
        clip_1LE = torch.cat([each.hidden_states[-2] for each in read], dim=-1)
        clip_1LE = functional.pad(clip_1LE, (0, self._width - clip_1LE.shape[-1]))
        pooled_1P = torch.cat([each.text_embeds for each in read], dim=-1)
        return Conditioning(torch.cat([clip_1LE, self._encode_t5(prompt, clip_1LE)], dim=-2), pooled_1P)

    def _encode_t5(self, prompt: str, like_1LE: Tensor) -> Tensor:
        if self.t5 is None:
            return like_1LE.new_zeros(1, NUM_T5_TOKENS, self._width)
        text_1LE: Tensor = self.t5(token_ids(self.t5_tokenizer, prompt, NUM_T5_TOKENS).to(self.t5.device))[0]
        return text_1LE

    @staticmethod
    def call(denoiser: Any, state_NCHW: Tensor, timestep_N: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the transformer's velocity, (N, C, H, W)."""
        output: Tensor = denoiser(
            state_NCHW,
            timestep=timestep_N,
            encoder_hidden_states=conditioning.text_NLE,
            pooled_projections=conditioning.pooled_NP,
        ).sample
        return output
