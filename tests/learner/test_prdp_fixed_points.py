"""Where PRDP comes to rest, on chains with known optima: P-T2 to P-T6."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.learner.toy_chains import (
    SIX_POINTS,
    TWO_POINTS,
    LinearChain,
    all_groups,
    gradient,
    papers_settings,
    prdp_loss,
)

# P-T2: a chain of two steps over 3 and 4 states.


def chain_log_prob(logits: Tensor) -> Tensor:
    """log_prob_GT of all 12 trajectories; logits (5, 4): row 0 for the first step, rows 1 to 3 for the second."""
    first = logits[0, :3].log_softmax(0)
    second = logits[1:4].log_softmax(1)
    return torch.stack([first.repeat_interleave(4), second.flatten()], dim=1)


def descend_on_all_pairs(
    logits: Tensor, reward_G: Tensor, beta: float, weights: str, *, num_steps: int, rate: float
) -> Tensor:
    """Gradient descent on the loss of all pairs, each weighted by its probability under ref or theta."""
    pairs = torch.tensor(list(itertools.combinations(range(12), 2)))
    ref_GT = chain_log_prob(torch.zeros_like(logits) + REF_LOGITS)
    settings = papers_settings(kl_weight=beta, loss_scale="quarter_beta")
    for _ in range(num_steps):
        leaf = logits.detach().requires_grad_()
        log_prob_GT = chain_log_prob(leaf)
        likely_G = (ref_GT if weights == "ref" else log_prob_GT).sum(1).exp().detach()
        # Groups are independent, so weighting a pair is weighting its rows of omega.
        omega_PGT = gradient(log_prob_GT[pairs], log_prob_GT[pairs], ref_GT[pairs], reward_G[pairs], settings)
        weight_P = 2 * len(pairs) * likely_G[pairs].prod(1)
        (weight_P[:, None, None] * omega_PGT * log_prob_GT[pairs]).sum().backward()
        logits = logits - rate * leaf.grad
    return logits


REF_LOGITS = 0.5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("weights", ["ref", "theta"])
def test_over_all_pairs_a_tabular_chain_reaches_the_tilted_distribution(weights: str) -> None:
    generator = torch.Generator().manual_seed(4)
    reward_G = 0.5 * torch.randn(12, generator=generator, dtype=torch.float64)
    beta = 0.8
    target_G = (chain_log_prob(REF_LOGITS).sum(1) + reward_G / beta).softmax(0)
    logits = descend_on_all_pairs(REF_LOGITS, reward_G, beta, weights, num_steps=400, rate=4.0)
    reached_G = chain_log_prob(logits).sum(1).exp()
    torch.testing.assert_close(reached_G, target_G, rtol=0, atol=1e-5)


# P-T3 and P-T4: a linear chain of two steps, t = 2 first, and a linear reward.

CHAIN = LinearChain(decay_T=(0.8, 0.9), sigma_T=(0.4, 0.5))
BETA = 2.0
SLOPE = 1.0
REACH_T = torch.tensor([0.9, 1.0], dtype=torch.float64)
"""A_t: how far a shift at step t moves x_0. What x_T moves it by is A_3 = 0.72."""
VARIANCE_T = torch.tensor([0.4, 0.5], dtype=torch.float64) ** 2
BEST_SHIFT_T = SLOPE / BETA * VARIANCE_T * REACH_T


def shifts(*shift_T: float) -> Tensor:
    """Shifts of the steps, t = 2 first."""
    return torch.tensor(shift_T, dtype=torch.float64)


def sample_pairs(shift_T: Tensor, *, shared_start: bool = False) -> Tensor:
    """All pairs of trajectories under two-point noise, (P, 2, 3)."""
    noise_PGT = all_groups(TWO_POINTS, 3)
    start_PG = noise_PGT[..., 0]
    if shared_start:
        start_PG = start_PG[:, :1].expand(-1, 2)
    return CHAIN.sample(shift_T, start_PG, noise_PGT[..., 1:])


def linear_reward_loss(shift_T: Tensor, states_PGS: Tensor, beta: float = BETA) -> Tensor:
    """The loss of the linear reward on given trajectories, differentiable in the shifts."""
    log_prob_PGT = CHAIN.log_prob(shift_T, states_PGS)
    ref_PGT = CHAIN.log_prob(shifts(0, 0), states_PGS)
    return prdp_loss(log_prob_PGT, log_prob_PGT, ref_PGT, SLOPE * states_PGS[..., -1], papers_settings(kl_weight=beta))


def closed_form_loss(shift_T: Tensor, *, shared_start: bool) -> Tensor:
    """L(h) = 2 sum_t (h_t / s_t - k A_t s_t / beta)^2 + 2 (k A_3 / beta)^2, without the last if x_T is shared."""
    sigma_T = VARIANCE_T.sqrt()
    steps = 2 * (shift_T / sigma_T - SLOPE * REACH_T * sigma_T / BETA).square().sum()
    return steps + (0 if shared_start else 2 * (SLOPE * 0.72 / BETA) ** 2)


@pytest.mark.parametrize("shared_start", [False, True])
@pytest.mark.parametrize("sampled_with", [(0.0, 0.0), (0.3, 0.1), (-2.0, 5.0)])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.072, 0.125), (0.3, 0.1), (-1.0, 0.5)])
def test_the_expected_loss_is_the_closed_form_whoever_sampled(
    shared_start: bool, sampled_with: tuple[float, float], shift: tuple[float, float]
) -> None:
    states_PGS = sample_pairs(shifts(*sampled_with), shared_start=shared_start)
    loss = linear_reward_loss(shifts(*shift), states_PGS)
    expected = closed_form_loss(shifts(*shift), shared_start=shared_start)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("shared_start", "floor"), [(False, 0.2592), (True, 0.0)])
def test_the_loss_is_least_at_the_regularised_optimum(shared_start: bool, floor: float) -> None:
    torch.testing.assert_close(BEST_SHIFT_T, shifts(0.072, 0.125), rtol=0, atol=1e-12)
    best = BEST_SHIFT_T.clone().requires_grad_()
    loss = linear_reward_loss(best, sample_pairs(shifts(0.4, -0.3), shared_start=shared_start))
    (slope_T,) = torch.autograd.grad(loss, best)
    assert loss.item() == pytest.approx(floor, abs=1e-9)
    torch.testing.assert_close(slope_T, torch.zeros_like(slope_T), rtol=0, atol=1e-9)


def test_kl_and_gain_at_the_optimum_have_their_closed_forms() -> None:
    states_PGS = sample_pairs(BEST_SHIFT_T)
    log_ratio = CHAIN.log_prob(BEST_SHIFT_T, states_PGS) - CHAIN.log_prob(shifts(0, 0), states_PGS)
    gain = SLOPE * (states_PGS[..., -1] - sample_pairs(shifts(0, 0))[..., -1]).mean()
    assert log_ratio.sum(2).mean().item() == pytest.approx(0.04745, abs=1e-9)
    assert gain.item() == pytest.approx(0.1898, abs=1e-9)


@pytest.mark.parametrize("beta", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("shift", [(0.3, 0.1), (0.0, 0.0), (-1.0, 2.0)])
def test_on_policy_the_gradient_is_minus_four_over_beta_times_that_of_the_regularised_reward(
    beta: float, shift: tuple[float, float]
) -> None:
    shift_T = shifts(*shift).requires_grad_()
    (slope_T,) = torch.autograd.grad(linear_reward_loss(shift_T, sample_pairs(shift_T.detach()), beta=beta), shift_T)
    objective_slope_T = SLOPE * REACH_T - beta * shift_T.detach() / VARIANCE_T
    torch.testing.assert_close(slope_T, -4 / beta * objective_slope_T, rtol=1e-9, atol=1e-9)


def test_the_on_policy_gradient_has_the_published_numbers() -> None:
    shift_T = shifts(0.3, 0.1).requires_grad_()
    (slope_T,) = torch.autograd.grad(linear_reward_loss(shift_T, sample_pairs(shift_T.detach())), shift_T)
    torch.testing.assert_close(slope_T, shifts(5.7, -0.4), rtol=0, atol=1e-9)


# P-T5 and P-T6: one step from x_T = 0, ref N(0, s^2), reward -(k/2) (x - c)^2.

SIGMA, CURVATURE, CENTRE = 0.8, 1.5, 1.0
ONE_STEP = LinearChain(decay_T=(0.0,), sigma_T=(SIGMA,))


def curved_reward(states_PGS: Tensor) -> Tensor:
    """-(k/2) (x_0 - c)^2."""
    return -CURVATURE / 2 * (states_PGS[..., -1] - CENTRE).square()


def one_step_states(mean: float, noise_PG: Tensor) -> Tensor:
    """Trajectories of the sampler N(mean, s^2), (P, G, 2)."""
    return ONE_STEP.sample(shifts(mean), torch.zeros_like(noise_PG), noise_PG[..., None])


def regression_minimiser(mean: float, beta: float) -> float:
    """Where the loss over the sampler N(mean, s^2) is least: the loss is a parabola, so two slopes tell."""
    states_PGS = one_step_states(mean, all_groups(SIX_POINTS, 1)[..., 0])
    ref_PGT = ONE_STEP.log_prob(shifts(0), states_PGS)

    def slope(at: float) -> float:
        shift_T = shifts(at).requires_grad_()
        log_prob_PGT = ONE_STEP.log_prob(shift_T, states_PGS)
        loss = prdp_loss(
            log_prob_PGT, log_prob_PGT, ref_PGT, curved_reward(states_PGS), papers_settings(kl_weight=beta)
        )
        return torch.autograd.grad(loss, shift_T)[0].item()

    return slope(0) / (slope(0) - slope(1))


def test_for_a_curved_reward_the_minimiser_depends_on_the_sampler_as_predicted() -> None:
    assert regression_minimiser(0.0, beta=1.2) == pytest.approx(0.8, abs=1e-9)
    for mean in (-1.0, 0.0, 0.3, 0.9):
        expected = CURVATURE * SIGMA**2 / 1.2 * (CENTRE - mean)
        assert regression_minimiser(mean, beta=1.2) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("beta", [0.3, 1.2, 5.0])
def test_sampling_at_the_optimum_the_regression_stays_there(beta: float) -> None:
    best = best_mean(beta)
    assert regression_minimiser(best, beta) == pytest.approx(best, abs=1e-9)


def best_mean(beta: float) -> float:
    """The optimum of the regularised reward within the family."""
    stiffness = CURVATURE * SIGMA**2
    return stiffness * CENTRE / (stiffness + beta)


def train_online(
    beta: float, *, clip_eps: float | None, num_updates: int, num_rounds: int, rate: float = 0.5
) -> list[float]:
    """The mean after each round of sampling 32 groups of 8 and taking K gradient steps on them.

    `rate` is in units of the inverse curvature of the regression, so 1 solves it in one step.
    """
    generator = torch.Generator().manual_seed(0)
    settings = papers_settings(kl_weight=beta, clip_eps=clip_eps, loss_scale="quarter_beta")
    mean, means = 0.0, []
    for _ in range(num_rounds):
        noise_PG = torch.randn(32, 8, generator=generator, dtype=torch.float64)
        states_PGS = one_step_states(mean, noise_PG)
        old_PGT, ref_PGT = (ONE_STEP.log_prob(shifts(at), states_PGS) for at in (mean, 0.0))
        for _ in range(num_updates):
            shift_T = shifts(mean).requires_grad_()
            log_prob_PGT = ONE_STEP.log_prob(shift_T, states_PGS)
            omega_PGT = gradient(log_prob_PGT, old_PGT, ref_PGT, curved_reward(states_PGS), settings)
            (slope_T,) = torch.autograd.grad((omega_PGT * log_prob_PGT).sum(), shift_T)
            mean -= rate * SIGMA**2 / beta * slope_T.item()
        means.append(mean)
    return means


GENTLE, STEEP = 1.6, 0.6
"""KL weights on either side of k s^2 = 0.96, where solving every round begins to overshoot."""


def test_solving_each_round_without_a_window_overshoots_outwards_at_a_small_kl_weight() -> None:
    means = train_online(STEEP, clip_eps=None, num_updates=15, num_rounds=12)
    distances = [abs(mean - best_mean(STEEP)) for mean in means]
    assert distances[-1] > 20 * best_mean(STEEP)
    signs = [mean > best_mean(STEEP) for mean in means]
    assert all(one != other for one, other in itertools.pairwise(signs))


def test_a_window_keeps_the_same_rounds_bounded_and_near_the_optimum() -> None:
    means = train_online(STEEP, clip_eps=0.1, num_updates=15, num_rounds=30)
    assert max(map(abs, means)) < 2
    assert sum(means[-10:]) / 10 == pytest.approx(best_mean(STEEP), abs=0.1)


@pytest.mark.parametrize("clip_eps", [None, 0.1])
@pytest.mark.parametrize("num_updates", [1, 15])
def test_at_a_large_kl_weight_every_variant_reaches_the_optimum(clip_eps: float | None, num_updates: int) -> None:
    means = train_online(GENTLE, clip_eps=clip_eps, num_updates=num_updates, num_rounds=30)
    assert sum(means[-10:]) / 10 == pytest.approx(best_mean(GENTLE), abs=0.05)


@pytest.mark.parametrize("beta", [GENTLE, STEEP])
def test_with_one_update_a_round_the_window_changes_nothing(beta: float) -> None:
    with_window, without = (
        train_online(beta, clip_eps=clip_eps, num_updates=1, num_rounds=10) for clip_eps in (1e-3, None)
    )
    assert with_window == without
