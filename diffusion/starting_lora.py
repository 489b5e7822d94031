"""Low-rank layers: those of the LoRA that a run starts from, and those that an export is made of.

file -- diffusers' lora_state_dict --> names and alphas --> LowRank layers, alpha / r and scale in `up`
                              added to the weights, once, in fp32 <-'  `-> joined with what was trained: one file

Names in other tools' layouts are diffusers' business; what they mean is ours: diffusers 0.42 takes the alpha of most
layers for that of an attention layer with another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.utils import logging
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from protocol.errors import ModelError
from protocol.lora_file import Role, read_layers, split_name
from protocol.starting_lora import StartingLora, check_digest, fetch


@dataclass(frozen=True)
class LowRank:
    """What is added to a layer's weight W, up @ down, fp32 on the CPU: `LowRank(down=(r, inputs), up=(outputs, r))`. Of
    a convolution, down is (r, channels, height, width) and up (outputs, r, 1, 1)."""

    down: Tensor
    up: Tensor

    @property
    def update(self) -> Tensor:
        """The change of the weight, (outputs, inputs) or (outputs, channels, height, width)."""
        return (self.up.flatten(1) @ self.down.flatten(1)).view(len(self.up), *self.down.shape[1:])


Layers = Mapping[str, Mapping[str, LowRank]]
"""Low-rank layers by part of the pipeline and by module in it: `{"unet": {"mid_block.attentions.0.proj_in": ...}}`."""


def read_starting_lora(lora: StartingLora, pipeline: Any, networks: Mapping[str, nn.Module]) -> Layers:
    """Returns the layers of a LoRA for these networks, the denoiser first. Raises ModelError unless it is the recipe's
    file, is a LoRA, and fits with every layer."""
    file = fetch(lora.path)
    check_digest(file, lora)
    denoiser = next(iter(networks))
    read_layers(file, denoiser)
    state, alphas, metadata = _converted(file, pipeline, networks[denoiser])
    named = {_split(file, name): tensor.float() for name, tensor in state.items()}
    alpha_of = {split_name(name): float(alpha) for name, alpha in alphas.items()}
    layers: dict[str, dict[str, LowRank]] = {}
    for (part, module, role), down in named.items():
        if role != "down":
            continue
        up = named[part, module, "up"]
        if part not in networks:
            _refuse(file, f"{part}.{module}", f"a layer for {part}, which this base model has not")
        if not (down.isfinite().all() and up.isfinite().all()):
            _refuse(file, f"{part}.{module}", "numbers that are not finite")
        alpha = named.get((part, module, "alpha"), alpha_of.get((part, module, "alpha")))
        scale = lora.scale * _alpha_by_rank(None if alpha is None else float(alpha), metadata, part, module, len(down))
        own = _own_name(networks[part], module)
        fitted = _fitted(down, scale * up, _weight(networks[part], own))
        if fitted is None:
            _refuse(file, f"{part}.{module}", "a layer that does not fit; it was made for another base model")
        layers.setdefault(part, {})[own] = fitted
    return layers


def _split(file: Path, name: str) -> tuple[str, str, Role]:
    return split_name(name) or _refuse(file, name, "a tensor under a name that is not known")


def _fitted(down: Tensor, up: Tensor, weight: Tensor | None) -> LowRank | None:
    """Returns matrices as a weight of this shape has them; None if they do not fit. A convolution of one pixel may be
    published as a matrix, and the other way round."""
    if weight is None or (down[0].numel(), up[:, 0].numel()) != (weight[0].numel(), len(weight)):
        return None
    ones = (1,) * (weight.ndim - 2)
    return LowRank(down.reshape(-1, *weight.shape[1:]).contiguous(), up.reshape(len(weight), -1, *ones).contiguous())


@torch.no_grad()
def add_to_weights(layers: Layers, networks: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Adds layers to the fp32 weights of networks on the CPU, in place, and then rounds all of these to `dtype`."""
    for part, modules in layers.items():
        for module, layer in modules.items():
            weight = _weight(networks[part], module)
            assert weight is not None, "read_starting_lora has found it"
            weight += layer.update
    for network in networks.values():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def tensors_of(layers: Layers) -> dict[str, Tensor]:
    """Returns all tensors of layers, by names that no network's own tensors have."""
    return {
        f"lora:{part}.{module}.{role}": tensor
        for part, modules in layers.items()
        for module, layer in modules.items()
        for role, tensor in vars(layer).items()
    }


def joined(one: Layers, other: Layers) -> Layers:
    """Returns layers whose update is the sum of two: ranks add up where both have a layer."""
    parts: dict[str, dict[str, LowRank]] = {part: dict(modules) for part, modules in one.items()}
    for part, modules in other.items():
        own = parts.setdefault(part, {})
        for module, layer in modules.items():
            before = own.get(module)
            own[module] = layer if before is None else _joined(before, layer)
    return parts


def _joined(one: LowRank, other: LowRank) -> LowRank:
    return LowRank(torch.cat([one.down, other.down]), torch.cat([one.up, other.up], dim=1))


def adapter_layers(state: Mapping[str, Tensor], scale: float) -> dict[str, LowRank]:
    """Returns the layers of a peft adapter's state, `scale` being its alpha / r."""
    downs = {name.removesuffix(end): t for name, t in state.items() if name.endswith(end := ".lora_A.weight")}
    return {
        module: LowRank(_plain(down), scale * _plain(state[f"{module}.lora_B.weight"]))
        for module, down in downs.items()
    }


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float()


def save_layers(layers: Layers, pipeline: Any, folder: Path) -> None:
    """Writes `pytorch_lora_weights.safetensors`, as `load_lora_weights` of a pipeline of this class reads it. Each
    layer's alpha is its rank, so that readers which know of no alpha compute the same."""
    arguments: dict[str, Any] = {}
    for part, modules in layers.items():
        named = {_published_name(part, module): layer for module, layer in modules.items()}
        arguments[f"{part}_lora_layers"] = {
            f"{module}.{matrix}.weight": tensor
            for module, layer in named.items()
            for matrix, tensor in (("lora_A", layer.down), ("lora_B", layer.up))
        }
        arguments[f"{part}_lora_adapter_metadata"] = _config(part, modules)
    pipeline.save_lora_weights(str(folder), **arguments)


def _config(part: str, modules: Mapping[str, LowRank]) -> dict[str, Any]:
    """What peft is to make of a part's layers. A name at the start of which ^ stands is a whole name (peft#2419);
    modules of text encoders stand deeper in some versions of transformers."""
    start = "" if part.startswith("text_encoder") else "^"
    names = {module.removeprefix("text_model."): len(layer.down) for module, layer in modules.items()}
    ranks = sorted(names.values())
    usual = max(ranks, key=ranks.count)
    others = {f"{start}{name}": rank for name, rank in names.items() if rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, target_modules=[*names], rank_pattern=others, alpha_pattern=dict(others)
    )
    return {**config.to_dict(), "target_modules": sorted(names)}


def _published_name(part: str, module: str) -> str:
    """Published files have a text encoder's modules under `text_model.`, which every version of diffusers reads."""
    is_inside = part.startswith("text_encoder") and module.startswith("encoder.")
    return f"text_model.{module}" if is_inside else module


def _converted(file: Path, pipeline: Any, denoiser: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], Any]:
    """Returns tensors in diffusers' names, alphas of layers by such names, and peft's configuration if there is one."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        found = pipeline.lora_state_dict(
            str(file), use_safetensors=True, return_alphas=True, return_lora_metadata=True, unet_config=denoiser.config
        )
    except Exception as error:  # diffusers raises many types for names that it cannot convert
        raise ModelError(
            f"the LoRA {file.name} cannot be read by diffusers: {str(error).strip().splitlines()[0][:200]}",
            value=str(file),
            expected=f"a LoRA for a {pipeline.__name__}",
            do="choose a LoRA that was made for this base model",
        ) from error
    finally:
        logging.set_verbosity(before)
    # Some families return (tensors, metadata), some (tensors, alphas, metadata).
    return found[0], (found[1] if len(found) == 3 else None) or {}, found[-1]


def _alpha_by_rank(alpha: float | None, metadata: Mapping[str, Any] | None, part: str, module: str, rank: int) -> float:
    """Returns alpha / r of a layer; of a file that does not tell its alpha 1."""
    config = {k.removeprefix(f"{part}."): v for k, v in (metadata or {}).items() if k.startswith(f"{part}.")}
    if alpha is None and config:
        pattern = config.get("alpha_pattern") or {}
        alpha = float(pattern.get(get_pattern_key(pattern.keys(), module), config["lora_alpha"]))
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _own_name(network: nn.Module, module: str) -> str:
    return f"text_model.{module}" if hasattr(network, "text_model") and module.startswith("encoder.") else module


def _weight(network: nn.Module, module: str) -> Tensor | None:
    try:
        weight = getattr(network.get_submodule(module), "weight", None)
    except AttributeError:
        return None
    return weight.data if isinstance(weight, Tensor) and weight.ndim > 1 else None


def _refuse(file: Path, name: str, why: str) -> NoReturn:
    raise ModelError(
        f"the LoRA {file.name} has {why}",
        value=name,
        expected="finite low-rank matrices for modules of this base model",
        do="choose a LoRA that was made for this base model, or fetch it again",
    )
