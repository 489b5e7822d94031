"""What a safetensors file holds, by its header alone: names, dtypes and shapes, read without its tensors."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from protocol.errors import ModelError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that torch.save writes: pickles, which may run code when they are read."""

MAX_HEADER_BYTES = 100 * 2**20
"""As the format's own library has it."""

INDEX = ".safetensors.index.json"


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a file, by name. Raises ModelError for what is not a safetensors file."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header: dict[str, Any] = json.loads(opened.read(length)) if length <= MAX_HEADER_BYTES else {}
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
        wanted = 8 + length + max(entry["data_offsets"][1] for entry in tensors.values())
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{file.name} is not a safetensors file, or not whole",
            value=str(file),
            expected="weights in the safetensors format",
            do="fetch it again; a file that torch.save has written must be converted, not renamed",
        ) from error
    if file.stat().st_size != wanted:
        raise ModelError(
            f"{file.name} is not whole",
            value=f"{file.stat().st_size} bytes in {file}",
            expected=f"{wanted} bytes, by its header",
            do="fetch it again",
        )
    return shapes


def read_part_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a network's weights in a part of a model folder, of one file or of several."""
    return {name: shape for file in weight_files(folder) for name, shape in read_shapes(file).items()}


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files that diffusers and transformers read in a folder; none if there are none."""
    for name in ("diffusion_pytorch_model", "model"):
        if (folder / f"{name}.safetensors").is_file():
            return [folder / f"{name}.safetensors"]
        if (folder / f"{name}{INDEX}").is_file():
            index = json.loads((folder / f"{name}{INDEX}").read_text())
            return [folder / shard for shard in sorted(set(index["weight_map"].values()))]
    return []


def digest_of(file: Path) -> str:
    """Returns the SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
