"""Gaussian noise by key: one generator a draw, seeded by counter, never global state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.seeds import Purpose, derive_seed


def initial_noise(seeds_G: Sequence[int], shape_CHW: Sequence[int], *, shared: bool) -> Tensor:
    """Returns x_T of G siblings, (G, C, H, W) fp32 on the CPU; `shared` gives all the first one's."""
    return torch.stack([_normal(seeds_G[0] if shared else s, Purpose.INITIAL_NOISE, 0, shape_CHW) for s in seeds_G])


def step_noise(seeds_G: Sequence[int], step: int, shape_CHW: Sequence[int]) -> Tensor:
    """Returns the noise of one step of G siblings, (G, C, H, W) fp32 on the CPU."""
    return torch.stack([_normal(s, Purpose.STEP_NOISE, step, shape_CHW) for s in seeds_G])


def normal(seed: int, shape: Sequence[int]) -> Tensor:
    """Returns standard normal numbers of one seed, fp32 on the CPU: a GPU's generator gives other numbers."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed))


def _normal(seed: int, purpose: Purpose, step: int, shape: Sequence[int]) -> Tensor:
    return normal(derive_seed(seed, purpose, step), shape)
