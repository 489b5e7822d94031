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


def by_quartile(name: str, values_Q: Tensor, tau_Q: Tensor, num_train_timesteps: int) -> Metrics:
    """Returns `name/tau_quartile_1` (least noise) to `_4`: values by the quarter of the schedule their timestep is in.

    values_Q, tau_Q: (Q,), timesteps as integers. A quarter without values has count 0. Raises ValueError for a
    timestep outside the schedule.
    """
    if not bool(((tau_Q >= 0) & (tau_Q < num_train_timesteps)).all()):
        raise ValueError(f"timesteps must be from 0 to {num_train_timesteps - 1}")
    quartile_Q = 4 * tau_Q // num_train_timesteps
    return {f"{name}/tau_quartile_{i + 1}": mean_metric(values_Q[quartile_Q == i]) for i in range(4)}
