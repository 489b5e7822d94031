"""What images and pairs are made of groups, and how they are noised: by key, whatever else there is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.kernels import noised
from diffusion.policy import Policy
from diffusion.schedules import noise_level
from learner.probes import Noised
from learner.units import (
    Units,
    noise_units,
    perception_draws,
    preference_units,
    self_play_units,
    single_units,
)
from protocol.algorithms import Dpo, Pairs, Sft
from protocol.errors import TrainingError
from protocol.groups import Group
from protocol.recipe import Lora

CPU = torch.device("cpu")
SHAPE_CHW = (4, 8, 8)
SEED = 7


@pytest.fixture(scope="module")
def policy(tiny_model: str) -> Policy:
    """A policy whose schedule and latents units are noised for."""
    return Policy(tiny_model, trainable=Lora(rank=2), seed=0, with_decoder=False)


def make_group(index: int, **arrays: np.ndarray) -> Group:
    """A group of these fields, as it comes from the wire: in the order of their names."""
    return Group(
        f"000003-{index:04d}",
        *(3, index, f"prompt {index}", 3, "digest", "sampler", "fingerprint", "worker", 0.0, 0.0, 0, 0),
        arrays=dict(sorted(arrays.items())),
    )


def latents(index: int, *shape: int) -> np.ndarray:
    """Latents that no other group has, in the wire's dtype."""
    return np.random.default_rng(index).standard_normal((*shape, *SHAPE_CHW)).astype(np.float16)


def without(group: Group, name: str) -> Group:
    """The group less a field."""
    return replace(group, arrays={key: array for key, array in group.arrays.items() if key != name})


def sampled(index: int, rewards: Sequence[float]) -> Group:
    """A prompt's siblings with their rewards."""
    reward_G = np.array(rewards, np.float32)
    return make_group(index, x0_GCHW=latents(index, len(rewards)), reward_G=reward_G, reward_red_G=reward_G)


def pair(index: int) -> Group:
    """A dataset's pair."""
    return make_group(index, pair_x0_2CHW=latents(index, 2))


def image(index: int) -> Group:
    """A dataset's image."""
    return make_group(index, real_x0_CHW=latents(index))


def self_play(index: int, num_siblings: int) -> Group:
    """A dataset's image and the opponent's."""
    return make_group(index, real_x0_CHW=latents(index), x0_GCHW=latents(100 + index, num_siblings))


def rows(noised_: Noised, units: Units) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor, int, str]]:
    """What each unit was noised to: states, noise, timestep and prompt, by its key."""
    assert len(noised_) == len(units.keys)
    assert (noised_.timestep_UK == noised_.timestep_UK[:, :1]).all()
    return {
        key: (noised_.states_UKCHW[u], noised_.target_UKCHW[u], int(noised_.timestep_UK[u, 0]), noised_.prompts[u])
        for u, key in enumerate(units.keys)
    }


def assert_same(
    one: tuple[torch.Tensor, torch.Tensor, int, str], other: tuple[torch.Tensor, torch.Tensor, int, str]
) -> None:
    """Bit for bit."""
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert one[2:] == other[2:]


# --- draws ----------------------------------------------------------------------------------------------

GROUPS = [sampled(0, (0.1, 0.9, 0.5)), pair(1), sampled(2, (0.3, 0.3, 0.2)), sampled(3, (0.0, 2.0, 1.0))]
ALL_PAIRS = Pairs(rule="all_pairs")
DROPPING = Dpo(name="dpo", beta_full=1.0, prompt_dropout=0.5)


@pytest.mark.parametrize("shared_noise", [True, False])
def test_a_units_draws_do_not_depend_on_order_or_on_other_units(policy: Policy, shared_noise: bool) -> None:
    def drawn(groups: Sequence[Group]) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor, int, str]]:
        units = preference_units(groups, ALL_PAIRS, CPU)
        return rows(noise_units(units, policy, DROPPING, shared_noise=shared_noise, run_seed=SEED, update=1), units)

    def perceived(groups: Sequence[Group]) -> dict[tuple[str, int], tuple[torch.Tensor, int]]:
        units = preference_units(groups, ALL_PAIRS, CPU)
        noises, timesteps = perception_draws(units, policy, SEED, update=1)
        assert len(noises) == len(timesteps) == len(units.keys) + 1
        return {key: (noises[u], int(timesteps[u])) for u, key in enumerate(units.keys)}

    whole, encoded = drawn(GROUPS), perceived(GROUPS)
    assert [number for _, number in whole] == [0, 1, 2, 0, 0, 1, 0, 1, 2]
    for part in (GROUPS[::-1], GROUPS[1:2], GROUPS[2:], GROUPS[:1]):
        for key, row in drawn(part).items():
            assert_same(row, whole[key])
        for key, (noise, timestep) in perceived(part).items():
            assert torch.equal(noise, encoded[key][0])
            assert timestep == encoded[key][1]


def test_every_unit_every_pass_and_every_run_draws_for_itself(policy: Policy) -> None:
    units = preference_units(GROUPS, ALL_PAIRS, CPU)
    drawn = [
        noise_units(units, policy, DROPPING, shared_noise=True, run_seed=seed, update=update)
        for seed, update in ((SEED, 0), (SEED, 1), (SEED + 1, 0))
    ]
    noises = torch.cat([one.target_UKCHW[: len(one), 0].flatten(1) for one in drawn])
    assert len(noises.unique(dim=0)) == len(noises) == 3 * 9
    assert len({tuple(one.timestep_UK[:, 0].tolist()) for one in drawn}) == 3
    encoded = torch.cat([perception_draws(units, policy, *key)[0][:9].flatten(1) for key in ((SEED, 0), (SEED, 1))])
    assert len(torch.cat([noises, encoded]).unique(dim=0)) == 5 * 9


def test_a_pair_has_one_timestep_and_one_noise_or_one_each(policy: Policy) -> None:
    units = preference_units(GROUPS, ALL_PAIRS, CPU)
    shared, own = (
        noise_units(units, policy, DROPPING, shared_noise=is_shared, run_seed=SEED, update=0)
        for is_shared in (True, False)
    )
    assert torch.equal(shared.target_UKCHW[:, 0], shared.target_UKCHW[:, 1])
    assert torch.equal(own.target_UKCHW[:, 0], shared.target_UKCHW[:, 0])
    assert all((own.target_UKCHW[u, 0] != own.target_UKCHW[u, 1]).all() for u in range(len(own)))
    assert torch.equal(own.timestep_UK, shared.timestep_UK)
    assert own.prompts == shared.prompts


def test_states_are_the_units_latents_noised_to_their_timesteps(policy: Policy) -> None:
    units = preference_units(GROUPS, ALL_PAIRS, CPU)
    drawn = noise_units(units, policy, DROPPING, shared_noise=False, run_seed=SEED, update=0)
    for u in range(len(drawn)):
        level = noise_level(policy.alpha_bar, drawn.timestep_UK[u])
        assert torch.equal(drawn.states_UKCHW[u], noised(units.x0_UKCHW[u], drawn.target_UKCHW[u], level))


MANY = [image(index) for index in range(400)]


def test_timesteps_are_uniform_from_the_smallest_to_the_last(policy: Policy) -> None:
    units = single_units(MANY, "best", SEED, CPU)
    for smallest in (0, 400, 999):
        settings = Sft(name="sft", min_tau=smallest)
        drawn = noise_units(units, policy, settings, shared_noise=True, run_seed=SEED, update=0)
        timestep_U = drawn.timestep_UK[: len(drawn), 0].double()
        number = 1000 - smallest
        assert smallest <= timestep_U.min() <= timestep_U.max() <= 999
        error = math.sqrt((number**2 - 1) / 12 / len(MANY))
        assert abs(float(timestep_U.mean()) - (smallest + 999) / 2) <= 4 * error
        assert len(timestep_U.unique()) > 0.6 * min(number, len(MANY))
    fresh_U = perception_draws(units, policy, SEED, update=0)[1].double()
    assert abs(float(fresh_U.mean()) - 499.5) <= 4 * math.sqrt((1000**2 - 1) / 12 / len(MANY))


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_prompts_are_dropped_as_often_as_asked(policy: Policy, fraction: float) -> None:
    units = single_units(MANY, "best", SEED, CPU)
    settings = Sft(name="sft", prompt_dropout=fraction)
    drawn = noise_units(units, policy, settings, shared_noise=True, run_seed=SEED, update=0)
    dropped = [prompt == "" for prompt in drawn.prompts[:-1]]
    assert abs(np.mean(dropped) - fraction) <= 4 * math.sqrt(fraction * (1 - fraction) / len(MANY))
    assert all(drawn.prompts[u] == units.prompts[u] for u, was_dropped in enumerate(dropped) if not was_dropped)


# --- units ----------------------------------------------------------------------------------------------


def latent(group: Group, name: str, *places: int) -> torch.Tensor:
    """One latent of a group, fp32."""
    return torch.from_numpy(group.array(name)[places].astype(np.float32))


def test_one_image_of_each_group_is_the_best_sibling_the_datasets_or_a_pairs_winner() -> None:
    best, real, two, tied = groups = [sampled(5, (0.1, 0.9, 0.5)), image(2), pair(4), sampled(3, (0.7, 0.7, 0.2))]
    units = single_units(groups, "best", SEED, CPU)
    expected = [latent(real, "real_x0_CHW"), latent(tied, "x0_GCHW", 0)]
    expected += [latent(two, "pair_x0_2CHW", 0), latent(best, "x0_GCHW", 1)]
    assert torch.equal(units.x0_UKCHW[:, 0], torch.stack(expected))
    assert units.keys == tuple((f"000003-{index:04d}", 0) for index in (2, 3, 4, 5))
    assert units.prompts == tuple(f"prompt {index}" for index in (2, 3, 4, 5))
    assert units.weight_U.tolist() == [1.0] * 4
    assert units.num_units == 4
    gaps = [0.9 - 0.5, 0.7 - 1.6 / 3]
    assert units.metrics["select/gap"].tolist() == pytest.approx([sum(gaps), 2], rel=1e-6)
    assert single_units([real, two], "best", SEED, CPU).metrics["select/gap"].tolist() == [0, 0]


def test_a_sibling_at_random_is_drawn_by_key_and_not_by_reward() -> None:
    def chosen(groups: Sequence[Group], seed: int = SEED) -> list[int]:
        units = single_units(groups, "random", seed, CPU)
        return [
            next(g for g in range(3) if torch.equal(latent(group, "x0_GCHW", g), x0_KCHW[0]))
            for group, x0_KCHW in zip(groups, units.x0_UKCHW, strict=True)
        ]

    many = [sampled(index, (0.0, 1.0, 2.0)) for index in range(300)]
    others = [replace(group, arrays={**group.arrays, "reward_G": -group.array("reward_G")}) for group in many]
    assert chosen(many) == chosen(others)
    assert chosen(many)[7:9] == chosen(many[7:9])
    assert chosen(many) != chosen(many, seed=SEED + 1)
    counts = np.bincount(chosen(many), minlength=3)
    assert abs(counts - 100).max() <= 4 * math.sqrt(300 * 2 / 9)


@pytest.mark.parametrize(
    ("rule", "expected", "num_units", "tied"),
    [
        ("best_worst", [(0, 1, 0, 1.0), (2, 0, 2, 1.0), (3, 1, 0, 1.0)], 4, (1, 5)),
        (
            "all_pairs",
            [
                *((0, 1, 0, 1 / 3), (0, 2, 0, 1 / 3), (0, 1, 2, 1 / 3), (2, 0, 2, 1 / 2), (2, 1, 2, 1 / 2)),
                *((3, 1, 0, 1 / 3), (3, 2, 0, 1 / 3), (3, 1, 2, 1 / 3)),
            ],
            4,
            (1 + 3, 8 + 1 + 4),
        ),
        ("threshold", [(3, 1, 0, 1.0)], 2, (1 + 3, 13)),
    ],
)
def test_pairs_are_made_of_rewards_with_weights_that_the_normaliser_counts(
    rule: str, expected: list[tuple[int, int, int, float]], num_units: int, tied: tuple[int, int]
) -> None:
    groups = [*GROUPS, sampled(4, (0.5, 0.5, 0.5))]
    settings = Pairs(rule=rule, threshold=1.5 if rule == "threshold" else 0.0)
    units = preference_units(groups, settings, CPU)
    found = [u for u, (ticket_id, _) in enumerate(units.keys) if ticket_id != "000003-0001"]
    assert len(found) == len(expected)
    remaining = list(expected)
    for u in found:
        index = int(units.keys[u][0][-4:])
        match = next(
            row
            for row in remaining
            if row[0] == index
            and torch.equal(units.x0_UKCHW[u, 0], latent(groups[index], "x0_GCHW", row[1]))
            and torch.equal(units.x0_UKCHW[u, 1], latent(groups[index], "x0_GCHW", row[2]))
        )
        assert float(units.weight_U[u]) == match[3]
        remaining.remove(match)
    assert not remaining
    assert len(set(units.keys)) == len(units.keys)
    (given,) = set(range(len(units.keys))) - set(found)
    assert torch.equal(units.x0_UKCHW[given], latent(groups[1], "pair_x0_2CHW"))
    assert float(units.weight_U[given]) == 1.0
    assert units.num_units == num_units == round(float(units.weight_U.sum()))
    assert tuple(units.metrics["pairs/tied"].tolist()) == tied


def test_of_whole_trajectories_the_ends_are_the_images() -> None:
    group = sampled(0, (0.1, 0.9, 0.5))
    latents_GSCHW = np.stack([latents(50, 3), latents(51, 3), group.array("x0_GCHW")], axis=1)
    whole = without(replace(group, arrays={**group.arrays, "latents_GSCHW": latents_GSCHW}), "x0_GCHW")
    for make in (lambda one: single_units([one], "best", SEED, CPU), lambda one: preference_units([one], Pairs(), CPU)):
        assert torch.equal(make(whole).x0_UKCHW, make(group).x0_UKCHW)


def test_self_play_pairs_the_real_image_with_each_of_the_opponents() -> None:
    groups = [self_play(8, 2), self_play(6, 2)]
    units = self_play_units(groups, CPU)
    assert units.keys == tuple((f"000003-{index:04d}", g) for index in (6, 8) for g in (0, 1))
    for u, (group, g) in enumerate([(groups[1], 0), (groups[1], 1), (groups[0], 0), (groups[0], 1)]):
        assert torch.equal(units.x0_UKCHW[u, 0], latent(group, "real_x0_CHW"))
        assert torch.equal(units.x0_UKCHW[u, 1], latent(group, "x0_GCHW", g))
    assert units.num_units == 4
    assert units.weight_U.tolist() == [1.0] * 4


# --- what is missing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "name"),
    [
        ([without(sampled(0, (1, 2)), "reward_G")], "reward_G"),
        ([image(0), without(sampled(1, (1, 2)), "x0_GCHW")], "x0_GCHW"),
    ],
)
def test_a_group_without_the_image_or_reward_to_choose_is_refused_by_name(groups: list[Group], name: str) -> None:
    with pytest.raises(TrainingError, match=f"lacks the field {name}"):
        single_units(groups, "best", SEED, CPU)


@pytest.mark.parametrize(
    ("groups", "name"),
    [
        ([without(sampled(0, (1, 2)), "reward_G")], "reward_G"),
        ([image(1)], "pair_x0_2CHW"),
        ([pair(0), without(sampled(1, (1, 2)), "x0_GCHW")], "x0_GCHW"),
    ],
)
def test_a_group_without_a_pair_is_refused_by_name(groups: list[Group], name: str) -> None:
    with pytest.raises(TrainingError, match=f"lacks the field {name}"):
        preference_units(groups, Pairs(), CPU)


@pytest.mark.parametrize("name", ["real_x0_CHW", "x0_GCHW"])
def test_a_group_without_the_real_or_the_opponents_image_is_refused_by_name(name: str) -> None:
    with pytest.raises(TrainingError, match=f"lacks the field {name}"):
        self_play_units([self_play(0, 2), without(self_play(1, 2), name)], CPU)


@pytest.mark.parametrize("shared_noise", [True, False])
def test_a_rank_whose_pairs_all_tie_has_no_unit_but_a_filler(policy: Policy, shared_noise: bool) -> None:
    units = preference_units([sampled(0, (0.5, 0.5)), sampled(1, (2.0, 2.0))], Pairs(), CPU)
    assert (units.num_units, len(units.keys), len(units.weight_U)) == (0, 0, 0)
    assert units.metrics["pairs/tied"].tolist() == [2, 2]
    drawn = noise_units(units, policy, DROPPING, shared_noise=shared_noise, run_seed=SEED, update=0)
    assert len(drawn) == 0
    assert drawn.states_UKCHW.shape == drawn.target_UKCHW.shape == (1, 2, *SHAPE_CHW)
    assert drawn.timestep_UK.shape == (1, 2)
    assert drawn.prompts == ("",)
    noises, timesteps = perception_draws(units, policy, SEED, update=0)
    assert noises.shape == (1, *SHAPE_CHW)
    assert timesteps.shape == (1,)
