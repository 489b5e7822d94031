"""What the updater on excursions makes of groups: dropout, states visited again, and errors that selection spares."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.chain import Chain
from diffusion.excursion import draw_start, excursion
from diffusion.kernels import noised
from diffusion.noise import normal
from diffusion.schedules import noise_level
from learner.excursions import with_difference
from learner.probes import ErrorProbe, WalkProbe
from protocol.algorithms import Excursion
from protocol.errors import RecipeError
from protocol.groups import Group
from protocol.recipe import Sampler
from protocol.seeds import Purpose, derive_seed
from tests.learner.updater_bench import SHAPE_CHW, Bench, latents, load, make_group, same, with_arrays

pytestmark = pytest.mark.usefixtures("gang_of_one")

G, M = 3, 3
SFT: dict[str, Any] = {"name": "sharpening_sft", "excursion": {"noise": "fresh"}}
RLHF: dict[str, Any] = {"name": "sharpening_rlhf", "beta_full": 100, "excursion": {"noise": "shared"}}


def excursion_group(model: str, index: int, starts: range = range(100, 1000)) -> Group:
    """A group of the base's own states, whose first candidate scores best and whose last scores worst."""
    chain = Chain(load(model), Sampler(num_steps=3))
    settings = Excursion(noise="fresh", num_states=M)
    x0_GCHW = torch.from_numpy(latents(index, G)).float()
    for number in range(1000):
        seeds = [derive_seed(index, Purpose.SIBLING, number, g) for g in range(G)]
        start = draw_start(seeds, x0_GCHW, settings, num_train_timesteps=1000)
        if start.timestep in starts:
            break
    visited = excursion(chain, "a red seven", seeds, start, settings)
    num_states = len(visited.timestep_M)
    reward_GM = np.repeat(np.array([[0.9], [0.5], [0.1]], np.float32), num_states, axis=1)
    return make_group(
        index,
        target_GCHW=start.noise_GCHW.to(chain.wire_dtype).numpy(),
        states_GMCHW=visited.states_GMCHW.numpy(),
        state_timestep_M=visited.timestep_M.numpy(),
        state_reward_GM=reward_GM,
        reward_G=reward_GM.mean(1),
    )


@pytest.fixture(scope="module")
def groups(tiny_model: str) -> list[Group]:
    """Groups of three states each."""
    return [excursion_group(tiny_model, index) for index in range(4)]


def first_states(group: Group, num_states: int) -> Group:
    """The group as if it had been too near to timestep 0 for more states."""
    cut = {name: group.array(name)[:, :num_states] for name in ("states_GMCHW", "state_reward_GM")}
    return with_arrays(group, state_timestep_M=group.array("state_timestep_M")[:num_states], **cut)


def details_of(bench: Bench, groups: Sequence[Group], round_: int = 0) -> dict[str, float]:
    """What the first step of a round reports."""
    return bench.learn(groups, round_).details[0]


# --- the empty prompt -------------------------------------------------------------------------------------


def with_prompt(group: Group, prompt: str) -> Group:
    """The same states, said to be of another prompt."""
    return make_group(group.index, prompt, **group.arrays)


@pytest.mark.parametrize("settings", [SFT, RLHF], ids=lambda settings: settings["name"])
def test_errors_of_dropped_prompts_are_those_of_the_empty_one(
    tiny_model: str, groups: list[Group], settings: dict[str, Any]
) -> None:
    def trained(dropout: float, prompt: str) -> dict[str, Tensor]:
        bench = Bench(tiny_model, {**settings, "prompt_dropout": dropout})
        bench.move_weights()
        bench.learn([with_prompt(group, prompt) for group in groups], round_=1)
        return bench.weights()

    dropped = trained(1.0, "a red seven")
    assert same(dropped, trained(0.0, ""))
    assert not same(dropped, trained(0.0, "a red seven"))


def test_prompts_are_dropped_by_key_in_every_pass_as_often_as_asked(tiny_model: str, groups: list[Group]) -> None:
    bench = Bench(tiny_model, {**SFT, "prompt_dropout": 0.3})
    updater: Any = bench.updater
    many = [make_group(index, **groups[0].arrays) for index in range(300)]
    passes = [updater._choose(many, update).noised.prompts[:-1] for update in range(2)]
    for prompts in passes:
        # Four standard errors of 300 draws.
        assert 0.3 - 0.106 < prompts.count("") / 300 < 0.3 + 0.106
    assert passes[0] != passes[1]
    assert updater._choose(many[7:9], 0).noised.prompts[:-1] == passes[0][7:9]


# --- states that are visited again ------------------------------------------------------------------------


def probe_values(bench: Bench, groups: Sequence[Group], kind: type[ErrorProbe]) -> tuple[Tensor, Tensor]:
    """Errors of policy and reference, and the gradient of the policy's sum in all trained weights."""
    updater: Any = bench.updater
    probe = updater._probe(updater._choose(groups, 0).noised)
    assert type(probe) is kind
    value_UK = probe(bench.policy.denoiser, torch.arange(len(groups))[:, None])
    trained = list(bench.policy.trainable_state())
    named = dict(bench.policy.denoiser.named_parameters())
    gradients = torch.autograd.grad(value_UK[:, : probe.width].sum(), [named[name] for name in trained])
    return value_UK.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("settings", [SFT, RLHF], ids=lambda settings: settings["name"])
def test_going_through_steps_changes_the_gradient_and_no_error(
    tiny_model: str, groups: list[Group], settings: dict[str, Any]
) -> None:
    """D7: the weights that sampled visit the very states, so that their errors are those of the group's."""
    detached, through = Bench(tiny_model, settings), Bench(tiny_model, {**settings, "backprop_through_steps": True})
    one, gradient = probe_values(detached, groups, ErrorProbe)
    other, whole = probe_values(through, groups, WalkProbe)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    assert (whole - gradient).norm() > 1e-3 * gradient.norm()


def test_of_one_state_there_is_nothing_to_go_through(tiny_model: str, groups: list[Group]) -> None:
    settings = {**SFT, "excursion": {"noise": "fresh", "num_states": 1}}
    short = [first_states(group, 1) for group in groups]
    (one, gradient), (other, whole) = (
        probe_values(Bench(tiny_model, {**settings, "backprop_through_steps": through}), short, kind)
        for through, kind in ((False, ErrorProbe), (True, WalkProbe))
    )
    torch.testing.assert_close(other, one, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole, gradient, rtol=1e-5, atol=1e-8)


def test_the_reference_is_asked_at_the_states_that_the_policy_visits(tiny_model: str, groups: list[Group]) -> None:
    """Weights that are the base's have its errors also where the prompt was dropped and other states are visited."""
    bench = Bench(tiny_model, {**RLHF, "backprop_through_steps": True, "prompt_dropout": 1.0})
    value_U4M, _ = probe_values(bench, groups, WalkProbe)
    policy, reference = value_U4M.chunk(2, dim=1)
    torch.testing.assert_close(policy, reference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", [SFT, RLHF], ids=lambda settings: settings["name"])
def test_a_group_of_fewer_states_trains_through_those_that_it_has(
    tiny_model: str, groups: list[Group], settings: dict[str, Any]
) -> None:
    short = first_states(groups[0], 2)
    bench = Bench(tiny_model, {**settings, "backprop_through_steps": True})
    bench.move_weights()
    report = bench.learn([short], round_=1)
    assert np.isfinite([*report.loss, *report.grad_norm]).all()
    assert report.grad_norm[0] > 0
    assert report.details[0]["sharpening/m_mean"] == 2


def test_another_learners_states_cannot_be_visited_again(tiny_model: str) -> None:
    with pytest.raises(RecipeError, match="another learner's weights"):
        Bench(tiny_model, {**SFT, "backprop_through_steps": True}, follows=True)


# --- metrics ----------------------------------------------------------------------------------------------


def test_starts_and_rewards_by_start_are_told(tiny_model: str, groups: list[Group]) -> None:
    rewards = (0.25, 0.5, 1.0, 2.0)
    starts = [(900, 860, 820), (100, 60, 20), (50, 10), (500, 460, 420)]
    moved = [
        with_arrays(
            first_states(group, len(start)),
            state_timestep_M=np.array(start),
            reward_G=np.full(G, reward, np.float32),
        )
        for group, reward, start in zip(groups, rewards, starts, strict=True)
    ]
    details = details_of(Bench(tiny_model, SFT), moved)
    assert details["sharpening/start_tau_mean"] == np.mean([900, 100, 50, 500])
    assert details["sharpening/reward/tau_quartile_1"] == 0.75
    assert details["sharpening/reward/tau_quartile_3"] == 2.0
    assert details["sharpening/reward/tau_quartile_4"] == 0.25
    assert "sharpening/reward/tau_quartile_2" not in details


@pytest.mark.parametrize("settings", [SFT, RLHF], ids=lambda settings: settings["name"])
def test_the_plain_error_is_that_of_the_first_candidate_that_was_not_selected(
    tiny_model: str, groups: list[Group], settings: dict[str, Any]
) -> None:
    """The first is best, and for RLHF the last is worst."""

    def error_of(number: int) -> float:
        alike = {name: groups[0].array(name)[[number] * G] for name in ("states_GMCHW", "target_GCHW")}
        only = with_arrays(groups[0], **alike)
        return details_of(Bench(tiny_model, SFT), [only])["sharpening/error_selected"]

    details = details_of(Bench(tiny_model, settings), groups[:1])
    selected, plain = (details[f"sharpening/error_{name}"] for name in ("selected", "plain"))
    assert (selected, plain) == pytest.approx((error_of(0), error_of(1)), rel=1e-5)
    assert details["sharpening/selected_minus_plain"] == selected - plain


def test_a_reward_for_easy_noise_lowers_the_selected_error_with_no_weight_changed(
    tiny_model: str, groups: list[Group]
) -> None:
    """4.6: the same weights, the same groups; only the selection is another."""
    bench = Bench(tiny_model, SFT)
    easy = []
    for group in groups:
        noise_GMCHW = np.repeat(group.array("target_GCHW")[:, None], M, axis=1).astype(np.float32)
        states = torch.from_numpy(group.array("states_GMCHW").astype(np.float32)).flatten(0, 1)
        timestep = torch.from_numpy(group.array("state_timestep_M")).repeat(G)
        embedding = bench.policy.condition([group.prompt]).expand(G * M)
        with torch.no_grad():
            predicted = bench.policy.predict_target(bench.policy.denoiser, states, timestep, embedding)
        error_GM = (predicted.numpy().reshape(noise_GMCHW.shape) - noise_GMCHW).reshape(G, M, -1)
        easy.append(with_arrays(group, state_reward_GM=-np.square(error_GM).mean(2).astype(np.float32)))
    hard = [with_arrays(group, state_reward_GM=-group.array("state_reward_GM")) for group in easy]
    differences = [
        details_of(Bench(tiny_model, SFT), rewarded)["sharpening/selected_minus_plain"] for rewarded in (easy, hard)
    ]
    assert differences[0] < 0 < differences[1]


def test_where_everyone_is_selected_nothing_is_compared(tiny_model: str, groups: list[Group]) -> None:
    names = ("states_GMCHW", "target_GCHW", "state_reward_GM", "reward_G")
    pairs = [with_arrays(group, **{name: group.array(name)[:2] for name in names}) for group in groups]
    details = details_of(Bench(tiny_model, RLHF), pairs)
    assert not {"sharpening/error_plain", "sharpening/selected_minus_plain"} & details.keys()
    assert with_difference({"sharpening/error_selected": 1.0}) == {"sharpening/error_selected": 1.0}


def test_errors_are_compared_at_the_first_step_of_every_tenth_round(tiny_model: str, groups: list[Group]) -> None:
    bench = Bench(tiny_model, {**SFT, "num_updates": 2})
    names = {"sharpening/error_plain", "sharpening/selected_minus_plain", "sharpening/heldout_error"}
    compared = {
        (round_, step)
        for round_ in (0, 1, 9, 10, 20)
        for step, details in enumerate(bench.learn(groups[:1], round_).details)
        if names <= details.keys()
    }
    assert compared == {(0, 0), (10, 0), (20, 0)}


# --- what is held out -------------------------------------------------------------------------------------


def held_out(bench: Bench, groups: Sequence[Group], round_: int = 0) -> float:
    """The error at held-out images before a round's first step."""
    return details_of(bench, groups, round_)["sharpening/heldout_error"]


def test_the_held_out_error_is_that_of_the_first_candidates_images_at_the_middles_of_the_schedule(
    tiny_model: str,
) -> None:
    """At low noise images come out of states and noise to the wire's precision."""
    bench = Bench(tiny_model, SFT)
    chosen = [excursion_group(tiny_model, index, starts=range(100, 400)) for index in (5, 6)]
    measured = held_out(bench, chosen)
    policy = load(tiny_model)
    seeds = [derive_seed(bench.recipe.seed, Purpose.TRAINING_NOISE, "held out", number) for number in range(2)]
    noise = torch.stack([normal(seed, SHAPE_CHW) for seed in seeds])
    x0 = torch.stack([torch.from_numpy(latents(group.index, G)[0]).float() for group in chosen])
    timestep = torch.tensor([250, 750])
    states = noised(x0, noise, noise_level(policy.alpha_bar, timestep))
    with torch.no_grad():
        embedding = policy.condition([group.prompt for group in chosen])
        predicted = policy.predict_target(policy.denoiser, states, timestep, embedding)
    assert measured == pytest.approx((predicted - noise).square().mean().item(), rel=1e-3)


def test_the_held_out_error_does_not_depend_on_rewards_or_on_what_is_selected(
    tiny_model: str, groups: list[Group]
) -> None:
    other = [with_arrays(group, state_reward_GM=group.array("state_reward_GM")[::-1].copy()) for group in groups]
    values = [
        held_out(Bench(tiny_model, settings), given)
        for settings, given in ((SFT, groups), (SFT, other), (RLHF, groups), ({**SFT, "selection": "random"}, groups))
    ]
    assert values == [values[0]] * 4


def test_what_is_held_out_stays_also_in_a_resumed_run(tiny_model: str, groups: list[Group]) -> None:
    """Of equal weights the error is the same, whatever has been sampled meanwhile."""
    bench, resumed = Bench(tiny_model, SFT), Bench(tiny_model, SFT)
    start = bench.weights()
    first = held_out(bench, groups)
    bench.policy.load_trainable_state(start)
    assert held_out(bench, groups[2:], round_=10) == first
    resumed.updater.load_state(json.loads(json.dumps(bench.updater.state())))
    assert held_out(resumed, groups[2:], round_=10) == first
    assert held_out(Bench(tiny_model, SFT), groups[2:]) != first


def test_no_more_than_sixteen_images_are_held_out_and_those_of_the_first_tickets(
    tiny_model: str, groups: list[Group]
) -> None:
    many = [make_group(index, f"prompt {index}", **groups[index % 4].arrays) for index in range(20)]
    bench = Bench(tiny_model, SFT)
    bench.learn(list(reversed(many)))
    kept = bench.updater.state()["held_out"]
    assert [prompt for prompt, _ in kept] == [f"prompt {index}" for index in range(16)]
