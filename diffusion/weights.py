"""Trainable weights as bytes, and their digest: what a version is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from safetensors.torch import load, save
from torch import Tensor

from protocol.errors import ModelError

State = Mapping[str, Tensor]


def pack(state: State) -> bytes:
    """Returns a state as safetensors bytes, on the CPU, names sorted."""
    return save({name: state[name].detach().cpu().contiguous() for name in sorted(state)})


def unpack(data: bytes) -> dict[str, Tensor]:
    """Reads `pack`'s bytes. Raises ModelError if they are not safetensors."""
    try:
        return load(data)
    except Exception as error:  # safetensors raises its own type from Rust, a bare Exception subclass
        raise ModelError(f"weights cannot be read: {error}", expected="safetensors bytes") from error


def weights_digest(state: State) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and bytes, in the order of names, as 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
