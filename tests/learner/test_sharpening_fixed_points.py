"""Which way Diffusion-Sharpening pushes a calibrated model, and where it comes to rest: D9, D10, D12.

One-dimensional data N(0, s^2) and a linear denoiser, whose excursions and losses are the production code's. The
reward grows with x. m_n and v_n are mean and variance of the largest of n standard normal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.excursion import Network, Start, Visited, excursion_schedule, walk
from diffusion.kernels import transition
from diffusion.process import VariancePreserving
from diffusion.schedules import make_schedule, noise_level
from learner.algorithms.sharpening import Selection, sharpening_rlhf, sharpening_select, sharpening_sft
from protocol.algorithms import Excursion
from protocol.seeds import Purpose, draw_uniform

ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
PROCESS = VariancePreserving(ALPHA_BAR)
LARGEST_MEAN = {1: 0.0, 2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi), 8: 1.42360}
"""m_n."""
LARGEST_VARIANCE = {1: 1.0, 3: 0.55947, 8: 0.37290}
"""v_n."""
BETA = 1.0


@dataclass(frozen=True)
class Variant:
    """What the candidates of a group share, what is selected on, and the loss."""

    loss: str
    images: str
    """`own`: an image each; `one`: one for all; `coupled`: each made of its own noise."""
    noise: str
    """`fresh`: a noise each; `shared`: one for all."""
    select_on: str = "path_mean"
    selection: str = "best"


def levels(timestep: int) -> tuple[float, float]:
    """A and S."""
    level = noise_level(ALPHA_BAR, torch.tensor(timestep))
    return level.signal_N.item(), level.noise_N.item()


def calibrated(spread: float) -> Network:
    """E[eps | x], for data N(0, spread^2)."""

    def network(state: Tensor, timestep: Tensor) -> Tensor:
        level = noise_level(ALPHA_BAR, timestep.view(-1, 1, 1, 1))
        return level.noise_N / (level.signal_N**2 * spread**2 + level.noise_N**2) * state

    return network


def draw(variant: Variant, num_groups: int, group_size: int, spread: float) -> tuple[Tensor, Tensor]:
    """Images and noises of all candidates, (P, G) each."""
    generator = torch.Generator().manual_seed(0)
    noise, own, one = torch.randn((3, num_groups, group_size), generator=generator, dtype=torch.float64)
    if variant.noise == "shared":
        noise = noise[:, :1].expand_as(noise)
    if variant.images == "coupled":
        return spread * noise, noise
    return spread * (own if variant.images == "own" else one[:, :1].expand_as(one)), noise


def visit(network: Network, x0_PG: Tensor, noise_PG: Tensor, timestep: int, num_states: int = 1) -> Visited:
    """The excursions of all candidates of all groups in one batch."""
    start = Start(timestep, x0_PG.reshape(-1, 1, 1, 1), noise_PG.reshape(-1, 1, 1, 1))
    schedule = excursion_schedule(PROCESS, timestep, Excursion(noise="fresh", num_states=num_states))
    step_noise = torch.zeros(len(schedule), *start.x0_GCHW.shape, dtype=torch.float64)
    return walk(network, start, schedule, step_noise, prediction_type="epsilon", wire_dtype=torch.float64)


def choose(variant: Variant, visited: Visited, x0_PG: Tensor, reward: Callable[[Tensor], Tensor]) -> Selection:
    """Selection by rewards of the predicted and of the clean images."""
    num_groups = len(x0_PG)
    rewards_PGM = reward(visited.x0hat_GMCHW.view(*x0_PG.shape, -1))
    draws = [0.0] * num_groups
    if variant.selection == "random":
        draws = [draw_uniform(0, Purpose.SELECTION, group) for group in range(num_groups)]
    return sharpening_select(
        rewards_PGM,
        reward(x0_PG),
        torch.ones(num_groups, rewards_PGM.shape[2], dtype=torch.bool),
        select_on=variant.select_on,
        selection=variant.selection,
        draws_P=torch.tensor(draws, dtype=torch.float64),
    )


def loss_of(variant: Variant, error_PGM: Tensor, selection: Selection) -> Tensor:
    """The production loss with theta at the reference; `plain` is regression on all candidates."""
    num_groups = len(error_PGM)
    weight_PM = torch.ones(num_groups, error_PGM.shape[2], dtype=torch.float64)
    everyone = torch.ones(num_groups, dtype=torch.bool)
    groups = torch.arange(num_groups)
    if variant.loss == "plain":
        siblings = [sharpening_sft(e, weight_PM, everyone, normaliser=num_groups)[0] for e in error_PGM.unbind(1)]
        return sum(siblings) / len(siblings)
    best_PM, worst_PM = error_PGM[groups, selection.best_P], error_PGM[groups, selection.worst_P]
    if variant.loss == "sft":
        return sharpening_sft(best_PM, weight_PM, everyone, normaliser=num_groups)[0]
    error_P2M = torch.stack([best_PM, worst_PM], dim=1)
    frozen = (error_P2M.detach(), weight_PM, selection.reward_P2, selection.usable_P)
    return sharpening_rlhf(error_P2M, *frozen, beta=BETA, margin="none", normaliser=num_groups)[0]


def bias_slopes(
    variant: Variant,
    timestep: int,
    *,
    spread: float = 1.0,
    group_size: int = 3,
    num_groups: int = 20_000,
    num_states: int = 1,
    reward: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Each group's dL/db, (P,): b is added to the predicted noise, so that the reward rises where b falls."""
    network = calibrated(spread)
    x0_PG, noise_PG = draw(variant, num_groups, group_size, spread)
    visited = visit(network, x0_PG, noise_PG, timestep, num_states)
    predicted = network(visited.states_GMCHW.flatten(0, 1), visited.timestep_M.repeat(num_groups * group_size))
    bias_P = torch.zeros(num_groups, dtype=torch.float64, requires_grad=True)
    error_PGM = (predicted.view(*x0_PG.shape, -1) + bias_P[:, None, None] - noise_PG[:, :, None]).square()
    loss = loss_of(variant, error_PGM, choose(variant, visited, x0_PG, reward))
    return num_groups * torch.autograd.grad(loss, bias_P)[0]


def assert_mean(values_P: Tensor, expected: float) -> None:
    """The mean within four standard errors."""
    standard_error = values_P.std().item() / len(values_P) ** 0.5
    assert values_P.mean().item() == pytest.approx(expected, abs=4 * standard_error + 1e-12)


# D9: the sign table. Winner minus loser of an RLHF pair, or twice the winner of SFT, in units of 2 m_n: (image, noise).

SHARED = Variant("rlhf", "own", "shared")
COUPLED = Variant("rlhf", "coupled", "fresh")
FRESH = Variant("rlhf", "own", "fresh")
SFT = Variant("sft", "one", "fresh")
SIGN_TABLE = {
    "rlhf_shared_path": (SHARED, 1, 0),
    "rlhf_coupled_path": (COUPLED, 1, 1),
    "rlhf_fresh_path": (FRESH, 0, 0),
    "rlhf_shared_clean": (Variant("rlhf", "own", "shared", "final_x0"), 1, 0),
    "rlhf_fresh_clean": (Variant("rlhf", "own", "fresh", "final_x0"), 1, 0),
    "rlhf_coupled_clean": (Variant("rlhf", "coupled", "fresh", "final_x0"), 1, 1),
    "rlhf_shared_random": (Variant("rlhf", "own", "shared", selection="random"), 0, 0),
    "sft_one_image": (SFT, 0, 1),
    "sft_an_image_each": (Variant("sft", "own", "fresh"), 0, 0),
    "sft_random": (Variant("sft", "one", "fresh", selection="random"), 0, 0),
    "best_of_n": (Variant("sft", "own", "fresh", "final_x0"), 1, 0),
}


def expected_slope(timestep: int, image: float, noise: float, *, spread: float = 1.0, group_size: int = 3) -> float:
    """beta A (S E[d x_0] - A s^2 E[d eps]) / V; at beta 1 the same for SFT, whose slope is 2 (eps_theta - eps)."""
    signal, sigma = levels(timestep)
    variance = signal**2 * spread**2 + sigma**2
    push = sigma * spread * image - signal * spread**2 * noise
    return 2 * LARGEST_MEAN[group_size] * signal * push / variance


@pytest.mark.parametrize("timestep", [41, 201, 801])
@pytest.mark.parametrize("name", SIGN_TABLE)
def test_the_push_on_a_calibrated_model_is_that_of_the_sign_table(name: str, timestep: int) -> None:
    variant, image, noise = SIGN_TABLE[name]
    assert_mean(bias_slopes(variant, timestep), expected_slope(timestep, image, noise))


@pytest.mark.parametrize("group_size", [2, 8])
@pytest.mark.parametrize("name", ["rlhf_shared_path", "sft_one_image"])
def test_larger_groups_push_harder_the_same_way(name: str, group_size: int) -> None:
    variant, image, noise = SIGN_TABLE[name]
    slopes = bias_slopes(variant, 201, group_size=group_size, spread=0.7)
    assert_mean(slopes, expected_slope(201, image, noise, group_size=group_size, spread=0.7))


def test_the_formula_has_the_published_numbers() -> None:
    published = {
        "rlhf_shared_path": 0.731,
        "rlhf_coupled_path": -0.542,
        "rlhf_fresh_path": 0.0,
        "rlhf_fresh_clean": 0.731,
        "sft_one_image": -1.273,
    }
    for name, number in published.items():
        _, image, noise = SIGN_TABLE[name]
        assert expected_slope(201, image, noise) == pytest.approx(number, abs=5e-4)


@pytest.mark.parametrize("timestep", [41, 201, 801])
def test_coupled_noise_changes_sign_where_the_signal_outweighs_the_noise(timestep: int) -> None:
    """Up where S > A s, down where S < A s, and at S = A s every error is 0."""
    signal, sigma = levels(timestep)
    turn = sigma / signal
    low, at, high = (bias_slopes(COUPLED, timestep, spread=spread) for spread in (0.8 * turn, turn, 1.25 * turn))
    assert low.min() > 0
    assert high.max() < 0
    assert at.abs().max() < 1e-12


@pytest.mark.parametrize("name", SIGN_TABLE)
def test_with_the_reward_negated_the_push_turns_around(name: str) -> None:
    variant, image, noise = SIGN_TABLE[name]
    assert_mean(bias_slopes(variant, 201, reward=lambda x: -x), -expected_slope(201, image, noise))


@pytest.mark.parametrize("timestep", [41, 201, 801])
def test_three_states_leave_the_signs_of_the_default_and_of_sft(timestep: int) -> None:
    for variant, sign in ((SHARED, 1), (SFT, -1)):
        slopes = sign * bias_slopes(variant, timestep, num_states=3)
        assert slopes.mean() > 4 * slopes.std() / len(slopes) ** 0.5


def test_selected_candidates_have_a_smaller_error_though_nothing_was_learnt() -> None:
    """The bias of a loss curve that shows the selected (4.6): a reward that prefers easy noise."""
    x0_PG, noise_PG = draw(SFT, 20_000, 8, 1.0)
    visited = visit(calibrated(1.0), x0_PG, noise_PG, 201)
    predicted = calibrated(1.0)(visited.states_GMCHW[:, 0], visited.timestep_M)
    error_PGM = (predicted.view_as(noise_PG) - noise_PG).square()[..., None]
    selection = sharpening_select(
        -error_PGM,
        None,
        torch.ones(len(x0_PG), 1, dtype=torch.bool),
        select_on="path_mean",
        selection="best",
        draws_P=torch.zeros(len(x0_PG)),
    )
    assert loss_of(SFT, error_PGM, selection) < loss_of(Variant("plain", "one", "fresh"), error_PGM, selection) / 2


# D12: the control.


@pytest.mark.parametrize("timestep", [41, 801])
def test_random_selection_is_plain_regression_over_several_states_in_expectation(timestep: int) -> None:
    """Biases of the size of 1 make both gradients differ from 0."""

    def shifted(state: Tensor, timestep: Tensor) -> Tensor:
        return calibrated(1.0)(state, timestep) + 0.8

    x0_PG, noise_PG = draw(SFT, 4000, 3, 1.0)
    visited = visit(shifted, x0_PG, noise_PG, timestep, num_states=3)
    predicted = shifted(visited.states_GMCHW.flatten(0, 1), visited.timestep_M.repeat(x0_PG.numel()))
    slope_P = {}
    for loss, selection in (("sft", "random"), ("plain", "best")):
        bias_P = torch.zeros(len(x0_PG), dtype=torch.float64, requires_grad=True)
        error_PGM = (predicted.view(*x0_PG.shape, -1) + bias_P[:, None, None] - noise_PG[:, :, None]).square()
        variant = Variant(loss, "one", "fresh", selection=selection)
        total = loss_of(variant, error_PGM, choose(variant, visited, x0_PG, lambda x: x))
        slope_P[loss] = len(x0_PG) * torch.autograd.grad(total, bias_P)[0]
    assert slope_P["plain"].mean() > 1
    assert_mean(slope_P["sft"] - slope_P["plain"], 0.0)


# D10: where training comes to rest.

TIMESTEPS = torch.arange(25).flip(0) * 40 + 1
BEST_OF_N = SIGN_TABLE["best_of_n"][0]
SPREAD = 1.0


def train(variant: Variant, group_size: int, rollout: Network) -> Network:
    """Returns a denoiser that is a line in x at each timestep, trained to convergence on a network's excursions.

    The loss is a parabola in the line, so that one Newton step is convergence.
    """
    x0_PG, noise_PG = draw(variant, 10_000, group_size, SPREAD)
    lines = {}
    for timestep in TIMESTEPS.tolist():
        visited = visit(rollout, x0_PG, noise_PG, timestep)
        selection, state_PG = choose(variant, visited, x0_PG, lambda x: x), visited.states_GMCHW.view_as(x0_PG)

        def loss(line: Tensor, state_PG: Tensor = state_PG, selection: Selection = selection) -> Tensor:
            error_PG = (line[0] * state_PG + line[1] - noise_PG).square()
            return loss_of(variant, error_PG[..., None], selection)

        origin = torch.zeros(2, dtype=torch.float64)
        curvature = torch.autograd.functional.hessian(loss, origin)
        lines[timestep] = -torch.linalg.solve(curvature, torch.autograd.functional.jacobian(loss, origin))
    return lambda state, timestep: lines[int(timestep[0])][0] * state + lines[int(timestep[0])][1]


def sample_mean(network: Network, prediction_type: Any = "epsilon") -> float:
    """Mean of what 25 steps of DDIM make of standard normal noise: the image of 0, for every step is a line."""
    schedule = make_schedule(ALPHA_BAR, TIMESTEPS, kernel="ddim", eta=0.0, last_step="unscored")
    state = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for step in range(len(schedule)):
        at = schedule.at(torch.tensor([step]))
        drawn = transition(
            state,
            network(state, at.timestep_N),
            at,
            prediction_type=prediction_type,
            noise_NCHW=torch.zeros_like(state),
            wire_dtype=torch.float64,
        )
        state = drawn.next_state_NCHW
    return state.item()


def sharpened(group_size: int) -> Network:
    """SFT-DS's fixed point: x0_hat = A s^2 (x - S m_n) / (A^2 s^2 + S^2 v_n)."""

    def clean(state: Tensor, timestep: Tensor) -> Tensor:
        (signal, sigma), variance = levels(int(timestep[0])), SPREAD**2
        shifted = state - sigma * LARGEST_MEAN[group_size]
        return signal * variance * shifted / (signal**2 * variance + sigma**2 * LARGEST_VARIANCE[group_size])

    return clean


def best_images(group_size: int) -> Network:
    """E[x_0 | x] for images of mean s m_n and variance s^2 v_n."""

    def clean(state: Tensor, timestep: Tensor) -> Tensor:
        signal, sigma = levels(int(timestep[0]))
        mean, variance = SPREAD * LARGEST_MEAN[group_size], SPREAD**2 * LARGEST_VARIANCE[group_size]
        return mean + signal * variance * (state - signal * mean) / (signal**2 * variance + sigma**2)

    return clean


@pytest.mark.parametrize("group_size", [3, 8])
def test_trained_on_its_best_candidates_the_model_samples_the_unrewarded_side(group_size: int) -> None:
    reached = sample_mean(train(SFT, group_size, calibrated(SPREAD)))
    assert reached == pytest.approx(sample_mean(sharpened(group_size), "sample"), abs=0.05)
    assert reached < -0.5


@pytest.mark.parametrize("group_size", [3, 8])
def test_trained_on_its_best_images_the_model_samples_the_rewarded_side(group_size: int) -> None:
    reached = sample_mean(train(BEST_OF_N, group_size, calibrated(SPREAD)))
    assert reached == pytest.approx(sample_mean(best_images(group_size), "sample"), abs=0.05)
    assert reached > 0.5


@pytest.mark.parametrize("variant", [SFT, BEST_OF_N])
def test_trained_on_lone_candidates_the_model_stays(variant: Variant) -> None:
    assert sample_mean(train(variant, 1, calibrated(SPREAD))) == pytest.approx(0, abs=0.05)


def test_larger_groups_end_further_on_the_same_side() -> None:
    assert sample_mean(sharpened(8), "sample") < sample_mean(sharpened(3), "sample") < 0
    assert sample_mean(best_images(8), "sample") > sample_mean(best_images(3), "sample") > 0


def test_where_training_came_to_rest_the_models_own_excursions_leave_it() -> None:
    """The order of the candidates' scores is that of their noises, whoever predicts."""
    once = train(SFT, 3, calibrated(SPREAD))
    assert sample_mean(train(SFT, 3, once)) == pytest.approx(sample_mean(once), abs=1e-9)
