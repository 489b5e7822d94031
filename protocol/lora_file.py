"""The layers of a LoRA file, by the names that diffusers, peft and kohya's tools give them.

    unet.down_blocks.1.attentions.0.proj_in.lora_A.weight                       peft, and diffusers today
    unet.down_blocks.1. ... .attn1.to_q.lora.down.weight                        diffusers
    unet.down_blocks.1. ... .attn1.processor.to_q_lora.down.weight              diffusers, before peft
    text_encoder.text_model.encoder. ... .mlp.fc1.lora_linear_layer.up.weight   diffusers, text encoders
    lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight, .alpha       kohya
    lora_unet_input_blocks_4_1_proj_in.lora_down.weight, .alpha                 kohya, in Stable Diffusion's own names

A layer's weight W becomes W + scale * alpha / r * up @ down (LoRA, arXiv 2106.09685, section 4.1), r being its rank.
Everything else that adapters hold (DoRA's magnitudes, biases, Kronecker factors) is refused, not passed over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from protocol.errors import ModelError
from protocol.tensor_header import read_shapes

Role = Literal["down", "up", "alpha"]
Shapes = Mapping[str, tuple[int, ...]]

ROLES: dict[str, Role] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
}
"""What a tensor is, by the ending of its name."""

OLD_NAMES = {
    "unet": {".to_out": ".to_out.0"},
    "text_encoder": {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out": ".out_proj"},
}
"""What modules are called whose layers' names end in _lora, before peft, by the beginning of the part's name."""

KOHYA_PARTS = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
ORIGINAL = re.compile(r"(input_blocks|output_blocks)_\d+_\d+_|middle_block_\d+_|(time_embed|label_emb|out)_")
"""How modules' names begin in Stable Diffusion's own code, with dots written as underscores."""

FORMATS = "a LoRA as diffusers' save_lora_weights or kohya's tools write it: pairs of low-rank matrices"


@dataclass(frozen=True)
class LayerSize:
    """Sizes of a layer's pair of matrices: `LayerSize(rank=8, num_inputs=320, num_outputs=320)`. A convolution's inputs
    are channels times kernel."""

    rank: int
    num_inputs: int
    num_outputs: int


def split_name(name: str) -> tuple[str, str, Role] | None:
    """Returns part of the pipeline, module in it and role of a tensor in diffusers' names; None for any other name.

    Modules of text encoders are named without the leading `text_model.`, which only some versions of transformers have.
    """
    if name.endswith(".alpha"):
        stem = name.removesuffix(".alpha")
        whole = split_name(stem)
        part, module = whole[:2] if whole else _part_and_module(stem)
        return (part, module, "alpha") if part else None
    ending = next((ending for ending in ROLES if name.endswith(ending)), None)
    if ending is None:
        return None
    part, module = _part_and_module(name.removesuffix(ending))
    if ending.startswith("_lora"):
        old_names = next((names for start, names in OLD_NAMES.items() if part.startswith(start)), {})
        old = next((old for old in old_names if module.endswith(old)), "")
        module = module.removesuffix(old) + old_names.get(old, "")
    return (part, module, ROLES[ending]) if part else None


def _part_and_module(stem: str) -> tuple[str, str]:
    part, _, module = stem.partition(".")
    if part not in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        return "", ""
    return part, module.replace(".processor.", ".").removeprefix("text_model.")


def read_layers(file: Path, denoiser: str | None) -> dict[tuple[str, str], LayerSize]:
    """Returns the layers of a LoRA file by part and module, with dots as underscores where kohya's tools wrote it.
    `denoiser` is the part that their `lora_unet_` stands for, which is None where the base model is not known yet.
    Raises ModelError for what is no LoRA, only half of one, or has nothing for the denoiser."""
    found: dict[tuple[str, str], dict[Role, tuple[int, ...]]] = {}
    for name, shape in read_shapes(file).items():
        part, module, role = _split_any(name, denoiser or "unet") or _refuse_name(file, name)
        found.setdefault((part, module), {})[role] = shape
    sizes = {layer: _size(file, layer, shapes) for layer, shapes in found.items()}
    if not any(part == denoiser or denoiser is None for part, _ in sizes):
        parts = ", ".join(sorted({part for part, _ in sizes}))
        raise ModelError(
            f"the LoRA {file.name} has no layer for the {denoiser or 'denoiser'}",
            value=f"layers for {parts or 'nothing'} in {file}",
            expected=f"layers for the base model's {denoiser or 'denoiser'}",
            do="choose a LoRA that was made for this base model",
        )
    return sizes


def _split_any(name: str, denoiser: str) -> tuple[str, str, Role] | None:
    for start, part in {"lora_unet_": denoiser, **KOHYA_PARTS}.items():
        if name.startswith(start):
            module, _, ending = name.removeprefix(start).partition(".")
            role = "alpha" if ending == "alpha" else ROLES.get(f".{ending}")
            return (part, module.removeprefix("text_model_"), role) if role else None
    return split_name(name)


def _refuse_name(file: Path, name: str) -> NoReturn:
    if re.search(r"\.lora_[AB]\.\w+\.weight$", name) and _part_and_module(name)[0] == "":
        what, do = "holds an adapter's state, without the name of the part that it is for", "export the run, or save it"
        do += " by diffusers' save_lora_weights"
    elif "dora_scale" in name or "lora_magnitude_vector" in name:
        what, do = (
            "is a DoRA, which is no sum of low-rank matrices",
            "merge it into its base model by the tool it is from",
        )
    else:
        what, do = (
            "holds a tensor that is not of a low-rank layer",
            "convert it by diffusers' save_lora_weights, or merge",
        )
        do += " it into its base model by the tool it is from"
    raise ModelError(f"the LoRA {file.name} {what}", value=name, expected=FORMATS, do=do)


def _size(file: Path, layer: tuple[str, str], shapes: Mapping[Role, tuple[int, ...]]) -> LayerSize:
    name = ".".join(layer)
    if "down" not in shapes or "up" not in shapes:
        raise ModelError(
            f"the LoRA {file.name} has only half of layer {name}",
            value=", ".join(sorted(shapes)),
            expected="a down and an up matrix",
            do="fetch or save it again",
        )
    down, up = shapes["down"], shapes["up"]
    if len(down) < 2 or len(up) < 2 or down[0] != up[1]:
        raise ModelError(
            f"the matrices of layer {name} in the LoRA {file.name} have different ranks",
            value=f"down {list(down)}, up {list(up)}",
            expected="down (r, inputs) and up (outputs, r)",
            do="fetch or save it again",
        )
    return LayerSize(down[0], math.prod(down[1:]), up[0] * math.prod(up[2:]))


def check_fits(file: Path, layers: Mapping[tuple[str, str], LayerSize], weights: Mapping[str, Shapes]) -> None:
    """Raises ModelError for a layer that a base model has no module for, or one of another size. `weights` are the
    shapes of the base's weights, by part.

    Layers in Stable Diffusion's own names are compared with all modules whose names end like theirs: which of them each
    one is for is found when the model is loaded.
    """
    sizes = {part: _module_sizes(shapes) for part, shapes in weights.items()}
    for (part, module), size in layers.items():
        if part not in sizes:
            raise _misfit(file, f"{part}.{module}", "nothing", f"a LoRA for {', '.join(weights)}")
        own = sizes[part].get(module)
        allowed = {own} if own else _similar(part, module, sizes[part])
        if allowed is None:
            continue
        if (size.num_inputs, size.num_outputs) not in allowed:
            shown = " or ".join(f"{inputs} -> {outputs}" for inputs, outputs in sorted(allowed))
            has = f"{size.num_inputs} -> {size.num_outputs}"
            raise _misfit(
                file, f"{part}.{module}", has, f"{shown}, as in the base model" if shown else "a known module"
            )


def _misfit(file: Path, layer: str, has: str, expected: str) -> ModelError:
    return ModelError(
        f"the LoRA {file.name} was made for another base model: its layer {layer} does not fit",
        value=has,
        expected=expected,
        do="choose a LoRA for this base model, or the base model that it was made for",
    )


def _module_sizes(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Returns inputs and outputs of modules with a matrix, by their names with dots and by those with underscores."""
    sizes = {
        name.removesuffix(".weight").removeprefix("text_model."): (math.prod(shape[1:]), shape[0])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1
    }
    return sizes | {name.replace(".", "_"): size for name, size in sizes.items()}


def _similar(part: str, module: str, sizes: Mapping[str, tuple[int, int]]) -> set[tuple[int, int]] | None:
    """Returns the sizes that a module under a name of Stable Diffusion's own may have, none for an unknown name; None
    where only loading can tell."""
    found = ORIGINAL.match(module)
    if part == "transformer" and "." not in module:
        return None
    if not found:
        return set()
    ending = "_" + module[found.end() :]
    return {size for name, size in sizes.items() if f"_{name}".endswith(ending)} or None
