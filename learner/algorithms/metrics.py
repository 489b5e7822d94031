"""Metrics that add up over ranks: a name with a (sum, count), divided only after the ranks are added."""

from __future__ import annotations

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
"""name -> fp64 tensor (sum, count), detached."""


def mean_metric(values: Tensor) -> Tensor:
    """Returns (sum, count) of all entries."""
    values = values.detach().double()
    return torch.stack([values.sum(), torch.tensor(float(values.numel()), device=values.device)]).cpu()
