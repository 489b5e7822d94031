"""Base models at their real size with random weights, in diffusers layout: nothing is downloaded.

What a step costs depends on shapes alone. These are the published ones (`unet/config.json`, `vae/config.json`,
`text_encoder/config.json` of stable-diffusion-v1-5 and stable-diffusion-xl-base-1.0), and the numbers of parameters
that they must come to.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.models import make_scheduler, make_tokenizer

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""Here a head's dimension is the number of heads, a slip that diffusers keeps."""

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
    "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}

NUM_WORDS, MAX_TOKENS = 49408, 77
TEXT: dict[str, Any] = {
    "vocab_size": NUM_WORDS,
    "max_position_embeddings": MAX_TOKENS,
    "bos_token_id": NUM_WORDS - 2,
    "eos_token_id": NUM_WORDS - 1,
    "pad_token_id": NUM_WORDS - 1,
}
CLIP_L: dict[str, Any] = {
    **TEXT,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_BIG_G: dict[str, Any] = {
    **TEXT,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}

NUM_PARAMETERS = {
    "SD-1.5 U-Net": 859_520_964,
    "SDXL U-Net": 2_567_463_684,
    "autoencoder": 83_653_863,
    "CLIP-L": 123_060_480,
    "CLIP-bigG": 694_659_840,
}


def make_sd15(folder: Path) -> Path:
    """Writes Stable Diffusion 1.5 with random weights in bf16: 512 px, 2.1 GB. A folder that holds it is left alone."""
    if _is_made(folder):
        return folder
    StableDiffusionPipeline(
        vae=_vae(512),
        text_encoder=_text_encoder(),
        tokenizer=make_tokenizer(NUM_WORDS, MAX_TOKENS),
        unet=filled(make_unet(SD15_UNET), "SD-1.5 U-Net"),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return _made(folder)


def make_sdxl(folder: Path) -> Path:
    """Writes Stable Diffusion XL with random weights in bf16: 1024 px, 6.9 GB. A folder that holds it is left alone."""
    if _is_made(folder):
        return folder
    with torch.device("meta"):
        big = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G))
    StableDiffusionXLPipeline(
        vae=_vae(1024, scaling_factor=0.13025, force_upcast=True),
        text_encoder=_text_encoder(),
        tokenizer=make_tokenizer(NUM_WORDS, MAX_TOKENS),
        text_encoder_2=filled(big, "CLIP-bigG"),
        tokenizer_2=make_tokenizer(NUM_WORDS, MAX_TOKENS),
        unet=filled(make_unet(SDXL_UNET), "SDXL U-Net"),
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    return _made(folder)


def make_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """Returns a U-Net on the meta device: shapes without memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def filled(network: nn.Module, name: str, seed: int = 0) -> nn.Module:
    """Returns a network from the meta device on the CPU in bf16, its weights as wide as torch's own random ones: by
    their fan-in, so that activations keep their size. Norms begin as nothing. Asserts its number of parameters."""
    found, expected = sum(parameter.numel() for parameter in network.parameters()), NUM_PARAMETERS[name]
    assert found == expected, f"{name} has {found} parameters, not {expected}"
    network = nn.Module.to(network, torch.bfloat16).to_empty(device="cpu")  # diffusers' own `to` warns
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(float(parameter_name.endswith("weight")))
            else:
                parameter.normal_(0, 1 / math.sqrt(3 * parameter[0].numel()), generator=generator)
    return network


def _vae(sample_size: int, **config: Any) -> nn.Module:
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE, sample_size=sample_size, **config)
    return filled(vae, "autoencoder")


def _text_encoder() -> nn.Module:
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(**CLIP_L))
    return filled(encoder, "CLIP-L")


def _is_made(folder: Path) -> bool:
    return (folder / "made.json").exists()


def _made(folder: Path) -> Path:
    """Marks a folder as whole: the pipeline's own index is written before the weights."""
    (folder / "made.json").write_text(json.dumps({"weights": "random", "seed": 0}) + "\n")
    return folder
