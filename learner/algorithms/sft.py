"""SFT: denoising regression on given images, and the rules for weights that the losses on pairs share.

    L = mean of weight * e,     e = mean over latent entries of (eps_theta(A x_0 + S noise, tau, c) - noise)^2

(Ho et al., arXiv 2006.11239, Eq. 14). The error may as well be one between features: then this is NCP-SFT
(Gambashidze et al., arXiv 2406.17636).
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.algorithms.metrics import Metrics, mean_metric


def sft(error_Q: Tensor, weight_Q: Tensor, *, normaliser: float) -> tuple[Tensor, Metrics]:
    """Returns (loss, metrics) of Q images; differentiable in `error_Q`.

    error_Q: (Q,) fp32 or fp64; weight_Q: (Q,), 0 for an image to leave out. The loss, fp64, is the weighted sum
    divided by `normaliser`, the weights' sum over all ranks. Raises ValueError as `kept_units` does.
    """
    if error_Q.dim() != 1:
        raise ValueError(f"sft takes one error an image, (Q,), but was given {tuple(error_Q.shape)}")
    kept_Q = kept_units(error_Q, weight_Q, normaliser)
    error_Q = error_Q[kept_Q].double()
    return weighted_mean(error_Q, weight_Q[kept_Q], normaliser), {"sft/error": mean_metric(error_Q)}


def kept_units(error: Tensor, weight_Q: Tensor, normaliser: float) -> Tensor:
    """Returns which units count, (Q,) bool: those of positive weight, so that a filler's error may be anything.

    Raises ValueError for weights that do not fit the errors, are negative or not finite, and for a normaliser
    that cannot be the sum of weights.
    """
    if weight_Q.shape != error.shape[:1]:
        raise ValueError(f"errors of {len(error)} units need as many weights, not {tuple(weight_Q.shape)}")
    if not bool((torch.isfinite(weight_Q) & (weight_Q >= 0)).all()):
        raise ValueError("a unit's weight must be finite and at least 0")
    kept_Q = weight_Q > 0
    if normaliser < 0 or (normaliser == 0 and bool(kept_Q.any())):
        raise ValueError(f"the normaliser counts the units over all ranks, but is {normaliser}")
    return kept_Q


def weighted_mean(loss_Q: Tensor, weight_Q: Tensor, normaliser: float) -> Tensor:
    """Returns this rank's part of the mean over all ranks' units; exactly 0, with zero gradient, without units."""
    return (weight_Q.double() * loss_Q).sum() / (normaliser or 1)
