"""Excursions: which states are visited, from which draws: D4, D8, D11, the model's part of D13, and D14."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.chain import Chain
from diffusion.excursion import Network, Start, Visited, draw_start, excursion, excursion_schedule, walk, walk_again
from diffusion.kernels import PredictionType, predicted_noise_and_clean
from diffusion.noise import initial_noise, step_noise
from diffusion.policy import Policy
from diffusion.process import VariancePreserving
from protocol.algorithms import Excursion
from protocol.recipe import Lora, Sampler
from protocol.tickets import Source, TicketPlan

SHAPE = (4, 8, 8)
SEEDS = (11, 12, 13)
PROMPT = "a red seven"
SCHEDULER = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
ALPHA_BAR = SCHEDULER.alphas_cumprod.double()
PROCESS = VariancePreserving(ALPHA_BAR)


def settings(**changes: Any) -> Excursion:
    """The settings of an excursion, noise fresh unless given."""
    return Excursion(**{"noise": "fresh", **changes})


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start_at(timestep: int, num_candidates: int = 3) -> Start:
    """A start with other latents and other noise for every candidate, fp64."""
    return Start(timestep, normal(num_candidates, *SHAPE, seed=1), normal(num_candidates, *SHAPE, seed=2))


def run(
    network: Network,
    start: Start,
    *,
    prediction_type: PredictionType = "epsilon",
    step_noise_MGCHW: Tensor | None = None,
    wire_dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> Visited:
    """An excursion of a network that is a function, without rounding unless asked."""
    schedule = excursion_schedule(PROCESS, start.timestep, settings(**changes))
    if step_noise_MGCHW is None:
        step_noise_MGCHW = torch.zeros(len(schedule), *start.x0_GCHW.shape)
    return walk(network, start, schedule, step_noise_MGCHW, prediction_type=prediction_type, wire_dtype=wire_dtype)


def some_network(state: Tensor, timestep: Tensor) -> Tensor:
    """A function of state and timestep that is neither linear nor a good denoiser."""
    return torch.sin(2 * state) + 0.3 * state.roll(1, -1) + timestep.view(-1, 1, 1, 1) / 1000


def make_policy(source: str) -> Policy:
    """The tiny model, its adapters moved away from the base."""
    policy = Policy(source, trainable=Lora(rank=2, alpha=2.0), seed=0)
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.trainable_state().values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.fixture(scope="module")
def policy(tiny_model: str) -> Policy:
    """A trained policy that predicts noise."""
    return make_policy(tiny_model)


@pytest.fixture(scope="module")
def velocity_policy(tiny_velocity_model: str) -> Policy:
    """A trained policy that predicts v."""
    return make_policy(tiny_velocity_model)


def make_chain(policy: Policy, **sampler: Any) -> Chain:
    """A chain of four steps."""
    return Chain(policy, Sampler(**{"num_steps": 4, **sampler}))


# D8: the timesteps.


@pytest.mark.parametrize(
    ("first", "timesteps"),
    [(0, [0]), (39, [39]), (40, [40, 0]), (79, [79, 39]), (80, [80, 40, 0]), (999, [999, 959, 919])],
)
def test_an_excursion_of_stride_40_has_as_many_states_as_fit(first: int, timesteps: list[int]) -> None:
    assert excursion_schedule(PROCESS, first, settings()).timestep_N.tolist() == timesteps


@given(st.integers(0, 999), st.integers(1, 30), st.integers(1, 200))
def test_timesteps_fall_by_the_stride_and_never_below_zero(first: int, num_states: int, stride: int) -> None:
    wanted = settings(num_states=num_states, stride=stride)
    timesteps = excursion_schedule(PROCESS, first, wanted).timestep_N.tolist()
    assert timesteps[0] == first
    assert timesteps == list(range(first, first - stride * len(timesteps), -stride))
    assert timesteps[-1] >= 0
    assert len(timesteps) == num_states or timesteps[-1] < stride


@pytest.mark.parametrize("first", [-1, 1000])
def test_a_timestep_outside_of_training_is_refused(first: int) -> None:
    with pytest.raises(ValueError, match="cannot start at timestep"):
        excursion_schedule(PROCESS, first, settings())


# The states.


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_states_and_clean_latents_are_those_of_the_diffusers_sampler(
    prediction_type: PredictionType, eta: float
) -> None:
    start, noise = start_at(613), normal(3, 3, *SHAPE, seed=4)
    visited = run(some_network, start, prediction_type=prediction_type, step_noise_MGCHW=noise, eta=eta)
    theirs = DDIMScheduler.from_config(SCHEDULER.config, prediction_type=prediction_type)
    theirs.set_timesteps(25)
    state = theirs.add_noise(start.x0_GCHW, start.noise_GCHW, torch.tensor([613]))
    for index, timestep in enumerate([613, 573, 533]):
        assert visited.timestep_M[index] == timestep
        torch.testing.assert_close(visited.states_GMCHW[:, index], state, rtol=1e-5, atol=1e-5)
        output = some_network(state, torch.full((3,), timestep))
        step = theirs.step(output, timestep, state, eta=eta, variance_noise=noise[index] if eta else None)
        clean = visited.x0hat_GMCHW[:, index]
        torch.testing.assert_close(clean, step.pred_original_sample, rtol=1e-5, atol=1e-5)
        state = step.prev_sample


def test_without_eta_noise_between_states_has_no_effect() -> None:
    quiet, loud = (
        run(some_network, start_at(500), step_noise_MGCHW=scale * normal(3, 3, *SHAPE, seed=4)) for scale in (0, 100)
    )
    assert torch.equal(quiet.states_GMCHW, loud.states_GMCHW)
    assert torch.equal(quiet.x0hat_GMCHW, loud.x0hat_GMCHW)


@pytest.mark.parametrize("first", [3, 60, 201, 999])
def test_an_oracles_states_lie_on_the_line_from_image_to_noise_and_have_no_error(first: int) -> None:
    """D4, and of D13 that the oracle's clean latents are the image's own, so any reward of them is too."""
    start = start_at(first)
    visited = run(lambda state, timestep: start.noise_GCHW, start)
    for index, timestep in enumerate(visited.timestep_M.tolist()):
        line = ALPHA_BAR[timestep].sqrt() * start.x0_GCHW + (1 - ALPHA_BAR[timestep]).sqrt() * start.noise_GCHW
        torch.testing.assert_close(visited.states_GMCHW[:, index], line, rtol=0, atol=1e-9)
        torch.testing.assert_close(visited.x0hat_GMCHW[:, index], start.x0_GCHW, rtol=0, atol=1e-9)


def test_an_oracle_of_velocity_finds_the_same_image() -> None:
    start = start_at(700)

    def velocity(state: Tensor, timestep: Tensor) -> Tensor:
        level = ALPHA_BAR[timestep].view(-1, 1, 1, 1)
        return level.sqrt() * start.noise_GCHW - (1 - level).sqrt() * start.x0_GCHW

    visited = run(velocity, start, prediction_type="v_prediction")
    torch.testing.assert_close(visited.x0hat_GMCHW, start.x0_GCHW[:, None].expand(3, 3, *SHAPE), rtol=0, atol=1e-9)


@pytest.mark.parametrize("wire_dtype", [torch.float16, torch.bfloat16])
def test_what_arrives_over_the_wire_is_what_was_visited(wire_dtype: torch.dtype) -> None:
    """The first state is made of the rounded start, and the network is asked at the rounded states."""
    start = start_at(613)
    asked: list[Tensor] = []

    def network(state: Tensor, timestep: Tensor) -> Tensor:
        asked.append(state)
        return some_network(state, timestep)

    visited = run(network, start, wire_dtype=wire_dtype)
    assert visited.states_GMCHW.dtype == wire_dtype
    assert torch.equal(torch.stack(asked, dim=1), visited.states_GMCHW.double())
    arrived = Start(613, start.x0_GCHW.to(wire_dtype).double(), start.noise_GCHW.to(wire_dtype).double())
    assert torch.equal(run(some_network, arrived, wire_dtype=wire_dtype).states_GMCHW, visited.states_GMCHW)
    assert not torch.equal(run(some_network, start).states_GMCHW, visited.states_GMCHW.double())


# The states, visited again with a graph.


def again(network: Network, visited: Visited, prediction_type: PredictionType = "epsilon") -> tuple[Tensor, Tensor]:
    """The walk from the same first states, in fp64 but for the wire."""
    states_GMCHW, wire_dtype = visited.states_GMCHW.double(), visited.states_GMCHW.dtype
    timestep_GM = visited.timestep_M.expand(len(states_GMCHW), -1)
    return walk_again(
        network, states_GMCHW[:, 0], timestep_GM, PROCESS, prediction_type=prediction_type, wire_dtype=wire_dtype
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("first", [999, 613, 90])
def test_who_walked_visits_the_very_states_again(prediction_type: PredictionType, first: int) -> None:
    visited = run(some_network, start_at(first), prediction_type=prediction_type, wire_dtype=torch.float16)
    states, _ = again(some_network, visited, prediction_type)
    assert torch.equal(states, visited.states_GMCHW.double())
    exact = run(some_network, start_at(first), prediction_type=prediction_type)
    torch.testing.assert_close(again(some_network, exact, prediction_type)[0], exact.states_GMCHW, rtol=1e-12, atol=0)


def test_each_candidate_goes_to_timesteps_of_its_own() -> None:
    walks = [run(some_network, start_at(first)) for first in (613, 90)]
    states_NMCHW = torch.cat([visited.states_GMCHW for visited in walks])
    timestep_NM = torch.cat([visited.timestep_M.expand(3, -1) for visited in walks])
    together, _ = walk_again(
        some_network,
        states_NMCHW[:, 0],
        timestep_NM,
        PROCESS,
        prediction_type="epsilon",
        wire_dtype=torch.float64,
    )
    torch.testing.assert_close(together, states_NMCHW, rtol=1e-12, atol=0)


def scaled(weight: Tensor) -> Network:
    """A network of one weight."""
    return lambda state, timestep: weight * some_network(state, timestep)


def gradient_of_errors(noise_NMCHW: Tensor, weight: Tensor, loss_scale: float = 1.0) -> float:
    """The derivative of the sum of errors against 0, each state's weighted by its place."""
    places = torch.arange(1, noise_NMCHW.shape[1] + 1, dtype=noise_NMCHW.dtype)
    loss = loss_scale * (noise_NMCHW.square().flatten(2).mean(2) * places).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    return gradient.item() / loss_scale


def test_the_gradient_goes_through_every_step_as_through_the_walks_own() -> None:
    """D7, of the released code: by autograd and by a difference quotient."""
    weight, start = torch.tensor(0.8, dtype=torch.float64, requires_grad=True), start_at(613)
    asked: list[Tensor] = []

    def network(state: Tensor, timestep: Tensor) -> Tensor:
        asked.append(scaled(weight)(state, timestep))
        return asked[-1]

    visited = run(network, start)
    expected = gradient_of_errors(torch.stack(asked, dim=1), weight)
    first = Visited(visited.states_GMCHW.detach(), visited.timestep_M, visited.x0hat_GMCHW)
    assert gradient_of_errors(again(scaled(weight), first)[1], weight) == pytest.approx(expected, rel=1e-9)
    states = zip(first.states_GMCHW.unbind(1), first.timestep_M, strict=True)
    detached = torch.stack([scaled(weight)(state, timestep) for state, timestep in states], dim=1)
    assert gradient_of_errors(detached, weight) != pytest.approx(expected, rel=0.01)


def test_of_one_state_there_is_no_step_to_go_through() -> None:
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    visited = run(some_network, start_at(613), num_states=1)
    direct = scaled(weight)(visited.states_GMCHW[:, 0], visited.timestep_M)[:, None]
    _, walked = again(scaled(weight), visited)
    assert torch.equal(walked, direct)
    assert gradient_of_errors(walked, weight) == gradient_of_errors(direct, weight)


def test_rounding_to_the_wire_lets_the_smallest_gradients_pass() -> None:
    """At 1e-9 a gradient that went through half precision would be 0."""
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    visited = run(some_network, start_at(613), wire_dtype=torch.float16)
    unrounded = Visited(visited.states_GMCHW.double(), visited.timestep_M, visited.x0hat_GMCHW)
    expected = gradient_of_errors(again(scaled(weight), unrounded)[1], weight)
    for scale in (1.0, 1e-9):
        assert gradient_of_errors(again(scaled(weight), visited)[1], weight, scale) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("broken", ["x0_GCHW", "noise_GCHW"])
def test_a_start_that_is_not_finite_is_refused(broken: str) -> None:
    start = start_at(613)
    getattr(start, broken)[1, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        run(some_network, start)


# D11: the draws.


def timesteps_of(num_groups: int, num_rounds: int) -> dict[str, int]:
    """The first timestep of every ticket of a run."""
    plan = TicketPlan(7, (Source.of_prompts(("a", "b")),), num_groups, group_size=1, lag=0)
    x0_GCHW = torch.zeros(1, 1, 1, 1)
    return {
        ticket.ticket_id: draw_start(ticket.seeds_G, x0_GCHW, settings(), num_train_timesteps=1000).timestep
        for round_ in range(num_rounds)
        for ticket in plan.round(round_, "0" * 64)
    }


def test_first_timesteps_are_uniform_over_training() -> None:
    drawn = list(timesteps_of(num_groups=250, num_rounds=8).values())
    counts = [sum(timestep // 100 == tenth for timestep in drawn) for tenth in range(10)]
    expected = len(drawn) / 10
    # The 99.99 % point of chi-square with 9 degrees of freedom.
    assert sum((count - expected) ** 2 / expected for count in counts) < 33.7
    assert min(drawn) < 10
    assert max(drawn) in range(990, 1000)


def test_a_tickets_first_timestep_does_not_depend_on_how_many_tickets_there_are() -> None:
    """Nor, so, on the number of ranks; the largest of several processes' draws has a mean of 889 with eight."""
    assert timesteps_of(4, num_rounds=1).items() < timesteps_of(40, num_rounds=1).items()


def test_fresh_noise_is_each_candidates_own() -> None:
    alone = [draw_start([s], torch.zeros(1, *SHAPE), settings(), num_train_timesteps=1000).noise_GCHW[0] for s in SEEDS]
    together = draw_start(SEEDS, torch.zeros(3, *SHAPE), settings(), num_train_timesteps=1000).noise_GCHW
    assert torch.equal(together, torch.stack(alone))
    assert len(torch.unique(together.flatten(1), dim=0)) == len(SEEDS)


def test_shared_noise_is_the_first_candidates() -> None:
    fresh, shared = (
        draw_start(SEEDS, torch.zeros(3, *SHAPE), settings(noise=noise), num_train_timesteps=1000)
        for noise in ("fresh", "shared")
    )
    assert torch.equal(shared.noise_GCHW, fresh.noise_GCHW[:1].expand(3, *SHAPE))
    assert shared.timestep == fresh.timestep


def test_coupled_noise_is_that_of_the_candidates_own_sample() -> None:
    own_noise, x0_GCHW = normal(3, *SHAPE), torch.zeros(3, *SHAPE)
    start = draw_start(SEEDS, x0_GCHW, settings(noise="coupled"), num_train_timesteps=1000, own_noise_GCHW=own_noise)
    assert torch.equal(start.noise_GCHW, own_noise)
    with pytest.raises(ValueError, match="coupled"):
        draw_start(SEEDS, x0_GCHW, settings(noise="coupled"), num_train_timesteps=1000)


def test_excursions_share_no_noise_with_the_trajectories_of_their_seeds() -> None:
    noise = draw_start(SEEDS, torch.zeros(3, *SHAPE), settings(), num_train_timesteps=1000).noise_GCHW
    sampled = [initial_noise(SEEDS, SHAPE, shared=False), *(step_noise(SEEDS, step, SHAPE) for step in range(4))]
    rows = torch.cat([noise, *sampled]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == len(rows)


# A policy's excursions.


@contextmanager
def counted_evaluations(policy: Policy) -> Iterator[list[int]]:
    """The batch size of every call of the U-Net."""
    calls: list[int] = []
    hook = policy.denoiser.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    yield calls
    hook.remove()


@pytest.mark.parametrize("name", ["policy", "velocity_policy"])
def test_a_policys_clean_latents_are_predicted_at_the_states_it_sends(
    name: str, request: pytest.FixtureRequest
) -> None:
    policy = request.getfixturevalue(name)
    start = Start(613, *(normal(3, *SHAPE, seed=seed).float() for seed in (1, 2)))
    visited = excursion(make_chain(policy, wire_dtype="float16"), PROMPT, SEEDS, start, settings(eta=0.5))
    constants = excursion_schedule(policy.process, start.timestep, settings())
    for index, timestep in enumerate(visited.timestep_M.tolist()):
        state, timestep_G = visited.states_GMCHW[:, index].float(), torch.full((3,), timestep)
        with torch.no_grad():
            output = policy.predict(policy.denoiser, state, timestep_G, policy.condition([PROMPT] * 3), 1.0)
        at = constants.at(torch.full((3,), index))
        clean = predicted_noise_and_clean(state, output, at, policy.prediction_type)[1]
        assert torch.equal(clean, visited.x0hat_GMCHW[:, index])
    assert not visited.x0hat_GMCHW.requires_grad


def test_a_groups_excursion_does_not_depend_on_what_came_before_or_on_global_randomness(policy: Policy) -> None:
    chain, start = make_chain(policy), Start(613, normal(3, *SHAPE).float(), normal(3, *SHAPE, seed=1).float())
    expected = excursion(chain, PROMPT, SEEDS, start, settings(eta=1.0))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    excursion(chain, "a blue one", SEEDS[::-1], start, settings(eta=1.0))
    again = excursion(chain, PROMPT, SEEDS, start, settings(eta=1.0))
    assert torch.equal(again.states_GMCHW, expected.states_GMCHW)
    assert torch.equal(again.x0hat_GMCHW, expected.x0hat_GMCHW)
    assert torch.equal(torch.get_rng_state(), state)


def test_with_eta_candidates_of_one_start_part_at_the_second_state(policy: Policy) -> None:
    same = torch.ones(3, *SHAPE)
    visited = excursion(make_chain(policy), PROMPT, SEEDS, Start(500, same, same), settings(eta=1.0))
    states = visited.states_GMCHW.flatten(2)
    assert [len(torch.unique(states[:, index], dim=0)) for index in range(3)] == [1, 3, 3]


@pytest.mark.parametrize(("first", "num_states"), [(20, 1), (60, 2), (613, 3)])
def test_an_excursion_costs_one_conditional_evaluation_a_state_whatever_the_guidance(
    policy: Policy, first: int, num_states: int
) -> None:
    chain, told = make_chain(policy, guidance_scale=4.0), []
    start = Start(first, torch.ones(3, *SHAPE), torch.ones(3, *SHAPE))
    with counted_evaluations(policy) as calls:
        excursion(chain, PROMPT, SEEDS, start, settings(), after_step=lambda: told.append(len(calls)))
    assert calls == [3] * num_states
    assert told == list(range(1, num_states + 1))


@pytest.mark.parametrize(("guidance_scale", "num_branches"), [(1.0, 1), (4.0, 2)])
def test_a_tuned_models_inference_costs_what_the_bases_does(
    policy: Policy, guidance_scale: float, num_branches: int
) -> None:
    """D14: T steps times the branches of guidance an image, and nothing that excursions were trained with."""
    chain = make_chain(policy, guidance_scale=guidance_scale)
    with counted_evaluations(policy) as tuned:
        chain.sample(PROMPT, SEEDS)
    with policy.reference(policy.denoiser), counted_evaluations(policy) as base:
        chain.sample(PROMPT, SEEDS)
    assert sum(tuned) == sum(base) == 4 * num_branches * len(SEEDS)


def test_an_oracles_images_are_those_of_the_clean_latents(policy: Policy) -> None:
    """D13: what a reward sees of the oracle is the image itself, within a thousandth of its range."""
    start = Start(900, *(normal(3, *SHAPE, seed=seed).float() for seed in (1, 2)))
    visited = run(lambda state, timestep: start.noise_GCHW, start, wire_dtype=torch.float32)
    images = policy.decode(start.x0_GCHW).astype(float)
    assert images.std() > 1
    for index in range(3):
        seen = policy.decode(visited.x0hat_GMCHW[:, index]).astype(float)
        assert abs(seen - images).mean() / 255 < 1e-3
