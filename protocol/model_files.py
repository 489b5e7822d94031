"""What a base model's files say of its size, read without loading any of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
DENOISERS = ("unet", "transformer")


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


def read_model_files(source: str) -> ModelFiles | None:
    """Returns what a model folder, or a hub id's copy in the local cache, says of itself, or None where it is not on
    disk whole. No network is asked."""
    folder = model_folder(source)
    if folder is None:
        return None
    part = next((part for part in DENOISERS if (folder / part).is_dir()), DENOISERS[0])
    encoders = sorted(path.name for path in folder.glob("text_encoder*"))
    try:
        shapes, vae, *text = (read_shapes(folder / name) for name in (part, "vae", *encoders))
        configs = [json.loads((folder / name / "config.json").read_text()) for name in (part, "vae", *encoders)]
    except (OSError, ValueError, KeyError):
        return None
    return ModelFiles(
        configs[0], configs[1], tuple(configs[2:]), shapes, num_entries(vae), sum(num_entries(each) for each in text)
    )


def model_folder(source: str) -> Path | None:
    """Returns a model's folder, or its snapshot in the hub's local cache."""
    if (folder := Path(source)).is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def read_shapes(folder: Path) -> Shapes:
    """Returns the shape of every tensor that `from_pretrained` would read from a folder. Raises OSError, KeyError or
    ValueError where it is not whole."""
    for name in WEIGHTS:
        if (index := folder / f"{name}.index.json").exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            return {tensor: shape for file in files for tensor, shape in _header(folder / file).items()}
        if (folder / name).exists():
            return _header(folder / name)
    raise FileNotFoundError(f"{folder} has none of {', '.join(WEIGHTS)}")


def num_entries(shapes: Shapes) -> int:
    """Returns how many entries tensors have in all."""
    return sum(math.prod(shape) for shape in shapes.values())


def _header(file: Path) -> Shapes:
    """Returns what a safetensors file's header says: its length in 8 bytes, then JSON."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
