"""What a base model's files say of its size, read without loading any of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import ModelError
from protocol.models import check_family, latent_shape, parts_of
from protocol.tensor_header import read_part_shapes, weight_files

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ModelFiles:
    """A model's configurations and the shapes of its tensors: `ModelFiles(denoiser={"in_channels": 4, ...},
    vae={...}, text=({...},), shapes={"conv_in.weight": (320, 4, 3, 3), ...}, num_vae=83653863, num_text=123060480)`.
    `shapes` are the denoiser's."""

    denoiser: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: tuple[Mapping[str, Any], ...]
    shapes: Shapes
    num_vae: int
    num_text: int

    @property
    def num_denoiser(self) -> int:
        """The denoiser's parameters."""
        return num_entries(self.shapes)


def read_model_files(source: str, resolution: int | None = None) -> ModelFiles | None:
    """Returns what a model folder, or a hub id's copy in the local cache, says of itself, or None where it is not on
    disk whole. No network is asked. The denoiser's `sample_size` is that of images of `resolution` pixels. Raises
    ModelError for a side that the model cannot make."""
    folder = model_folder(source)
    if folder is None:
        return None
    try:
        pipeline = check_family(json.loads((folder / "model_index.json").read_text()).get("_class_name"), source)
        parts = parts_of(folder)
        encoders = [part for part in parts if part.startswith("text_encoder")]
        shapes, vae, *text = (_shapes(folder / name) for name in (parts[0], "vae", *encoders))
        denoiser, *configs = (
            json.loads((folder / name / "config.json").read_text()) for name in (parts[0], "vae", *encoders)
        )
    except (OSError, ValueError, KeyError, ModelError):
        return None
    _, *side = latent_shape(pipeline, denoiser, configs[0], resolution)
    return ModelFiles(
        {**denoiser, "sample_size": side},
        configs[0],
        tuple(configs[1:]),
        shapes,
        num_entries(vae),
        sum(num_entries(each) for each in text),
    )


def model_folder(source: str) -> Path | None:
    """Returns a model's folder, or its snapshot in the hub's local cache."""
    if (folder := Path(source)).is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def _shapes(folder: Path) -> Shapes:
    if not weight_files(folder):
        raise FileNotFoundError(f"{folder} has no safetensors")
    return read_part_shapes(folder)


def num_entries(shapes: Shapes) -> int:
    """Returns how many entries tensors have in all."""
    return sum(math.prod(shape) for shape in shapes.values())
