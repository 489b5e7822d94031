"""LoRA files as other tools write them, for tests: random layers that change what a tiny model draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

KOHYA_STARTS = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
ENDINGS = ("to_q", "to_k", "to_out.0", "proj_in", "conv1", "q_proj", "out_proj", "fc1")
"""Of text encoders' attention diffusers knows the format by its out_proj."""

ORIGINAL_BLOCKS = {
    "down_blocks_1_attentions_0": "input_blocks_3_1",
    "mid_block_attentions_0": "middle_block_1",
    "up_blocks_0_attentions_0": "output_blocks_0_1",
    "up_blocks_0_attentions_1": "output_blocks_1_1",
}
"""Stable Diffusion's own names of a tiny model's blocks with attention."""


def networks_of(model: Path) -> dict[str, nn.Module]:
    """The networks of a pipeline that a LoRA may change."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def kohya_layers(
    model: Path, *, parts: tuple[str, ...] = ("unet", "text_encoder"), alpha: float | None = 3.0, seed: int = 0
) -> dict[str, Tensor]:
    """A LoRA of rank 2 as kohya's tools name it, of linear layers, convolutions and text encoders."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    starts = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"} if "text_encoder_2" in parts else {}
    for part in parts:
        for name, module in networks_of(model)[part].named_modules():
            if not name.endswith(ENDINGS):
                continue
            inside = name if part == "unet" or name.startswith("text_model") else f"text_model.{name}"
            start = (KOHYA_STARTS | starts)[part] + inside.replace(".", "_")
            weight: Any = module.weight
            tensors[f"{start}.lora_down.weight"] = 0.2 * torch.randn(2, *weight.shape[1:], generator=generator)
            up = 0.2 * torch.randn(len(weight), 2, *(1,) * (weight.ndim - 2), generator=generator)
            tensors[f"{start}.lora_up.weight"] = up
            if alpha is not None:
                tensors[f"{start}.alpha"] = torch.tensor(alpha)
    return tensors


def in_original_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net's attention layers under the names of Stable Diffusion's own code, as kohya's tools have them of XL."""
    return {
        name.replace(ours, original): tensor
        for name, tensor in tensors.items()
        for ours, original in ORIGINAL_BLOCKS.items()
        if ours in name
    }


def write_kohya(file: Path, model: Path, **options: Any) -> Path:
    """Writes `kohya_layers` to a file."""
    save_file(kohya_layers(model, **options), file, metadata={"ss_network_dim": "2"})
    return file


def write_peft(folder: Path, model: Path, *, old_names: bool = False, seed: int = 1) -> Path:
    """Writes what diffusers writes of peft's adapters, of two ranks and alphas; or in the names of before peft, which
    have neither."""
    networks = networks_of(model)
    layers, configs = {}, {}
    for part, targets in (("unet", ["to_k", "to_out.0", "proj_in"]), ("text_encoder", ["q_proj", "out_proj", "fc1"])):
        network: Any = networks[part]
        config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, rank_pattern={targets[0]: 4})
        network.add_adapter(config) if part == "unet" else network.add_adapter(config, adapter_name="default")
        generator = torch.Generator().manual_seed(seed)
        layers[part] = {
            name: 0.2 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in get_peft_model_state_dict(network).items()
        }
        configs[part] = network.peft_config["default"].to_dict()
    if old_names:
        folder.mkdir()
        save_file(_before_peft(layers), folder / "pytorch_lora_weights.safetensors")
        return folder
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=configs["unet"],
        text_encoder_lora_adapter_metadata=configs["text_encoder"],
    )
    return folder


def _before_peft(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The layers of attention and of the text encoder's feed-forward, named as before diffusers had peft."""
    old = {".to_k.": ".processor.to_k_lora.", ".to_out.0.": ".processor.to_out_lora.", ".q_proj.": ".to_q_lora."}
    old |= {".out_proj.": ".to_out_lora."}
    roles = {"lora_A": "down", "lora_B": "up"}
    named = {}
    for part, tensors in layers.items():
        for name, tensor in tensors.items():
            for here, there in old.items():
                if here in name:
                    module, matrix = name.replace(here, there).removesuffix(".weight").rsplit(".", 1)
                    named[f"{part}.{module}.{roles[matrix]}.weight"] = tensor
    return named


def header_file(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Writes tensors of zeros by name and shape."""
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    return file


def header_of(file: Path) -> dict[str, Any]:
    """The header of a safetensors file."""
    data = file.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header
