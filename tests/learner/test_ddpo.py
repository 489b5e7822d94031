"""DDPO's per-prompt advantages, and its first gradient, against closed forms: B3, B4, B5."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.ddpo import RewardTracker, per_prompt_advantage
from learner.algorithms.metrics import Metrics
from learner.algorithms.policy_gradient import policy_gradient
from protocol.algorithms import Ddpo
from tests.learner.toy_chains import SIX_POINTS, LinearChain, all_groups

SETTINGS = Ddpo(name="ddpo")
EMPTY = RewardTracker()
OFFSET = 1e-8
"""What the std is increased by."""


def tensor(values: object) -> Tensor:
    """Numbers in fp64."""
    return torch.tensor(values, dtype=torch.float64)


def random_rewards(*shape: int, seed: int = 0) -> Tensor:
    """Rewards as the wire has them, fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to an absolute tolerance."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance, check_dtype=False)


def mean(metrics: Metrics, name: str) -> float:
    """A metric divided by its count."""
    total, count = metrics[name]
    return float(total / count)


# B3 and B4: the first gradient.


def first_update(
    chain: LinearChain, shift_T: Tensor, states_PGS: Tensor, advantage_PG: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns DDPO's loss before any update, and its gradient in the chain's shifts; 16 latent entries."""
    weights_T = shift_T.clone().requires_grad_()
    loss, metrics = policy_gradient(
        chain.log_prob(weights_T, states_PGS),
        chain.log_prob(shift_T, states_PGS),
        advantage_PG,
        torch.ones(len(states_PGS), len(shift_T), dtype=torch.bool),
        clip_range=SETTINGS.clip_range,
        latent_reduce=SETTINGS.latent_reduce,
        num_latent_entries=16,
        normaliser=advantage_PG.numel() * len(shift_T),
    )
    assert mean(metrics, "pg/ratio_abs_minus_1") == mean(metrics, "pg/clip_fraction") == 0
    (gradient_T,) = torch.autograd.grad(loss, weights_T)
    return loss.detach(), gradient_T


def test_before_the_first_update_the_ratio_is_one_and_the_gradient_is_reinforces() -> None:
    """REINFORCE: minus the mean of A dlogp/dshift, which is A z/sigma at its own one of the two steps; latent_mean
    divides it by the 16 entries."""
    chain = LinearChain(decay_T=(0.9, 0.8), sigma_T=(0.5, 0.4))
    noise_PGT, shift_T = random_rewards(6, 4, 2).double(), tensor([0.1, -0.3])
    states_PGS = chain.sample(shift_T, random_rewards(6, 4, seed=1).double(), noise_PGT)
    prompts = ["a", "b", "c", "a", "b", "a"]
    advantage_PG, _, _ = per_prompt_advantage(states_PGS[..., -1], prompts, EMPTY, Ddpo(name="ddpo", min_count=12))
    loss, gradient_T = first_update(chain, shift_T, states_PGS, advantage_PG)
    assert loss.item() == pytest.approx(-advantage_PG.mean().item(), abs=1e-9)
    assert abs(loss.item()) > 1e-2
    expected_T = -(advantage_PG[..., None] * noise_PGT / tensor(chain.sigma_T)).mean((0, 1)) / 2 / 16
    assert_equal(gradient_T, expected_T)
    assert (expected_T.abs() > 1e-4).all()


def test_the_first_gradient_is_that_of_the_standardised_expected_reward() -> None:
    """r = -(x - c)^2 under N(m, s^2): d E[r]/dm = 2 (c - m) = 3, over std[r] = sqrt(4 s^2 (c - m)^2 + 2 s^4)."""
    shift_T, target, sigma, noise_PGT = tensor([0.5]), 2.0, 1.0, all_groups(SIX_POINTS, 1)
    chain = LinearChain(decay_T=(1.0,), sigma_T=(sigma,))
    states_PGS = chain.sample(shift_T, torch.zeros(noise_PGT.shape[:2], dtype=torch.float64), noise_PGT)
    reward_PG = -(states_PGS[..., -1] - target).square()
    prompts = [str(number) for number in range(len(reward_PG))]
    advantage_PG, _, _ = per_prompt_advantage(reward_PG, prompts, EMPTY, SETTINGS)
    _, gradient_T = first_update(chain, shift_T, states_PGS, advantage_PG)
    assert gradient_T.item() * 16 == pytest.approx(-3 / (math.sqrt(11) + OFFSET), abs=1e-9)


# B5: whose statistics.


def test_below_the_minimum_a_prompt_uses_the_rounds_statistics_and_from_it_on_its_own() -> None:
    """Two prompts of 5 siblings: 5, 10, 15 sightings use the round's, 20 their own."""
    tracker, seen = EMPTY, torch.empty(2, 0)
    for number in range(4):
        reward_PG = random_rewards(2, 5, seed=number) + tensor([[3.0], [-3.0]])
        seen = torch.cat([seen, reward_PG], 1)
        advantage_PG, tracker, metrics = per_prompt_advantage(reward_PG, ["a", "b"], tracker, SETTINGS)
        own = number == 3
        center = seen.mean(1, keepdim=True) if own else reward_PG.mean()
        std = seen.std(1, correction=0, keepdim=True) if own else reward_PG.std(correction=0)
        assert_equal(advantage_PG, (reward_PG - center) / (std + OFFSET))
        assert mean(metrics, "pg/fallback_fraction") == (not own)


@pytest.mark.parametrize(("num_before", "fallback"), [(14, 1.0), (15, 0.0), (16, 0.0)])
def test_the_sixteenth_sighting_switches_and_is_itself_counted(num_before: int, fallback: float) -> None:
    before = tuple(float(number) for number in range(num_before))
    reward_PG = tensor([[8.5]])
    advantage_PG, _, metrics = per_prompt_advantage(reward_PG, ["a"], RewardTracker({"a": before}), SETTINGS)
    assert mean(metrics, "pg/fallback_fraction") == fallback
    seen = tensor([*before, 8.5])
    expected = (8.5 - seen.mean()) / (seen.std(correction=0) + OFFSET)
    assert_equal(advantage_PG[0, 0], torch.tensor(0.0) if fallback else expected)


def test_in_one_round_each_prompt_has_its_own_rule() -> None:
    """Groups of a prompt that comes twice enter together; 2 of 3 groups use their prompt's statistics."""
    reward_PG = tensor([[0, 2], [10, 30], [4, 6]])
    settings = Ddpo(name="ddpo", min_count=4)
    advantage_PG, tracker, metrics = per_prompt_advantage(reward_PG, ["a", "b", "a"], EMPTY, settings)
    of_a, of_round = tensor([0, 2, 4, 6]), reward_PG
    assert tracker == RewardTracker({"a": (0.0, 2.0, 4.0, 6.0), "b": (10.0, 30.0)})
    expected_a = (reward_PG[[0, 2]] - 3) / of_a.std(correction=0)
    expected_b = (reward_PG[1] - 52 / 6) / of_round.std(correction=0)
    assert_equal(advantage_PG[[0, 2]], expected_a, 1e-7)
    assert_equal(advantage_PG[1], expected_b, 1e-7)
    assert mean(metrics, "pg/fallback_fraction") == pytest.approx(1 / 3)


def test_only_the_newest_rewards_count() -> None:
    settings = Ddpo(name="ddpo", buffer_size=4, min_count=2)
    old = RewardTracker({"a": (100.0, 200.0, 1.0, 3.0), "b": (7.0,)})
    advantage_PG, tracker, _ = per_prompt_advantage(tensor([[5.0, 7.0]]), ["a"], old, settings)
    assert tracker == RewardTracker({"a": (1.0, 3.0, 5.0, 7.0), "b": (7.0,)})
    assert_equal(advantage_PG, tensor([[1, 3]]) / math.sqrt(5), 1e-7)


def test_the_tracker_that_is_given_stays_as_it_was() -> None:
    tracker = RewardTracker({"a": (1.0, 2.0)})
    per_prompt_advantage(tensor([[3.0]]), ["a"], tracker, SETTINGS)
    assert tracker == RewardTracker({"a": (1.0, 2.0)})


@given(st.dictionaries(st.text(), st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=4)))
def test_a_tracker_survives_json_bit_for_bit(rewards: dict[str, list[float]]) -> None:
    tracker = RewardTracker({prompt: tuple(values) for prompt, values in rewards.items()})
    read = RewardTracker.from_json(json.loads(json.dumps(tracker.to_json())))
    assert read == tracker
    assert repr(read) == repr(tracker)


def test_a_run_that_was_killed_and_resumed_continues_identically() -> None:
    rounds = [random_rewards(3, 4, seed=number) for number in range(8)]
    prompts = [["a", "b", "a"] if number % 2 else ["c", "a", "b"] for number in range(8)]

    def run(first: int, last: int, tracker: RewardTracker) -> tuple[list[Tensor], RewardTracker]:
        advantages = []
        for number in range(first, last):
            advantage_PG, tracker, _ = per_prompt_advantage(rounds[number], prompts[number], tracker, SETTINGS)
            advantages.append(advantage_PG)
        return advantages, tracker

    whole, at_the_end = run(0, 8, EMPTY)
    before, saved = run(0, 5, EMPTY)
    after, resumed = run(5, 8, RewardTracker.from_json(json.loads(json.dumps(saved.to_json()))))
    assert resumed == at_the_end
    assert torch.equal(torch.stack(before + after), torch.stack(whole))


# Clipping, degenerate inputs and invariances.


def test_advantages_are_clipped_and_counted() -> None:
    """One of 101 samples is 10 stds above the mean, the others 0.1 below."""
    reward_PG = torch.eye(1, 101)
    advantage_PG, _, metrics = per_prompt_advantage(
        reward_PG, ["a"], EMPTY, Ddpo(name="ddpo", min_count=200, buffer_size=200)
    )
    assert advantage_PG[0, 0] == 5
    assert_equal(advantage_PG[0, 1:], tensor([-0.1]).expand(100), 1e-7)
    assert mean(metrics, "pg/advantage_clipped") == pytest.approx(1 / 101)
    below, _, _ = per_prompt_advantage(
        -reward_PG, ["a"], EMPTY, Ddpo(name="ddpo", min_count=200, buffer_size=200, max_advantage=3)
    )
    assert below[0, 0] == -3


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e6 - 0.1])
@pytest.mark.parametrize("siblings", [1, 3, 7, 20])
def test_equal_rewards_give_exactly_zero(value: float, siblings: int) -> None:
    """Not the mean's rounding over 1e-8; 20 siblings use the prompt's statistics, fewer the round's."""
    reward_PG = torch.full((1, siblings), value, dtype=torch.float64)
    advantage_PG, _, metrics = per_prompt_advantage(reward_PG, ["a"], EMPTY, SETTINGS)
    assert torch.equal(advantage_PG, torch.zeros_like(reward_PG))
    assert mean(metrics, "pg/fallback_fraction") == (siblings < 16)


def test_a_round_of_one_sample_gives_exactly_zero() -> None:
    advantage_PG, tracker, _ = per_prompt_advantage(torch.tensor([[0.7]]), ["a"], EMPTY, SETTINGS)
    assert advantage_PG.item() == 0
    assert tracker.newest["a"] == (torch.tensor(0.7).item(),)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_reward_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="non-finite reward"):
        per_prompt_advantage(tensor([[0.0, value]]), ["a"], EMPTY, SETTINGS)


def test_a_wrong_number_of_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="1 prompts for 2 groups"):
        per_prompt_advantage(torch.zeros(2, 3), ["a"], EMPTY, SETTINGS)


@given(seed=st.integers(0, 99))
def test_permuting_siblings_and_groups_permutes_the_advantages(seed: int) -> None:
    """Where no buffer overflows the numbers do not depend on the order at all."""
    reward_PG, prompts = random_rewards(4, 6, seed=seed), ["a", "b", "a", "a"]
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    one, _, metrics = per_prompt_advantage(reward_PG, prompts, EMPTY, SETTINGS)
    other, _, _ = per_prompt_advantage(reward_PG[:, order].flip(0), prompts[::-1], EMPTY, SETTINGS)
    assert torch.equal(other, one[:, order].flip(0))
    assert mean(metrics, "pg/fallback_fraction") == 0.25
