"""The CPO loss against closed forms and limits: B10, N8, N9."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.cpo import cpo, cpo_losses
from learner.algorithms.metrics import Metrics
from learner.algorithms.preference import preference
from learner.algorithms.sft import sft
from learner.two_pass import differentiate
from tests.learner.toy_denoisers import tensor

errors = st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=5)


def evaluate(error_Q2: Tensor, *, beta: float = 1.0, sft_weight: float = 1.0) -> tuple[Tensor, Tensor, Metrics]:
    """Loss, its gradient in the errors, metrics; all pairs of weight 1."""
    weight_Q, normaliser = torch.ones(len(error_Q2)), len(error_Q2)
    return differentiate(
        lambda value: cpo(value, weight_Q, beta=beta, sft_weight=sft_weight, normaliser=normaliser), error_Q2
    )


def means(metrics: Metrics) -> dict[str, float]:
    """Metrics divided by their counts."""
    return {name: (total / count).item() for name, (total, count) in metrics.items()}


@given(errors, st.floats(0, 100), st.floats(0, 5))
def test_the_loss_is_the_papers_equation(rows: list[tuple[float, float]], beta: float, sft_weight: float) -> None:
    loss, _, _ = evaluate(tensor(rows), beta=beta, sft_weight=sft_weight)
    expected = 0.0
    for winner, loser in rows:
        logit = -beta * (winner - loser)
        expected += max(-logit, 0) + math.log1p(math.exp(-abs(logit))) + sft_weight * winner
    assert loss.item() == pytest.approx(expected / len(rows), rel=1e-9)


# N9 and N8: what it is of the other losses.


@given(errors, st.floats(0.01, 100))
def test_the_contrast_is_dpo_without_reference_terms(rows: list[tuple[float, float]], beta: float) -> None:
    error_Q2, weight_Q = tensor(rows), torch.ones(len(rows))
    loss, gradient_Q2, metrics = evaluate(error_Q2, beta=beta, sft_weight=0.0)
    expected_loss, expected_gradient_Q2, expected_metrics = differentiate(
        lambda value: preference(value, torch.zeros_like(value), weight_Q, beta=beta, normaliser=len(rows)), error_Q2
    )
    assert torch.equal(loss, expected_loss)
    assert torch.equal(gradient_Q2, expected_gradient_Q2)
    assert all(torch.equal(metric, expected_metrics[name]) for name, metric in metrics.items())


@pytest.mark.parametrize("sft_weight", [0.0, 0.3, 1.0])
def test_for_beta_to_0_the_loss_is_the_winners_regression_and_ln_2(sft_weight: float) -> None:
    error_Q2 = tensor([[0.1, 0.9], [0.4, 0.2]])
    loss, gradient_Q2, _ = evaluate(error_Q2, beta=1e-10, sft_weight=sft_weight)
    regression, slope_Q, _ = differentiate(lambda value: sft(value, torch.ones(2), normaliser=2), error_Q2[:, 0])
    assert loss.item() == pytest.approx(sft_weight * regression.item() + math.log(2), abs=1e-9)
    expected_Q2 = sft_weight * torch.stack([slope_Q, torch.zeros(2)], 1)
    torch.testing.assert_close(gradient_Q2, expected_Q2, rtol=0, atol=1e-9)


@given(errors)
def test_swapping_winner_and_loser_negates_the_contrasts_logit(rows: list[tuple[float, float]]) -> None:
    loss, _, metrics = evaluate(tensor(rows), beta=7, sft_weight=0.0)
    swapped_loss, _, swapped_metrics = evaluate(tensor(rows).flip(1), beta=7, sft_weight=0.0)
    margin = means(metrics)["pairs/margin"]
    assert means(swapped_metrics)["pairs/margin"] == pytest.approx(-margin, abs=1e-12)
    assert (loss - swapped_loss).item() == pytest.approx(-margin, abs=1e-9)


# B10: what bounds the loser's error. One predicted noise in the plane serves two targets.

TARGET_22 = tensor([[1.0, 0.0], [0.0, 1.0]])
"""The winner's noise and the loser's."""


def toy_errors(theta_2: Tensor) -> Tensor:
    """Errors of the pair, (1, 2)."""
    return (theta_2 - TARGET_22).square().mean(1)[None]


def descend(sft_weight: float, num_steps: int) -> Tensor:
    """The loser's error along gradient descent from between the targets, (num_steps,)."""
    theta_2, losers = tensor([0.5, 0.5]).requires_grad_(), []
    for _ in range(num_steps):
        error_Q2 = toy_errors(theta_2)
        losers.append(error_Q2[0, 1].detach())
        loss, _ = cpo(error_Q2, torch.ones(1), beta=2.0, sft_weight=sft_weight, normaliser=1)
        (slope_2,) = torch.autograd.grad(loss, theta_2)
        theta_2 = (theta_2 - 0.3 * slope_2).detach().requires_grad_()
    return torch.stack(losers)


def test_without_the_winners_own_error_the_losers_error_is_unbounded() -> None:
    away_2 = TARGET_22[0] - TARGET_22[1]
    distances = (1.0, 10.0, 100.0, 300.0)
    error_Q2 = torch.cat([toy_errors(distance * away_2) for distance in distances])
    loss_Q = cpo_losses(error_Q2, beta=2.0, sft_weight=0.0)
    assert (loss_Q.diff() < 0).all()
    assert loss_Q[-1] < 1e-100
    assert error_Q2[-1, 1] > 1e4
    loser = descend(0.0, num_steps=300)
    assert (loser.diff() > 0).all()
    assert loser[-1] > 10 * loser[0]


def test_with_the_winners_own_error_the_losers_error_is_bounded() -> None:
    start = cpo_losses(toy_errors(tensor([0.5, 0.5])), beta=2.0, sft_weight=1.0)
    # The loss never rises, so the winner's error stays below its start, and the loser's is a triangle away.
    bound = (start.sqrt() + (TARGET_22[0] - TARGET_22[1]).square().mean().sqrt()).square()
    loser = descend(1.0, num_steps=300)
    assert (loser <= bound).all()
    assert loser[-1] < 10 * loser[0]
    assert abs(loser[-1] - loser[-2]) < 1e-9


# Degenerate inputs and metrics.


def test_a_pair_of_one_image_twice_leaves_only_the_winners_own_error() -> None:
    theta = tensor(0.7).requires_grad_()
    error_Q2 = theta.square().expand(1, 2)
    loss, metrics = cpo(error_Q2, torch.ones(1), beta=1000, sft_weight=0.5, normaliser=1)
    (slope,) = torch.autograd.grad(loss, theta)
    assert loss.item() == pytest.approx(math.log(2) + 0.5 * 0.49, abs=1e-12)
    assert slope.item() == pytest.approx(0.7, abs=1e-12)
    assert means(metrics)["pairs/identical"] == 1
    assert means(metrics)["pairs/accuracy"] == 0.5


@pytest.mark.parametrize("normaliser", [0, 3])
def test_a_rank_without_pairs_contributes_exactly_nothing(normaliser: int) -> None:
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    loss, metrics = cpo(theta.expand(5, 2)[:0], torch.ones(0), beta=1000, sft_weight=1.0, normaliser=normaliser)
    (gradient,) = torch.autograd.grad(loss, theta)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert all(torch.equal(metric, torch.zeros_like(metric)) for metric in metrics.values())


def test_a_pair_of_weight_0_is_as_if_it_were_not_there() -> None:
    error_Q2, weight_Q = tensor([[0.1, 0.3], [math.nan, math.inf]]), tensor([1, 0])
    loss, gradient_Q2, metrics = differentiate(
        lambda value: cpo(value, weight_Q, beta=3, sft_weight=1, normaliser=1), error_Q2
    )
    expected_loss, expected_gradient_Q2, expected_metrics = evaluate(error_Q2[:1], beta=3)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(gradient_Q2, torch.cat([expected_gradient_Q2, torch.zeros(1, 2)]))
    assert means(metrics) == means(expected_metrics)


def test_errors_that_are_not_in_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="two errors"):
        evaluate(torch.rand(3))


def test_metrics_have_their_closed_forms() -> None:
    _, _, metrics = evaluate(tensor([[0.1, 0.3], [0.2, 0.2], [0.6, 0.4]]), beta=10)
    expected = {
        "pairs/margin": 0.0,
        "pairs/margin_square": 8 / 3,
        "pairs/accuracy": 0.5,
        "pairs/error_winner": 0.3,
        "pairs/error_loser": 0.3,
        "pairs/identical": 1 / 3,
    }
    assert means(metrics) == pytest.approx(expected, abs=1e-12)
