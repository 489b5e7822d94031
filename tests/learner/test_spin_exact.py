"""SPIN's exact form: its update law (S-T3, S-T4, S-T7), Jensen's bound (S-T12), what holds at the opponent, and
degenerate inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffusion.kernels import teacher_forced_transition, transition
from diffusion.schedules import StepConstants, make_schedule
from learner.algorithms.metrics import Metrics
from learner.algorithms.spin_exact import spin_exact
from learner.two_pass import differentiate
from tests.learner.toy_chains import SIX_POINTS, LinearChain, all_groups

LN_2 = math.log(2)


@dataclass(frozen=True)
class Outcome:
    """The loss, its gradient in the log-probabilities, and the metrics."""

    loss: Tensor
    gradient_Q2T: Tensor
    metrics: Metrics


def evaluate(
    log_prob_Q2T: Tensor,
    opponent_Q2T: Tensor,
    scored_T: Tensor | None = None,
    *,
    spin_lambda: float = 2.0,
    normaliser: int | None = None,
) -> Outcome:
    """Runs the loss as the learner does; all steps are scored unless said."""

    def loss(value: Tensor) -> tuple[Tensor, Metrics]:
        return spin_exact(
            value,
            opponent_Q2T,
            torch.ones(value.shape[2], dtype=torch.bool) if scored_T is None else scored_T,
            spin_lambda=spin_lambda,
            normaliser=len(value) if normaliser is None else normaliser,
        )

    return Outcome(*differentiate(loss, log_prob_Q2T))


def loss_of(log_prob_Q2T: Tensor, opponent_Q2T: Tensor, spin_lambda: float) -> Tensor:
    """The mean loss of pairs whose steps are all scored, differentiable."""
    scored_T = torch.ones(log_prob_Q2T.shape[2], dtype=torch.bool)
    loss, _ = spin_exact(log_prob_Q2T, opponent_Q2T, scored_T, spin_lambda=spin_lambda, normaliser=len(log_prob_Q2T))
    return loss


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Returns the minimum of a smooth convex function."""
    parameter = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameter], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(parameter)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return parameter.detach()


def tensor(*values: object) -> Tensor:
    """Numbers in fp64."""
    return torch.tensor(values, dtype=torch.float64)


def random_pairs(*, pairs: int = 3, steps: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities under theta and under the opponent, of the size that latents have."""
    generator = torch.Generator().manual_seed(seed)
    opponent, move = torch.randn((2, pairs, 2, steps), generator=generator, dtype=torch.float64)
    return 300 * opponent + move, 300 * opponent


def assert_equal(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to an absolute tolerance."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance, check_dtype=False)


# The loss itself.


def test_the_loss_is_the_logistic_loss_of_the_scaled_difference_of_trajectory_log_ratios() -> None:
    ratio_Q2T = tensor([[0.3, -0.1], [0.05, 0.1]], [[-0.4, 0.1], [0.2, 0.0]])
    outcome = evaluate(ratio_Q2T - 7, torch.full_like(ratio_Q2T, -7), spin_lambda=2.0)
    margins = (0.1, -1.0)
    slopes = [1 / (1 + math.exp(margin)) for margin in margins]
    assert outcome.loss.item() == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins) / 2)
    expected_Q2 = tensor(*[[-2.0 * slope / 2, 2.0 * slope / 2] for slope in slopes])
    assert_equal(outcome.gradient_Q2T, expected_Q2[:, :, None].expand(2, 2, 2))


def test_at_the_opponent_every_pair_costs_ln_2_and_is_pulled_by_half_of_lambda() -> None:
    _, opponent = random_pairs()
    outcome = evaluate(opponent, opponent, spin_lambda=3.0)
    assert outcome.loss.item() == pytest.approx(LN_2, abs=1e-12)
    pull_2 = tensor(-1.5, 1.5) / len(opponent)
    assert_equal(outcome.gradient_Q2T, pull_2[None, :, None].expand_as(opponent), 1e-12)


def test_a_batch_of_exchanged_pairs_never_costs_less_than_ln_2() -> None:
    for seed in range(100):
        log_prob, opponent = random_pairs(pairs=1, seed=seed)
        both, both_opponent = (torch.cat([value, value.flip(1)]) for value in (log_prob, opponent))
        assert evaluate(both, both_opponent).loss.item() >= LN_2


def test_only_the_sum_over_scored_steps_counts() -> None:
    log_prob, opponent = random_pairs()
    whole = evaluate(log_prob.sum(2, keepdim=True), opponent.sum(2, keepdim=True))
    assert_equal(evaluate(log_prob, opponent).loss, whole.loss, 1e-9)
    padded = torch.cat([log_prob, torch.full_like(log_prob[..., :1], math.nan)], 2)
    padded_opponent = torch.cat([opponent, torch.zeros_like(opponent[..., :1])], 2)
    with_unscored = evaluate(padded, padded_opponent, torch.tensor([True] * 4 + [False]))
    assert torch.equal(with_unscored.loss, evaluate(log_prob, opponent).loss)
    assert torch.equal(with_unscored.gradient_Q2T[..., :-1], evaluate(log_prob, opponent).gradient_Q2T)
    assert torch.equal(with_unscored.gradient_Q2T[..., -1], torch.zeros(3, 2, dtype=torch.float64))


def test_ranks_with_unequal_numbers_of_pairs_add_up_to_the_whole() -> None:
    log_prob, opponent = random_pairs()
    whole = evaluate(log_prob, opponent)
    parts = [evaluate(log_prob[rows], opponent[rows], normaliser=3) for rows in (slice(0, 1), slice(1, 3))]
    assert_equal(parts[0].loss + parts[1].loss, whole.loss, 1e-12)
    assert_equal(torch.cat([part.gradient_Q2T for part in parts]), whole.gradient_Q2T, 1e-12)
    for name, value in whole.metrics.items():
        assert_equal(parts[0].metrics[name] + parts[1].metrics[name], value)


def test_permuting_pairs_changes_nothing() -> None:
    log_prob, opponent = random_pairs()
    order = [2, 0, 1]
    whole, permuted = evaluate(log_prob, opponent), evaluate(log_prob[order], opponent[order])
    assert_equal(permuted.loss, whole.loss, 1e-12)
    assert_equal(permuted.gradient_Q2T, whole.gradient_Q2T[order], 1e-12)


def test_metrics_have_their_closed_forms() -> None:
    ratio_Q2T = tensor([[0.3, -0.1], [0.05, 0.1]], [[-0.4, 0.1], [0.2, 0.0]], [[0.1, 0.0], [0.0, 0.1]])
    outcome = evaluate(ratio_Q2T, torch.zeros_like(ratio_Q2T), spin_lambda=2.0)
    means = {name: (total / count).item() for name, (total, count) in outcome.metrics.items()}
    assert means == pytest.approx(
        {
            "pairs/margin": (0.1 - 1.0 + 0.0) / 3,
            "pairs/margin_square": (0.01 + 1.0) / 3,
            "pairs/accuracy": (1 + 0 + 0.5) / 3,
            "spin/log_ratio_real": (0.2 - 0.3 + 0.1) / 3,
            "spin/log_ratio_generated": (0.15 + 0.2 + 0.1) / 3,
        }
    )


# S-T3, S-T4, S-T7: an iteration solved takes p to p (q/p)^(1/lambda).


def normal_points(num_points: int) -> Tensor:
    """Equally likely points close to N(0, 1), of variance exactly 1."""
    point_N: Tensor = torch.special.ndtri((torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points)
    return point_N / point_N.std(correction=0)


def play(chain: LinearChain, data_T: Tensor, opponent_T: Tensor, noise_Q2T: Tensor) -> Tensor:
    """Returns trajectories states_Q2S: the data's, then the opponent's."""
    start_Q1 = torch.zeros(len(noise_Q2T), 1, dtype=torch.float64)
    real_Q1S = chain.sample(data_T, start_Q1, noise_Q2T[:, :1])
    return torch.cat([real_Q1S, chain.sample(opponent_T, start_Q1, noise_Q2T[:, 1:])], dim=1)


def solve(chain: LinearChain, opponent_T: Tensor, states_Q2S: Tensor, spin_lambda: float) -> Tensor:
    """Returns the shifts at which the exact loss is least."""
    opponent_Q2T = chain.log_prob(opponent_T, states_Q2S)
    return minimise(lambda shift_T: loss_of(chain.log_prob(shift_T, states_Q2S), opponent_Q2T, spin_lambda), opponent_T)


@pytest.mark.parametrize("spin_lambda", [0.75, 1.0, 2.0, 5.0])
def test_the_mean_of_a_gaussian_moves_by_its_gap_over_lambda(spin_lambda: float) -> None:
    noise_Q2T = torch.cartesian_prod(normal_points(150), normal_points(150))[:, :, None]
    chain = LinearChain(decay_T=(0.0,), sigma_T=(0.8,))
    opponent_T = tensor(0.2)
    moved_T = solve(chain, opponent_T, play(chain, tensor(1.0), opponent_T, noise_Q2T), spin_lambda)
    assert_equal(moved_T, tensor(0.2 + 0.8 / spin_lambda), 5e-3)


def test_two_iterations_at_lambda_2_have_the_published_means() -> None:
    noise_Q2T = torch.cartesian_prod(normal_points(150), normal_points(150))[:, :, None]
    chain = LinearChain(decay_T=(0.0,), sigma_T=(1.0,))
    mean_T = tensor(0.0)
    for expected in (0.5, 0.75):
        mean_T = solve(chain, mean_T, play(chain, tensor(1.0), mean_T, noise_Q2T), spin_lambda=2.0)
        assert mean_T.item() == pytest.approx(expected, abs=5e-3)


def approximate_losses(
    chain: LinearChain, shift_T: Tensor, opponent_T: Tensor, states_Q2S: Tensor, spin_lambda: float
) -> Tensor:
    """The paper's approximate form of each pair and step, l(-beta_t [delta_t(real) - delta_t(generated)]), (Q, T)."""
    carried_Q2T = tensor(*chain.decay_T) * states_Q2S[..., :-1]
    next_Q2T = states_Q2S[..., 1:]
    delta_Q2T = (next_Q2T - carried_Q2T - shift_T).square() - (next_Q2T - carried_Q2T - opponent_T).square()
    beta_T = spin_lambda * len(shift_T) / (2 * tensor(*chain.sigma_T).square())
    return -logsigmoid(-beta_T * (delta_Q2T[:, 0] - delta_Q2T[:, 1]))


@pytest.mark.parametrize(
    ("sigma_T", "gap_T"), [((1.0, 1.0, 1.0), (0.2, 0.2, 0.2)), ((0.8, 1.0, 1.3), (0.1, -0.2, 0.3))]
)
def test_independent_steps_move_by_gap_over_lambda_and_in_the_approximate_form_over_lambda_t(
    sigma_T: tuple[float, ...], gap_T: tuple[float, ...]
) -> None:
    chain, spin_lambda = LinearChain(decay_T=(0.0, 0.0, 0.0), sigma_T=sigma_T), 2.0
    opponent_T = tensor(0.5, -0.1, 0.0)
    states_Q2S = play(chain, opponent_T + tensor(*gap_T), opponent_T, all_groups(SIX_POINTS, 3))
    exact_T = solve(chain, opponent_T, states_Q2S, spin_lambda)
    assert_equal(exact_T - opponent_T, tensor(*gap_T) / spin_lambda, 2e-3)
    approximate_T = minimise(
        lambda shift_T: approximate_losses(chain, shift_T, opponent_T, states_Q2S, spin_lambda).mean(), opponent_T
    )
    assert_equal(approximate_T - opponent_T, tensor(*gap_T) / (spin_lambda * 3), 2e-3)


def test_a_table_moves_to_the_geometric_mean_of_itself_and_the_data() -> None:
    """Six states of rational probability, so that all pairs of a state of each law are a finite batch."""
    data_count, opponent_count = torch.tensor([6, 1, 1, 2, 1, 1]), torch.tensor([1, 2, 4, 1, 3, 1])
    pair_Q2 = torch.cartesian_prod(*(torch.arange(6).repeat_interleave(c) for c in (data_count, opponent_count)))
    data, opponent = (count.double() / count.sum() for count in (data_count, opponent_count))

    def loss(logit_S: Tensor) -> Tensor:
        return loss_of(logit_S.log_softmax(0)[pair_Q2][:, :, None], opponent.log()[pair_Q2][:, :, None], 2.0)

    found = minimise(loss, opponent.log()).softmax(0)
    expected = opponent * (data / opponent).sqrt()
    assert_equal(found, expected / expected.sum(), 1e-6)


# The same law through the kernels that a run uses: real trajectories are teacher-forced, the opponent's are drawn.


def middle_of_the_schedule() -> StepConstants:
    """Two scored steps of the SD schedule and the unscored last one."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - beta, 0)
    return make_schedule(alpha_bar, torch.tensor([800, 600, 400]), kernel="ddim", eta=1.0, last_step="unscored")


def test_a_policy_that_paints_one_image_moves_towards_the_real_one_by_its_gap_over_lambda() -> None:
    """The network predicts the image m whatever it sees: its law is that of teacher forcing by m. All states start
    from the same law, so the trajectories differ in their steps alone."""
    constants, real_image, painted, spin_lambda = middle_of_the_schedule(), tensor(0.9), tensor(-0.1), 2.0
    point_G2N = all_groups(SIX_POINTS, 2).reshape(-1, 2, 2)
    num_pairs = len(point_G2N)
    step_of = [constants.at(torch.full((2 * num_pairs,), step)) for step in range(3)]
    noise_TN = [*point_G2N.flatten(0, 1).unbind(1), torch.zeros(2 * num_pairs, dtype=torch.float64)]
    teacher_N = torch.stack([real_image, painted], dim=1).expand(num_pairs, 2).reshape(-1, 1, 1, 1)
    states = [torch.zeros_like(teacher_N)]
    for at, noise_N in zip(step_of, noise_TN, strict=True):
        drawn = teacher_forced_transition(
            states[-1], teacher_N, at, noise_NCHW=noise_N.view(-1, 1, 1, 1), wire_dtype=torch.float64
        )
        states.append(drawn.next_state_NCHW)
    assert torch.equal(states[-1], teacher_N)

    def log_prob(image: Tensor) -> Tensor:
        output = image.expand(2 * num_pairs).view(-1, 1, 1, 1)
        scored = [
            transition(state, output, at, prediction_type="sample", next_state_NCHW=next_state).log_prob_N
            for state, next_state, at in zip(states, states[1:], step_of, strict=False)
        ]
        return torch.stack(scored, dim=1).view(num_pairs, 2, 3)

    def loss(image: Tensor) -> Tensor:
        value, _ = spin_exact(
            log_prob(image),
            log_prob(painted),
            constants.scored_N,
            spin_lambda=spin_lambda,
            normaliser=num_pairs,
        )
        return value

    assert minimise(loss, painted).item() == pytest.approx(-0.1 + 1.0 / spin_lambda, abs=0.02)


# S-T12: Jensen.


def random_trajectories(num_steps: int) -> tuple[LinearChain, Tensor, Tensor, Tensor]:
    """A chain with memory, shifts of theta and of the opponent, and 32 pairs of trajectories, the data's first."""
    generator = torch.Generator().manual_seed(num_steps)
    shift_3T = torch.randn(3, num_steps, generator=generator, dtype=torch.float64)
    chain = LinearChain(decay_T=(0.9, 0.7, 1.1, 0.8)[:num_steps], sigma_T=(1.2, 0.6, 0.9, 0.4)[:num_steps])
    noise_Q2T = torch.randn(32, 2, num_steps, generator=generator, dtype=torch.float64)
    return chain, shift_3T[0], shift_3T[2], play(chain, shift_3T[1], shift_3T[2], noise_Q2T)


def exact_losses(chain: LinearChain, shift_T: Tensor, opponent_T: Tensor, states_Q2S: Tensor) -> Tensor:
    """The exact loss of each pair by itself, (Q,), at lambda 0.5."""
    pairs = zip(chain.log_prob(shift_T, states_Q2S), chain.log_prob(opponent_T, states_Q2S), strict=True)
    return torch.stack([loss_of(log_prob[None], opponent[None], 0.5) for log_prob, opponent in pairs])


def test_the_approximate_form_averaged_over_steps_bounds_the_exact_one_for_every_pair() -> None:
    chain, shift_T, opponent_T, states_Q2S = random_trajectories(num_steps=4)
    bound_Q = approximate_losses(chain, shift_T, opponent_T, states_Q2S, 0.5).mean(1)
    exact_Q = exact_losses(chain, shift_T, opponent_T, states_Q2S)
    assert (bound_Q > exact_Q).all()
    assert exact_Q.std() > 0.1


def test_with_one_step_the_approximate_form_is_the_exact_one() -> None:
    chain, shift_T, opponent_T, states_Q2S = random_trajectories(num_steps=1)
    approximate_Q = approximate_losses(chain, shift_T, opponent_T, states_Q2S, 0.5)[:, 0]
    assert_equal(approximate_Q, exact_losses(chain, shift_T, opponent_T, states_Q2S), 1e-12)


# Degenerate inputs.


def test_a_real_trajectory_that_is_the_generated_one_costs_ln_2_and_pulls_at_no_weight() -> None:
    shift_T = tensor(0.3, -0.2).requires_grad_()
    chain = LinearChain(decay_T=(0.9, 0.8), sigma_T=(1.0, 0.5))
    states_12S = tensor([[0.1, 0.7, -0.4]]).expand(1, 2, 3)
    loss = loss_of(chain.log_prob(shift_T, states_12S), chain.log_prob(tensor(0.0, 0.0), states_12S), 2.0)
    (gradient_T,) = torch.autograd.grad(loss, shift_T)
    assert loss.item() == pytest.approx(LN_2, abs=1e-15)
    assert torch.equal(gradient_T, torch.zeros_like(gradient_T))


def test_a_rank_without_pairs_costs_exactly_nothing() -> None:
    empty = torch.zeros(0, 2, 4, dtype=torch.float64)
    outcome = evaluate(empty, empty, normaliser=5)
    assert outcome.loss == 0
    assert outcome.gradient_Q2T.shape == empty.shape
    assert all(torch.equal(metric, torch.zeros(2, dtype=torch.float64)) for metric in outcome.metrics.values())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_pair_told_apart_beyond_doubt_has_a_finite_loss_and_gradient(sign: int) -> None:
    log_prob = tensor([[1e4 * sign], [-1e4 * sign]])
    outcome = evaluate(log_prob, torch.zeros_like(log_prob), spin_lambda=1.0)
    assert outcome.loss.item() == (0 if sign == 1 else 2e4)
    assert_equal(outcome.gradient_Q2T.flatten(), tensor(0, 0) if sign == 1 else tensor(-1, 1), 0)


def test_a_deterministic_sampler_is_refused() -> None:
    log_prob, opponent = random_pairs()
    with pytest.raises(ValueError, match="a deterministic sampler has none"):
        evaluate(log_prob, opponent, torch.zeros(4, dtype=torch.bool))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_opponent_is_refused(value: float) -> None:
    log_prob, opponent = random_pairs()
    opponent[1, 0, 2] = value
    with pytest.raises(ValueError, match="non-finite opponent"):
        evaluate(log_prob, opponent)


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    log_prob, opponent = random_pairs()
    with pytest.raises(ValueError, match="needs log-probabilities of shape"):
        evaluate(log_prob[:, :1], opponent[:, :1])
    with pytest.raises(ValueError, match="needs opponent log-probabilities of shape"):
        evaluate(log_prob, opponent[:1])
    with pytest.raises(ValueError, match="needs log-probabilities of shape"):
        evaluate(log_prob, opponent, torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("item", list(itertools.product(range(2), range(4))))
def test_a_better_scored_step_of_the_real_trajectory_lowers_the_loss_and_of_the_generated_one_raises_it(
    item: tuple[int, int],
) -> None:
    log_prob, opponent = random_pairs(pairs=1)
    moved = log_prob.clone()
    moved[0, item[0], item[1]] += 0.1
    difference = evaluate(moved, opponent).loss - evaluate(log_prob, opponent).loss
    assert difference < 0 if item[0] == 0 else difference > 0
