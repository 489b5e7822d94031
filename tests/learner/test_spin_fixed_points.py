"""SPIN as it is trained: its start, its bound, and where it comes to rest. S-T1, S-T2, S-T5, S-T6, S-T8, S-T9."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffusion.kernels import transition
from diffusion.schedules import make_schedule
from learner.algorithms.preference import preference
from learner.algorithms.sft import sft
from protocol.algorithms import Dpo
from tests.learner.toy_denoisers import LinearDenoiser, TinyNetwork, minimise, normal_points, tensor

LN_2 = math.log(2)
NETWORK = TinyNetwork()
BETA_HALF = 20.0


def random_pairs(num_pairs: int, generator: torch.Generator, *, gap: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Real and generated latents (Q, 2, 6), apart in mean by `gap`; noise (Q, 6), signal levels (Q,)."""
    x0_Q2D = torch.randn(num_pairs, 2, 6, generator=generator, dtype=torch.float64)
    x0_Q2D[:, 0] += gap
    noise_QD = torch.randn(num_pairs, 6, generator=generator, dtype=torch.float64)
    return x0_Q2D, noise_QD, torch.rand(num_pairs, generator=generator, dtype=torch.float64)


def random_theta(generator: torch.Generator) -> Tensor:
    """Weights of the network."""
    return 0.5 * torch.randn(NETWORK.num_parameters, generator=generator, dtype=torch.float64)


def spin_loss(error_Q2: Tensor, opponent_Q2: Tensor, beta_half: float) -> Tensor:
    """The mean over pairs, as SPIN calls the shared loss."""
    weight_Q = torch.ones(len(error_Q2))
    return preference(error_Q2, opponent_Q2, weight_Q, beta=beta_half / 2, normaliser=len(error_Q2))[0]


# S-T1: the start of an iteration.


def test_at_the_opponent_the_loss_is_ln_2_and_the_gradient_a_quarter_of_betas_contrast() -> None:
    generator = torch.Generator().manual_seed(0)
    batch, theta = random_pairs(4, generator, gap=0.3), random_theta(generator)
    leaf = theta.clone().requires_grad_()
    loss = spin_loss(NETWORK.pair_errors(leaf, *batch), NETWORK.pair_errors(theta, *batch), BETA_HALF)
    (gradient,) = torch.autograd.grad(loss, leaf)

    def contrast(at: Tensor) -> Tensor:
        real_Q, generated_Q = NETWORK.pair_errors(at, *batch).unbind(1)
        return (real_Q - generated_Q).mean()

    steps = 1e-5 * torch.eye(len(theta), dtype=torch.float64)
    slopes = torch.stack([(contrast(theta + step) - contrast(theta - step)) / 2e-5 for step in steps])
    assert loss.item() == pytest.approx(LN_2, abs=1e-12)
    torch.testing.assert_close(gradient, BETA_HALF / 4 * slopes, rtol=0, atol=1e-8)
    assert gradient.abs().max() > 0.01


# S-T2: the minimum property.


def test_no_model_beats_ln_2_where_real_and_generated_are_exchanged() -> None:
    generator = torch.Generator().manual_seed(1)
    (x0_Q2D, noise_QD, alpha_bar_Q), opponent = random_pairs(1, generator), random_theta(generator)
    exchanged = (torch.cat([x0_Q2D, x0_Q2D.flip(1)]), noise_QD.expand(2, -1), alpha_bar_Q.expand(2))
    opponent_Q2 = NETWORK.pair_errors(opponent, *exchanged)
    losses = torch.stack(
        [
            spin_loss(NETWORK.pair_errors(random_theta(generator), *exchanged), opponent_Q2, BETA_HALF)
            for _ in range(1000)
        ]
    )
    assert losses.min() >= LN_2 - 1e-12
    assert losses.max() > LN_2 + 0.1


# S-T8: nothing to learn from oneself.


def gradient_z_scores(gap: float) -> Tensor:
    """Of each parameter's gradient at the opponent, over 200 batches of 50 pairs."""
    generator = torch.Generator().manual_seed(2)
    theta = random_theta(generator)
    gradients = []
    for _ in range(200):
        batch, leaf = random_pairs(50, generator, gap=gap), theta.clone().requires_grad_()
        error_Q2 = NETWORK.pair_errors(leaf, *batch)
        loss = spin_loss(error_Q2, error_Q2.detach(), BETA_HALF)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    gradient = torch.stack(gradients)
    return gradient.mean(0) / (gradient.std(0) / len(gradients) ** 0.5)


def test_where_the_opponent_has_the_real_law_the_expected_gradient_is_0() -> None:
    assert gradient_z_scores(gap=0.0).abs().max() < 4


def test_where_the_opponent_has_another_law_the_expected_gradient_is_not_0() -> None:
    assert gradient_z_scores(gap=0.3).abs().max() > 4


# S-T9: one loss.


def test_spin_is_dpo_with_the_real_image_as_winner_and_the_opponent_as_reference() -> None:
    generator = torch.Generator().manual_seed(3)
    batch = random_pairs(6, generator, gap=0.3)
    error_Q2 = NETWORK.pair_errors(random_theta(generator), *batch)
    opponent_Q2 = NETWORK.pair_errors(random_theta(generator), *batch)
    loss = spin_loss(error_Q2, opponent_Q2, BETA_HALF)
    dpo_beta = Dpo(name="dpo", beta_half=BETA_HALF).beta
    assert torch.equal(loss, preference(error_Q2, opponent_Q2, torch.ones(6), beta=dpo_beta, normaliser=6)[0])
    advantage_Q2 = error_Q2 - opponent_Q2
    logit_Q = -0.5 * BETA_HALF * (advantage_Q2[:, 0] - advantage_Q2[:, 1])
    assert loss.item() == pytest.approx(torch.log1p(torch.exp(-logit_Q)).mean().item(), rel=1e-12)


# S-T5: how far an inner problem that is solved moves the mean.


@dataclass(frozen=True)
class Game:
    """Linear denoisers of one mean; real data N(mean, variance), generated N(its mean, its variance)."""

    model: LinearDenoiser
    beta_half: float
    shared_noise: bool = True

    def best_response(self, opponent: float, real: tuple[float, float], generated: tuple[float, float]) -> float:
        """The mean that solves the inner problem; laws are (mean, variance). Expectations are by quadrature."""
        point_QD, weight_Q = normal_points(3, 14) if self.shared_noise else normal_points(4, 8)
        (real_mean, real_variance), (generated_mean, generated_variance) = real, generated
        real_Q = real_mean + real_variance**0.5 * point_QD[:, 0]
        generated_Q = generated_mean + generated_variance**0.5 * point_QD[:, 1]
        x0_Q2, noise_Q2 = torch.stack([real_Q, generated_Q], 1), point_QD[:, [2, -1]]
        opponent_Q2 = self.model.errors(tensor(opponent), x0_Q2, noise_Q2)

        def loss(mean: Tensor) -> Tensor:
            error_Q2 = self.model.errors(mean, x0_Q2, noise_Q2)
            return preference(error_Q2, opponent_Q2, weight_Q, beta=self.beta_half / 2, normaliser=1)[0]

        return minimise(loss, opponent)

    def rate(self) -> float:
        """chi of 2.3: the share of the gap between the means that an iteration closes."""
        total, signal, noise = self.model.marginal_variance, self.model.alpha_bar, 1 - self.model.alpha_bar
        independent = total / (self.beta_half * signal * self.model.variance)
        return independent * total / noise if self.shared_noise else independent


@pytest.mark.parametrize(("shared_noise", "rate"), [(False, 0.407), (True, 2.24)])
def test_shared_noise_moves_the_mean_further_as_published(shared_noise: bool, rate: float) -> None:
    game = Game(LinearDenoiser(alpha_bar=0.9, variance=0.5), beta_half=3, shared_noise=shared_noise)
    reached = game.best_response(0.2, real=(0.5, 0.5), generated=(0.2, 0.5))
    assert (reached - 0.2) / 0.3 == pytest.approx(rate, rel=2e-3)


@pytest.mark.parametrize("shared_noise", [False, True])
@pytest.mark.parametrize(("alpha_bar", "beta_half", "variance"), [(0.9, 9, 0.5), (0.5, 8, 1.0), (0.3, 20, 0.3)])
def test_a_solved_inner_problem_closes_the_gap_by_its_rate(
    shared_noise: bool, alpha_bar: float, beta_half: float, variance: float
) -> None:
    game = Game(LinearDenoiser(alpha_bar, variance), beta_half, shared_noise)
    for opponent, mean in ((0.0, 0.2), (-0.3, 0.1)):
        reached = game.best_response(opponent, real=(mean, variance), generated=(opponent, variance))
        assert reached == pytest.approx(opponent + game.rate() * (mean - opponent), rel=1e-4)


# S-T6: ancestral sampling in three steps from N(0, 1), although the terminal state should still hold some of the image.

ALPHA_BAR = torch.linspace(0.999, 0.3, 1000, dtype=torch.float64)
DATA = (1.0, 0.25)
"""Mean and variance."""


def sampled_law(mean: float) -> tuple[float, float]:
    """Mean and variance of ancestral samples of the denoiser of N(mean, 0.25).

    The sampler is affine, so its mean is the path without noise, its variance the sum of squared answers to a unit
    of noise at x_T and at each step.
    """
    schedule = make_schedule(ALPHA_BAR, torch.tensor([999, 666, 333]), kernel="ddpm", eta=1.0, last_step="unscored")
    unit_N4 = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double()
    state = unit_N4[:, :1, None, None]
    for step in range(len(schedule)):
        model = LinearDenoiser(schedule.signal_N[step].item() ** 2, DATA[1])
        moved = transition(
            state,
            model.predict(tensor(mean), state),
            schedule.at(torch.full((5,), step)),
            prediction_type="epsilon",
            noise_NCHW=unit_N4[:, step + 1, None, None, None],
            wire_dtype=torch.float64,
        )
        state = moved.next_state_NCHW
    path, *answers = state.flatten().tolist()
    return path, sum((answer - path) ** 2 for answer in answers)


def play(beta_half: float, num_iterations: int) -> list[float]:
    """The sampled mean at the start of each iteration, from SFT's optimum on."""
    game = Game(LinearDenoiser(alpha_bar=0.5, variance=DATA[1]), beta_half)
    mean, means = DATA[0], []
    for _ in range(num_iterations):
        generated = sampled_law(mean)
        means.append(generated[0])
        mean = game.best_response(mean, real=DATA, generated=generated)
    return means


def critical_beta_half() -> float:
    """Where an iteration mirrors the gap: shared noise closes 2 / (beta_half a^2 (v_real + v_generated)) of it."""
    model = LinearDenoiser(alpha_bar=0.5, variance=DATA[1])
    square = 0.25 / model.marginal_variance**2
    answer = sampled_law(1.0)[0] - sampled_law(0.0)[0]
    return answer / (square * (DATA[1] + sampled_law(1.0)[1]))


def test_regression_leaves_the_samples_biased_towards_the_prior() -> None:
    point_Q2, weight_Q = normal_points(2)
    x0_Q = DATA[0] + DATA[1] ** 0.5 * point_Q2[:, 0]
    model = LinearDenoiser(alpha_bar=0.5, variance=DATA[1])
    best = minimise(lambda mean: sft(model.errors(mean, x0_Q, point_Q2[:, 1]), weight_Q, normaliser=1)[0], 0.0)
    assert best == pytest.approx(DATA[0], abs=1e-9)
    assert 0 < sampled_law(best)[0] < DATA[0] - 0.02


def gap_ratios(beta_half: float, num_iterations: int) -> Tensor:
    """What is left of the sampled mean's gap to the data after each iteration, as a signed share of it."""
    gap = tensor([DATA[0] - mean for mean in play(beta_half, num_iterations)])
    return gap[1:] / gap[:-1]


def test_self_play_with_a_beta_large_enough_removes_the_bias() -> None:
    ratio = gap_ratios(3 * critical_beta_half(), num_iterations=6)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / 3), rtol=0, atol=1e-3)


def test_self_play_with_a_smaller_beta_oscillates_and_still_removes_the_bias() -> None:
    ratio = gap_ratios(1.25 * critical_beta_half(), num_iterations=6)
    torch.testing.assert_close(ratio, torch.full_like(ratio, -0.6), rtol=0, atol=1e-3)


def test_self_play_with_too_small_a_beta_oscillates_and_diverges() -> None:
    ratio = gap_ratios(0.8 * critical_beta_half(), num_iterations=4)
    assert (ratio < -1.2).all()
