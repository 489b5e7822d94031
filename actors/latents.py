"""VAE latents of a dataset's images: computed once, then read from memory or disk.

    key -> [memory: the latest used] -> [disk: one file an image] -> encode, write to both

A cached value has the bits that encoding gives: an image is encoded by itself, whatever else is missing, and a file
is named by all that its content depends on. The folder is disposable: what is damaged or gone is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion.weights import weights_digest

MAX_MEMORY_BYTES = 256 * 2**20
"""Some 2000 images of Stable Diffusion 1.x."""

Moments = tuple[Tensor, Tensor]
"""Mean and standard deviation of the VAE's posterior, each (C, H, W) or (N, C, H, W), fp32 on the CPU."""

Encode = Callable[[np.ndarray], Moments]
"""Images, uint8 (N, H, W, 3) -> their posteriors' moments, (N, C, H, W)."""


class LatentCache:
    """Moments by image. Any number of processes may share a folder."""

    def __init__(
        self, folder: Path, parts: Mapping[str, str], encode: Encode, *, max_memory_bytes: int = MAX_MEMORY_BYTES
    ) -> None:
        """`parts`: what moments depend on besides the image, such as {"base": base_digest, "fingerprint": ...,
        "pixels": images.description}."""
        self._folder, self._encode, self._max_memory_bytes = folder, encode, max_memory_bytes
        self._parts = json.dumps(dict(parts), sort_keys=True)
        self._memory: OrderedDict[str, Moments] = OrderedDict()
        self._memory_bytes = 0

    def moments(self, keys: Sequence[str], load: Callable[[], np.ndarray]) -> Moments:
        """Returns mean and standard deviation of N images, (N, C, H, W) fp32.

        `keys` name the images that `load` returns, uint8 (N, H, W, 3); it is called only if one is missing.
        """
        images, found = None, []
        for number, key in enumerate(keys):
            moments = self._held(key)
            if moments is None:
                images = load() if images is None else images
                moments = self._make(key, images[number : number + 1])
            found.append(moments)
        means, stds = zip(*found, strict=True)
        return torch.stack(means), torch.stack(stds)

    def _held(self, key: str) -> Moments | None:
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        moments = _read(self._path(key))
        if moments is not None:
            self._remember(key, moments)
        return moments

    def _make(self, key: str, image_1HWC: np.ndarray) -> Moments:
        mean_1CHW, std_1CHW = self._encode(image_1HWC)
        moments = mean_1CHW[0].contiguous(), std_1CHW[0].contiguous()
        _write(self._path(key), moments)
        self._remember(key, moments)
        return moments

    def _remember(self, key: str, moments: Moments) -> None:
        self._memory[key] = moments
        self._memory_bytes += _size_bytes(moments)
        while self._memory_bytes > self._max_memory_bytes:
            self._memory_bytes -= _size_bytes(self._memory.popitem(last=False)[1])

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(f"{self._parts}\n{key}".encode()).hexdigest()
        return self._folder / name[:2] / f"{name}.safetensors"


def _size_bytes(moments: Moments) -> int:
    return sum(tensor.nbytes for tensor in moments)


def _read(path: Path) -> Moments | None:
    """Returns what a file holds, or None where there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get("digest")
    except (OSError, SafetensorError):
        return None
    if set(state) != {"mean", "std"} or weights_digest(state) != digest:
        return None
    return state["mean"], state["std"]


def _write(path: Path, moments: Moments) -> None:
    state = dict(zip(("mean", "std"), moments, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".tmp-{uuid.uuid4().hex}")
    save_file(state, draft, metadata={"digest": weights_digest(state)})
    os.replace(draft, path)
