"""Denoising regression, its weights, and metrics by timestep."""

from __future__ import annotations

import math

import pytest
import torch

from learner.algorithms.metrics import by_quartile
from learner.algorithms.sft import sft
from learner.two_pass import differentiate
from tests.learner.toy_denoisers import LinearDenoiser, minimise, normal_points, tensor


def test_the_loss_is_the_weighted_sum_over_the_number_of_all_ranks_images() -> None:
    error_Q, weight_Q = tensor([0.1, 0.2, 0.4]), tensor([1, 2, 0.5])
    loss, gradient_Q, metrics = differentiate(lambda value: sft(value, weight_Q, normaliser=4), error_Q)
    assert loss.item() == pytest.approx((0.1 + 0.4 + 0.2) / 4, rel=1e-12)
    torch.testing.assert_close(gradient_Q, weight_Q / 4)
    torch.testing.assert_close(metrics["sft/error"], tensor([0.7, 3.0]))


@pytest.mark.parametrize("alpha_bar", [0.99, 0.5, 0.02])
@pytest.mark.parametrize("mean", [-1.5, 0.7])
def test_the_regression_comes_to_rest_at_the_datas_mean_at_every_noise_level(alpha_bar: float, mean: float) -> None:
    model = LinearDenoiser(alpha_bar, variance=0.4)
    point_Q2, weight_Q = normal_points(2)
    x0_Q = mean + 0.4**0.5 * point_Q2[:, 0]
    best = minimise(lambda theta: sft(model.errors(theta, x0_Q, point_Q2[:, 1]), weight_Q, normaliser=1)[0], 0.0)
    assert best == pytest.approx(mean, abs=1e-9)


@pytest.mark.parametrize("counts", [(5,), (2, 3), (0, 4, 1)])
def test_ranks_with_unequal_counts_add_up_to_the_same_loss(counts: tuple[int, ...]) -> None:
    error_Q, weight_Q = torch.linspace(0.1, 0.5, 5, dtype=torch.float64), tensor([1, 1, 0.5, 2, 1])
    whole, _ = sft(error_Q, weight_Q, normaliser=5)
    parts = [
        sft(error, weight, normaliser=5)[0]
        for error, weight in zip(error_Q.split(counts), weight_Q.split(counts), strict=True)
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-9)


def test_weights_may_add_up_to_less_than_one_image() -> None:
    """As where of a group's pairs, which weigh one together, some are dropped: what is left has its own mean."""
    error_Q, weight_Q = tensor([0.1, 0.4]), tensor([0.25, 0.25])
    loss, gradient_Q, _ = differentiate(lambda value: sft(value, weight_Q, normaliser=0.5), error_Q)
    assert loss.item() == pytest.approx(0.25, rel=1e-12)
    torch.testing.assert_close(gradient_Q, tensor([0.5, 0.5]))


# Degenerate inputs.


@pytest.mark.parametrize("normaliser", [0, 3])
def test_a_rank_without_images_contributes_exactly_nothing(normaliser: int) -> None:
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss, metrics = sft(theta.expand(5)[:0], torch.ones(0), normaliser=normaliser)
    (slope,) = torch.autograd.grad(loss, theta)
    assert loss == 0
    assert slope == 0
    assert torch.equal(metrics["sft/error"], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("filler", [math.nan, math.inf])
def test_an_image_of_weight_0_is_as_if_it_were_not_there(filler: float) -> None:
    error_Q, weight_Q = tensor([0.3, filler]), tensor([1, 0])
    loss, gradient_Q, metrics = differentiate(lambda value: sft(value, weight_Q, normaliser=1), error_Q)
    assert loss == 0.3
    assert torch.equal(gradient_Q, tensor([1, 0]))
    assert torch.equal(metrics["sft/error"], tensor([0.3, 1]))


def test_a_non_finite_error_that_counts_is_not_hidden() -> None:
    loss, _ = sft(tensor([0.3, math.nan]), torch.ones(2), normaliser=2)
    assert loss.isnan()


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_are_negative_or_not_finite_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="finite and at least 0"):
        sft(tensor([0.3, 0.1]), tensor([1, weight]), normaliser=2)


def test_weights_and_errors_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="as many weights"):
        sft(torch.rand(2), torch.ones(3), normaliser=2)
    with pytest.raises(ValueError, match="one error an image"):
        sft(torch.rand(2, 2), torch.ones(2), normaliser=2)


def test_a_normaliser_of_0_is_refused_where_there_are_images() -> None:
    with pytest.raises(ValueError, match="normaliser"):
        sft(torch.rand(2), torch.ones(2), normaliser=0)


# Metrics by timestep.


def test_each_value_is_counted_in_the_quarter_of_its_timestep() -> None:
    value_Q, tau_Q = tensor([1, 2, 4, 8, 16, 32]), torch.tensor([0, 249, 250, 500, 749, 999])
    metrics = by_quartile("loss", value_Q, tau_Q, 1000)
    expected = {1: (3, 2), 2: (4, 1), 3: (24, 2), 4: (32, 1)}
    assert {name: tuple(metric.tolist()) for name, metric in metrics.items()} == {
        f"loss/tau_quartile_{number}": sums for number, sums in expected.items()
    }


def test_quarters_without_a_timestep_count_nothing() -> None:
    metrics = by_quartile("loss", tensor([5]), torch.tensor([30]), 1000)
    assert [metric.tolist() for metric in metrics.values()] == [[5, 1], [0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("tau", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(tau: int) -> None:
    with pytest.raises(ValueError, match="from 0 to 999"):
        by_quartile("loss", tensor([5]), torch.tensor([tau]), 1000)
