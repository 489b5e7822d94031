"""Where a command computes that samples in its own process, outside Ray."""

from __future__ import annotations

import torch


def own_device(*, wants_gpu: bool = True) -> str:
    """Returns `cuda` where a GPU is wanted and there is one. A command may run on another machine than its run did."""
    return "cuda" if wants_gpu and torch.cuda.is_available() else "cpu"
