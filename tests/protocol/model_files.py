"""As much of a model folder as is read without loading the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from protocol.models import parts_of


def write_model_files(
    folder: Path,
    *,
    side: int,
    pipeline: str = "StableDiffusionPipeline",
    denoiser: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> Path:
    """Writes index and configurations of a pipeline with latents of 4 x side x side, an eighth of the images' side."""
    part = "unet" if "XL" in pipeline or pipeline == "StableDiffusionPipeline" else "transformer"
    usual = {"sample_size": side, "in_channels": 4, "block_out_channels": [32, 64]}
    files = {
        "model_index.json": {"_class_name": pipeline},
        f"{part}/config.json": denoiser or usual,
        "vae/config.json": {"block_out_channels": [8, 8, 8, 8]},
        "scheduler/scheduler_config.json": scheduler or {"prediction_type": "epsilon"},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def add_empty_parts(folder: Path) -> Path:
    """Completes such a folder with files without content: enough to be seen, not to be loaded."""
    for part in parts_of(folder):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "model.safetensors").touch()
    return folder
