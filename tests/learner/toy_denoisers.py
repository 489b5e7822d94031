"""Denoisers small enough to know everything about, and expectations over Gaussians that are exact.

A "network" here is the optimal denoiser of N(mean, variance) in one dimension, whose mean is what is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def tensor(values: object) -> Tensor:
    """Numbers in fp64."""
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class LinearDenoiser:
    """eps(x) = (S/V)(x - A mean), V = A^2 variance + S^2, at signal level alpha_bar = A^2 = 1 - S^2."""

    alpha_bar: float
    variance: float

    @property
    def marginal_variance(self) -> float:
        """V."""
        return self.alpha_bar * self.variance + 1 - self.alpha_bar

    def predict(self, mean: Tensor, state: Tensor) -> Tensor:
        """The noise that it sees in states."""
        signal, noise = self.alpha_bar**0.5, (1 - self.alpha_bar) ** 0.5
        return noise / self.marginal_variance * (state - signal * mean)

    def errors(self, mean: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """(eps - noise)^2 of images noised with given noise; all broadcast."""
        state = self.alpha_bar**0.5 * x0 + (1 - self.alpha_bar) ** 0.5 * noise
        return (self.predict(mean, state) - noise).square()


def normal_points(num_dimensions: int, num_points: int = 16) -> tuple[Tensor, Tensor]:
    """Returns points of N(0, I), (Q, num_dimensions), and weights that add up to 1: Gauss-Hermite quadrature."""
    point, weight = np.polynomial.hermite_e.hermegauss(num_points)
    axes = [torch.from_numpy(point)] * num_dimensions
    weights = [torch.from_numpy(weight / weight.sum())] * num_dimensions
    grid = torch.cartesian_prod(*axes).reshape(-1, num_dimensions)
    return grid, torch.cartesian_prod(*weights).reshape(-1, num_dimensions).prod(1)


def minimise(loss: Callable[[Tensor], Tensor], start: float) -> float:
    """Returns where a convex function of one number is least, by Newton's method.

    The slope of a logistic loss flattens away from a logit of 0, so from there the steps fall short, never beyond.
    """
    for _ in range(100):
        at = tensor(start).requires_grad_()
        (slope,) = torch.autograd.grad(loss(at), at, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, at)
        step = (slope / curvature).item()
        start -= step
        if abs(step) < 1e-9:
            return start
    raise AssertionError(f"no minimum found, last at {start}")


class TinyNetwork:
    """A noise prediction of six latent entries with one hidden layer; its 60 parameters are one vector."""

    num_entries, num_hidden, num_parameters = 6, 5, 60

    def errors(self, theta: Tensor, x0_ND: Tensor, noise_ND: Tensor, alpha_bar_N: Tensor) -> Tensor:
        """latent_mean noise errors, (N,)."""
        into, out = theta.view(2, self.num_hidden, self.num_entries)
        alpha_bar_N1 = alpha_bar_N[:, None]
        state_ND = alpha_bar_N1.sqrt() * x0_ND + (1 - alpha_bar_N1).sqrt() * noise_ND
        return (torch.tanh(state_ND @ into.T + alpha_bar_N1) @ out - noise_ND).square().mean(1)

    def pair_errors(self, theta: Tensor, x0_Q2D: Tensor, noise_QD: Tensor, alpha_bar_Q: Tensor) -> Tensor:
        """Errors of pairs whose members share noise and timestep, (Q, 2)."""
        members = [self.errors(theta, x0_QD, noise_QD, alpha_bar_Q) for x0_QD in x0_Q2D.unbind(1)]
        return torch.stack(members, dim=1)
