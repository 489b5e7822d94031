"""FLUX.1 (Black Forest Labs): a transformer on tokens of 2x2 latent entries, flow matching, CLIP and T5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from diffusion.conditioning import Conditioning
from diffusion.families.loading import check_tokenizer, load, load_config, token_ids
from diffusion.families.schedulers import FlowScheduler
from protocol.models import FLUX_PATCH as PATCH

NUM_T5_TOKENS = 512


class Flux:
    """What FLUX.1 does its own way. The guidance-distilled model (dev) is told the guidance scale as a number and is
    evaluated once; another one (schnell) takes classifier-free guidance, which its pipeline calls true."""

    pipeline = FluxPipeline
    denoiser = FluxTransformer2DModel
    part = "transformer"

    def __init__(self, source: str, dtype: torch.dtype, latent_shape_CHW: tuple[int, int, int]) -> None:
        """Loads the text encoders and the scheduler of a folder or hub id. Raises ModelError."""
        self.tokenizer, self.clip = (
            load(CLIPTokenizer, source, "tokenizer"),
            load(CLIPTextModel, source, "text_encoder", dtype=dtype),
        )
        self.t5_tokenizer, self.t5 = (
            load(T5TokenizerFast, source, "tokenizer_2"),
            load(T5EncoderModel, source, "text_encoder_2", dtype=dtype),
        )
        check_tokenizer(self.tokenizer, self.clip.config, source, "tokenizer")
        check_tokenizer(self.t5_tokenizer, self.t5.config, source, "tokenizer_2")
        _, height, width = latent_shape_CHW
        self.scheduler = FlowScheduler(source, (height // PATCH) * (width // PATCH), even_shares=True)
        self.embeds_guidance = bool(load_config(FluxTransformer2DModel, source, "transformer")["guidance_embeds"])

    @property
    def networks(self) -> dict[str, nn.Module]:
        """What encodes text, by part of the pipeline, to be frozen and put on a device."""
        return {"text_encoder": self.clip, "text_encoder_2": self.t5}

    def encode(self, prompt: str) -> Conditioning:
        """Returns one prompt, by itself: T5's tokens, and CLIP's pooled text."""
        pooled_1P = self.clip(token_ids(self.tokenizer, prompt).to(self.clip.device)).pooler_output
        text_1LE = self.t5(token_ids(self.t5_tokenizer, prompt, NUM_T5_TOKENS).to(self.t5.device))[0]
        return Conditioning(text_1LE, pooled_1P)

    @staticmethod
    def call(denoiser: Any, state_NCHW: Tensor, timestep_N: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the transformer's velocity, (N, C, H, W)."""
        rows, columns = (side // PATCH for side in state_NCHW.shape[2:])
        output_NLE = denoiser(
            hidden_states=pack(state_NCHW),
            # The network multiplies by 1000 again; its pipeline rounds to the compute dtype before it divides.
            timestep=timestep_N.to(state_NCHW.dtype) / 1000,
            guidance=conditioning.guidance_N,
            pooled_projections=conditioning.pooled_NP,
            encoder_hidden_states=conditioning.text_NLE,
            txt_ids=state_NCHW.new_zeros(conditioning.text_NLE.shape[1], 3),
            img_ids=token_places(rows, columns).to(state_NCHW),
        ).sample
        return unpack(output_NLE, rows, columns)


def pack(state_NCHW: Tensor) -> Tensor:
    """Returns latents as tokens, (N, H W / 4, 4 C): the rows of patches one after the other, C before the patch."""
    num, channels, height, width = state_NCHW.shape
    patches = state_NCHW.view(num, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(num, -1, channels * PATCH**2)


def unpack(token_NLE: Tensor, rows: int, columns: int) -> Tensor:
    """Returns tokens as latents, (N, C, H, W): what `pack` took."""
    channels = token_NLE.shape[-1] // PATCH**2
    patches = token_NLE.view(-1, rows, columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(token_NLE), channels, rows * PATCH, columns * PATCH)


def token_places(rows: int, columns: int) -> Tensor:
    """Returns where each token is, (rows columns, 3): 0, its row, its column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
