"""The U-Nets that people train, at their real size, on the meta device: shapes and counts, without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from bench.models import NUM_PARAMETERS, SD15_UNET, SDXL_UNET, make_unet
from diffusion.conditioning import Conditioning
from diffusion.families.stable_diffusion import StableDiffusion
from diffusion.families.stable_diffusion_xl import StableDiffusionXl
from diffusion.policy import _lora_config
from protocol.recipe import Lora

RANK = 8
TRAINED_A_BLOCK = 10
"""Of a transformer block's layers: queries, keys, values and outputs of two attentions, and two of the feed-forward."""


def sd15_conditioning(num: int) -> Conditioning:
    """What Stable Diffusion 1.5 is told."""
    return Conditioning(torch.zeros(num, 77, 768, device="meta"))


def sdxl_conditioning(num: int) -> Conditioning:
    """What Stable Diffusion XL is told."""
    text_NLE, pooled_NP = torch.zeros(num, 77, 2048, device="meta"), torch.zeros(num, 1280, device="meta")
    return Conditioning(text_NLE, pooled_NP, torch.zeros(num, 6, device="meta"))


def num_parameters(unet: UNet2DConditionModel) -> int:
    """Trained or not."""
    return sum(parameter.numel() for parameter in unet.parameters())


@pytest.mark.parametrize(
    ("name", "config", "family", "conditioning", "side"),
    [
        ("SD-1.5 U-Net", SD15_UNET, StableDiffusion, sd15_conditioning, 64),
        ("SDXL U-Net", SDXL_UNET, StableDiffusionXl, sdxl_conditioning, 128),
    ],
    ids=["sd15", "sdxl"],
)
def test_a_family_calls_its_network_of_the_published_shape(
    name: str, config: dict[str, Any], family: Any, conditioning: Any, side: int
) -> None:
    unet = make_unet(config)
    assert num_parameters(unet) == NUM_PARAMETERS[name]
    state_NCHW = torch.zeros(1, 4, side, side, device="meta")
    output_NCHW = family.call(unet, state_NCHW, torch.zeros(1, dtype=torch.long, device="meta"), conditioning(1))
    assert output_NCHW.shape == state_NCHW.shape


@pytest.mark.parametrize(
    ("config", "num_blocks_of_width", "text_width"),
    [
        (SD15_UNET, {320: 2 + 3, 640: 2 + 3, 1280: 2 + 1 + 3}, 768),
        (SDXL_UNET, {640: 2 * 2 + 3 * 2, 1280: 2 * 10 + 10 + 3 * 10}, 2048),
    ],
    ids=["sd15", "sdxl"],
)
def test_adapters_are_on_every_attention_and_feed_forward_layer(
    config: dict[str, Any], num_blocks_of_width: dict[int, int], text_width: int
) -> None:
    """A layer of i inputs and o outputs has r (i + o) adapter weights. In a block of width d there are the six square
    layers, two from the text, the gated d -> 8 d (its halves are value and gate), and 4 d -> d."""
    unet = make_unet(config)
    with torch.device("meta"):
        unet.add_adapter(_lora_config(Lora(rank=RANK, alpha=RANK)))
    adapted = [name for name, module in unet.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == TRAINED_A_BLOCK * sum(num_blocks_of_width.values())
    in_block = {
        width: RANK * (6 * 2 * width + 2 * (text_width + width) + 9 * width + 5 * width)
        for width in num_blocks_of_width
    }
    trained = sum(parameter.numel() for name, parameter in unet.named_parameters() if "lora_" in name)
    assert trained == sum(number * in_block[width] for width, number in num_blocks_of_width.items())
