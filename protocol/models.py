"""What a base model's files say of it, without loading it: family, latents, what its network predicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import ModelError

FAMILIES: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
    "StableDiffusionXLPipeline": (
        *("unet", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    ),
    "StableDiffusion3Pipeline": (
        *("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3"),
    ),
    "FluxPipeline": (
        *("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    ),
}
"""Supported families, by the pipeline's name in model_index.json, and the parts that we load; the network that is
trained is first."""

MAY_BE_LEFT_OUT = ("text_encoder_3", "tokenizer_3")
"""Stable Diffusion 3's T5, by far its largest encoder."""

FLUX_PATCH = 2
"""FLUX packs latents into tokens outside of its network."""

FLUX_LATENT_SIDE = 128
"""FLUX's configuration has no size; its pipeline's usual one is 1024 pixels."""


@dataclass(frozen=True)
class ModelFacts:
    """A base model in diffusers layout. Worked examples:

    Stable Diffusion 1.5   StableDiffusionPipeline, epsilon, (4, 64, 64), 512, False
    FLUX.1-dev             FluxPipeline, flow, (16, 128, 128), 1024, True
    """

    pipeline: str
    prediction_type: str
    latent_shape_CHW: tuple[int, int, int]
    image_side: int
    embeds_guidance: bool
    """Whether the network is told the guidance, instead of being evaluated twice."""

    @property
    def part(self) -> str:
        """The folder of the network that is trained."""
        return FAMILIES[self.pipeline][0]


def read_facts(source: str, resolution: int | None) -> ModelFacts | None:
    """Returns what a model folder's files say, or None for a hub id, which is not read here. Raises ModelError."""
    folder = Path(source)
    if not folder.is_dir():
        return None
    pipeline = check_family(_read(folder / "model_index.json", source).get("_class_name"), source)
    part = FAMILIES[pipeline][0]
    denoiser, vae, scheduler = (
        _read(folder / name / file, source)
        for name, file in ((part, "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json"))
    )
    try:
        shape_CHW = latent_shape(pipeline, denoiser, vae, resolution)
        side = shape_CHW[1] * vae_factor(vae)
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"the base model's {part}/config.json or vae/config.json lacks {error}",
            value=source,
            expected="a model in diffusers layout",
            do="correct model.path",
        ) from error
    prediction_type = "flow" if predicts_flow(pipeline) else str(scheduler.get("prediction_type", "epsilon"))
    return ModelFacts(pipeline, prediction_type, shape_CHW, side, bool(denoiser.get("guidance_embeds")))


def check_family(name: Any, source: str) -> str:
    """Returns a pipeline's name. Raises ModelError for one that is not supported."""
    if name not in FAMILIES:
        raise ModelError(
            "the base model is of a family that is not supported",
            value=f"{name} in {source}",
            expected=f"one of {', '.join(FAMILIES)}",
            do="choose a base model of one of these",
        )
    return str(name)


def predicts_flow(pipeline: str) -> bool:
    """Returns whether a supported pipeline's models are flow-matching ones: those with a transformer are."""
    return FAMILIES[pipeline][0] == "transformer"


def parts_of(folder: Path) -> tuple[str, ...]:
    """Returns the parts that a model folder must have, the network that is trained first. Raises ModelError."""
    index = _read(folder / "model_index.json", str(folder))
    parts = FAMILIES[check_family(index.get("_class_name"), str(folder))]
    left_out = [part for part in MAY_BE_LEFT_OUT if index.get(part, (None, None))[0] is None]
    return tuple(part for part in parts if part not in left_out)


def latent_shape(
    pipeline: str, denoiser: Mapping[str, Any], vae: Mapping[str, Any], resolution: int | None
) -> tuple[int, int, int]:
    """Returns (C, H, W) of latents for images of `resolution` pixels, or None for those that the model makes, from the
    configurations of its network and autoencoder. Raises ModelError for a side that the network cannot take."""
    num_channels: int = denoiser["in_channels"]
    if pipeline == "FluxPipeline":
        num_channels, height = num_channels // FLUX_PATCH**2, FLUX_LATENT_SIDE
        width, unit, largest = height, FLUX_PATCH, None
    else:
        size = denoiser["sample_size"]
        height, width = size if isinstance(size, list | tuple) else (size, size)
        if FAMILIES[pipeline][0] == "unet":
            unit, largest = 2 ** (len(denoiser["block_out_channels"]) - 1), None
        else:
            unit = denoiser["patch_size"]
            largest = denoiser["pos_embed_max_size"] * unit * vae_factor(vae)
    if resolution is None:
        return num_channels, height, width
    multiple = vae_factor(vae) * unit
    if resolution % multiple or (largest is not None and resolution > largest):
        raise ModelError(
            "model.resolution is not a size that this model can make",
            value=resolution,
            expected=f"a multiple of {multiple}" + ("" if largest is None else f", at most {largest}"),
            do="correct model.resolution, or leave it null",
        )
    return num_channels, resolution // vae_factor(vae), resolution // vae_factor(vae)


def evaluations(guidance_scale: float, *, embeds_guidance: bool) -> int:
    """Returns how often a sampling step evaluates the network: twice with guidance, unless the network is told it."""
    return 1 if guidance_scale == 1.0 or embeds_guidance else 2


def vae_factor(vae: Mapping[str, Any]) -> int:
    """Returns the pixels a side that a latent entry stands for: an autoencoder halves at each block but the last."""
    factor: int = 2 ** (len(vae["block_out_channels"]) - 1)
    return factor


def _read(file: Path, source: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no settings")
        return content
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the base model's {file.relative_to(source)} cannot be read: {error}",
            value=source,
            expected="a model in diffusers layout",
            do="correct model.path, or fetch the model again",
        ) from error
