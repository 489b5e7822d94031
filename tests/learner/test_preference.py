"""The Diffusion-DPO loss against closed forms, invariances and degenerate inputs: B1, B2, B11, N3, N8."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.metrics import Metrics
from learner.algorithms.preference import preference, preference_losses
from learner.algorithms.selection import make_pairs
from learner.two_pass import differentiate
from protocol.algorithms import Dpo, Pairs
from tests.learner.toy_denoisers import LinearDenoiser, TinyNetwork, tensor

WINNER_FIRST = tensor([[0.100, 0.1202]])
REFERENCE = tensor([[0.101, 0.1200]])
errors = st.tuples(*[st.floats(0, 2)] * 4)


def evaluate(
    error_Q2: Tensor,
    ref_Q2: Tensor,
    *,
    beta: float = 1.0,
    weight_Q: Tensor | None = None,
    normaliser: int | None = None,
) -> tuple[Tensor, Tensor, Metrics]:
    """Loss, its gradient in the errors, metrics; weights of 1 unless given."""
    weight_Q = torch.ones(len(error_Q2)) if weight_Q is None else weight_Q
    normaliser = len(error_Q2) if normaliser is None else normaliser
    return differentiate(lambda value: preference(value, ref_Q2, weight_Q, beta=beta, normaliser=normaliser), error_Q2)


def means(metrics: Metrics) -> dict[str, float]:
    """Metrics divided by their counts."""
    return {name: (total / count).item() for name, (total, count) in metrics.items()}


def random_errors(num_pairs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Errors under theta and under the reference, near each other, (Q, 2) fp64."""
    generator = torch.Generator().manual_seed(seed)
    ref_Q2 = 0.1 + 0.05 * torch.rand(num_pairs, 2, generator=generator, dtype=torch.float64)
    return ref_Q2 + 0.01 * torch.randn(num_pairs, 2, generator=generator, dtype=torch.float64), ref_Q2


# B1: conventions.


@pytest.mark.parametrize("beta", [{"beta_half": 2000}, {"beta_full": 1000}])
def test_both_conventions_of_beta_give_the_published_instance(beta: dict[str, float]) -> None:
    settings = Dpo(name="dpo", **beta)
    loss, _, metrics = evaluate(WINNER_FIRST, REFERENCE, beta=settings.beta)
    assert means(metrics)["pairs/margin"] == pytest.approx(1.2, abs=1e-9)
    assert loss.item() == pytest.approx(0.263282, abs=5e-7)


def test_for_beta_to_0_the_gradient_is_minus_half_the_logits() -> None:
    beta = 1e-6
    loss, gradient_Q2, _ = evaluate(WINNER_FIRST, REFERENCE, beta=beta)
    logit_gradient_Q2 = beta * tensor([[-1.0, 1.0]])
    torch.testing.assert_close(gradient_Q2, -0.5 * logit_gradient_Q2, rtol=1e-6, atol=0)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


@given(st.lists(errors, min_size=1, max_size=5), st.floats(0.01, 100))
def test_the_loss_is_the_papers_equation(rows: list[tuple[float, ...]], beta_half: float) -> None:
    loss, _, _ = evaluate(
        tensor([row[:2] for row in rows]),
        tensor([row[2:] for row in rows]),
        beta=Dpo(name="dpo", beta_half=beta_half).beta,
    )
    expected = 0.0
    for winner, loser, ref_winner, ref_loser in rows:
        logit = -beta_half / 2 * ((winner - ref_winner) - (loser - ref_loser))
        expected += max(-logit, 0) + math.log1p(math.exp(-abs(logit)))
    assert loss.item() == pytest.approx(expected / len(rows), rel=1e-9)


def test_the_gradient_is_beta_times_the_probability_of_the_wrong_order() -> None:
    _, gradient_Q2, _ = evaluate(WINNER_FIRST, REFERENCE, beta=1000)
    wrong = 1 / (1 + math.exp(1.2))
    torch.testing.assert_close(gradient_Q2, 1000 * wrong * tensor([[1.0, -1.0]]), rtol=1e-9, atol=0)


# B2: shared and independent noise.


def ref_gradients(winner_Q: Tensor, loser_Q: Tensor, noise_Q2: Tensor) -> Tensor:
    """Each pair's gradient in the mean of a linear denoiser that is its own reference, (Q,)."""
    model, num_pairs = LinearDenoiser(alpha_bar=0.6, variance=0.5), len(winner_Q)
    mean_Q1 = torch.zeros(num_pairs, 1, dtype=torch.float64, requires_grad=True)
    error_Q2 = model.errors(mean_Q1, torch.stack([winner_Q, loser_Q], 1), noise_Q2)
    loss, _ = preference(error_Q2, error_Q2.detach(), torch.ones(num_pairs), beta=3.0, normaliser=1)
    (gradient_Q1,) = torch.autograd.grad(loss, mean_Q1)
    return gradient_Q1[:, 0]


def test_sharing_noise_keeps_the_expected_gradient_and_lessens_its_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    winner_Q, loser_Q, *noise_2Q = torch.randn(4, 40_000, generator=generator, dtype=torch.float64)
    winner_Q = 0.3 + winner_Q * 0.5**0.5
    noise_Q2 = torch.stack(noise_2Q, 1)
    shared_Q = ref_gradients(winner_Q, loser_Q * 0.5**0.5, noise_Q2[:, :1].expand(-1, 2))
    independent_Q = ref_gradients(winner_Q, loser_Q * 0.5**0.5, noise_Q2)
    model = LinearDenoiser(alpha_bar=0.6, variance=0.5)
    expected = -3.0 * 0.6 * 0.4 / model.marginal_variance**2 * 0.3
    for gradient_Q in (shared_Q, independent_Q):
        assert abs(gradient_Q.mean().item() - expected) < 4 * gradient_Q.std().item() / 200
    assert shared_Q.var() < 0.9 * independent_Q.var()


# B11: invariances.


@given(st.permutations(range(6)), st.integers(0, 99))
def test_permuting_siblings_or_groups_changes_neither_loss_nor_gradient(order: list[int], seed: int) -> None:
    """The errors of 6 siblings in 6 groups; pairs are made of their rewards."""
    generator = torch.Generator().manual_seed(seed)
    error_PG, ref_PG, reward_PG = torch.rand(3, 6, 6, generator=generator, dtype=torch.float64)

    def outcome(error_PG: Tensor, ref_PG: Tensor, reward_PG: Tensor) -> tuple[Tensor, Tensor]:
        pairs = make_pairs(reward_PG, Pairs(rule="all_pairs"))

        def loss(value_PG: Tensor) -> tuple[Tensor, Metrics]:
            error_Q2, ref_Q2 = (
                torch.stack([value[pairs.group_Q, pairs.winner_Q], value[pairs.group_Q, pairs.loser_Q]], 1)
                for value in (value_PG, ref_PG)
            )
            return preference(error_Q2, ref_Q2, pairs.weight_Q, beta=5.0, normaliser=pairs.num_units)

        return differentiate(loss, error_PG)[:2]

    loss, gradient_PG = outcome(error_PG, ref_PG, reward_PG)
    for axis in (0, 1):
        moved = [value.index_select(axis, torch.tensor(order)) for value in (error_PG, ref_PG, reward_PG)]
        other_loss, other_gradient_PG = outcome(*moved)
        torch.testing.assert_close(other_loss, loss, rtol=0, atol=1e-9)
        expected_PG = gradient_PG.index_select(axis, torch.tensor(order))
        torch.testing.assert_close(other_gradient_PG, expected_PG, rtol=0, atol=1e-9)


@pytest.mark.parametrize("counts", [(7,), (4, 3), (1, 6), (5, 0, 2)])
def test_ranks_with_unequal_counts_add_up_to_the_same_loss_and_gradient(counts: tuple[int, ...]) -> None:
    error_Q2, ref_Q2 = random_errors(7)
    weight_Q = tensor([1, 1, 0.5, 0.5, 1, 0.25, 0.75])
    whole_loss, whole_gradient_Q2, whole_metrics = evaluate(error_Q2, ref_Q2, beta=50, weight_Q=weight_Q, normaliser=5)
    ranks = [
        evaluate(error, ref, beta=50, weight_Q=weight, normaliser=5)
        for error, ref, weight in zip(error_Q2.split(counts), ref_Q2.split(counts), weight_Q.split(counts), strict=True)
    ]
    assert sum(loss.item() for loss, _, _ in ranks) == pytest.approx(whole_loss.item(), abs=1e-9)
    gradient_Q2 = torch.cat([gradient for _, gradient, _ in ranks])
    torch.testing.assert_close(gradient_Q2, whole_gradient_Q2, rtol=0, atol=1e-9)
    for name, whole in whole_metrics.items():
        torch.testing.assert_close(sum(metrics[name] for _, _, metrics in ranks), whole, rtol=0, atol=1e-9)


# N3 and N8: what the logit is at the start, and when a pair is turned round.


def test_at_the_reference_the_loss_is_ln_2_the_accuracy_a_half_and_the_gradient_not_zero() -> None:
    _, ref_Q2 = random_errors(5)
    loss, gradient_Q2, metrics = evaluate(ref_Q2, ref_Q2, beta=2500)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert means(metrics)["pairs/accuracy"] == 0.5
    torch.testing.assert_close(gradient_Q2, 2500 / 2 / 5 * tensor([[1.0, -1.0]]).expand(5, 2))


@given(st.integers(0, 99))
def test_swapping_winner_and_loser_negates_the_logit(seed: int) -> None:
    error_Q2, ref_Q2 = random_errors(4, seed)
    loss, _, metrics = evaluate(error_Q2, ref_Q2, beta=100)
    swapped_loss, _, swapped_metrics = evaluate(error_Q2.flip(1), ref_Q2.flip(1), beta=100)
    margin = means(metrics)["pairs/margin"]
    assert means(swapped_metrics)["pairs/margin"] == pytest.approx(-margin, abs=1e-12)
    assert means(swapped_metrics)["pairs/accuracy"] == pytest.approx(1 - means(metrics)["pairs/accuracy"])
    # l(z) - l(-z) = -z, whatever z.
    assert (loss - swapped_loss).item() == pytest.approx(-margin, abs=1e-9)


# Degenerate inputs.


def test_a_pair_of_one_image_twice_has_a_logit_of_0_and_moves_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    network = TinyNetwork()
    x0_Q2D = torch.randn(3, 1, 6, generator=generator, dtype=torch.float64).expand(3, 2, 6)
    noise_QD = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    theta, ref = torch.randn(2, network.num_parameters, generator=generator, dtype=torch.float64)
    theta.requires_grad_()
    alpha_bar_Q = tensor([0.9, 0.5, 0.1])
    error_Q2 = network.pair_errors(theta, x0_Q2D, noise_QD, alpha_bar_Q)
    ref_Q2 = network.pair_errors(ref, x0_Q2D, noise_QD, alpha_bar_Q)
    assert (error_Q2[:, 0] != ref_Q2[:, 0]).all()
    loss, metrics = preference(error_Q2, ref_Q2, torch.ones(3), beta=1000, normaliser=3)
    (gradient,) = torch.autograd.grad(loss, theta)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert means(metrics)["pairs/margin_square"] == 0
    assert means(metrics)["pairs/identical"] == 1
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


@pytest.mark.parametrize("normaliser", [0, 3])
def test_a_rank_without_pairs_contributes_exactly_nothing(normaliser: int) -> None:
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    error_Q2 = theta.expand(5, 2)[:0]
    loss, metrics = preference(error_Q2, error_Q2, torch.ones(0), beta=1000, normaliser=normaliser)
    (gradient,) = torch.autograd.grad(loss, theta)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))
    assert all(torch.equal(metric, torch.zeros_like(metric)) for metric in metrics.values())


@pytest.mark.parametrize("filler", [0.0, math.nan, math.inf])
def test_a_pair_of_weight_0_is_as_if_it_were_not_there(filler: float) -> None:
    error_Q2, ref_Q2 = random_errors(3)
    filler_12 = torch.full((1, 2), filler, dtype=torch.float64)
    loss, gradient_Q2, metrics = evaluate(
        torch.cat([error_Q2, filler_12]),
        torch.cat([ref_Q2, filler_12]),
        weight_Q=tensor([1, 1, 1, 0]),
        normaliser=3,
    )
    expected_loss, expected_gradient_Q2, expected_metrics = evaluate(error_Q2, ref_Q2)
    assert torch.equal(loss, expected_loss)
    assert torch.equal(gradient_Q2, torch.cat([expected_gradient_Q2, torch.zeros(1, 2)]))
    assert means(metrics) == means(expected_metrics)


def test_a_weight_multiplies_a_pairs_loss_and_the_normaliser_divides_it() -> None:
    error_Q2, ref_Q2 = random_errors(2)
    loss_Q = preference_losses(error_Q2, ref_Q2, beta=20)
    loss, _, _ = evaluate(error_Q2, ref_Q2, beta=20, weight_Q=tensor([0.25, 0.75]), normaliser=4)
    assert loss.item() == pytest.approx(((loss_Q[0] * 0.25 + loss_Q[1] * 0.75) / 4).item(), rel=1e-12)


@pytest.mark.parametrize(("winner", "expected_loss", "slope"), [(1e3, 2.5e6, 2500.0), (-1e3, 0.0, 0.0)])
def test_an_enormous_logit_has_a_finite_loss_and_gradient(winner: float, expected_loss: float, slope: float) -> None:
    loss, gradient_Q2, _ = evaluate(tensor([[winner, 0.0]]), torch.zeros(1, 2), beta=2500)
    assert loss.item() == pytest.approx(expected_loss)
    torch.testing.assert_close(gradient_Q2, tensor([[slope, -slope]]))


def test_errors_of_single_precision_lose_nothing_more_in_the_logit() -> None:
    error_Q2, ref_Q2 = (value.float() for value in random_errors(4))
    loss, gradient_Q2, _ = evaluate(error_Q2, ref_Q2, beta=2500)
    exact_loss, _, _ = evaluate(error_Q2.double(), ref_Q2.double(), beta=2500)
    assert torch.equal(loss, exact_loss)
    assert gradient_Q2.dtype == torch.float32


def test_the_reference_gets_no_gradient() -> None:
    error_Q2, ref_Q2 = random_errors(2)
    loss, _ = preference(error_Q2.requires_grad_(), ref_Q2.requires_grad_(), torch.ones(2), beta=1.0, normaliser=2)
    loss.backward()
    assert error_Q2.grad is not None
    assert ref_Q2.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_error_of_the_reference_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="non-finite error of the reference"):
        evaluate(WINNER_FIRST, tensor([[0.1, value]]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="two errors"):
        evaluate(torch.rand(2, 3), torch.rand(2, 3))
    with pytest.raises(ValueError, match="do not fit"):
        evaluate(torch.rand(2, 2), torch.rand(1, 2))
    with pytest.raises(ValueError, match="as many weights"):
        evaluate(torch.rand(2, 2), torch.rand(2, 2), weight_Q=torch.ones(3))


def test_metrics_have_their_closed_forms() -> None:
    error_Q2 = tensor([[0.1, 0.3], [0.2, 0.2], [0.5, 0.1], [0.4, 0.4]])
    ref_Q2 = tensor([[0.2, 0.2], [0.2, 0.2], [0.3, 0.1], [0.1, 0.5]])
    _, _, metrics = evaluate(error_Q2, ref_Q2, beta=10)
    expected = {
        "pairs/margin": (2 + 0 - 2 - 4) / 4,
        "pairs/margin_square": (4 + 0 + 4 + 16) / 4,
        "pairs/accuracy": (1 + 0.5 + 0 + 0) / 4,
        "pairs/error_winner": 0.3,
        "pairs/error_loser": 0.25,
        "pairs/error_ref_winner": 0.2,
        "pairs/error_ref_loser": 0.25,
        "pairs/identical": 0.25,
    }
    assert means(metrics) == pytest.approx(expected)
