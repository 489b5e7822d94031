"""The clipped policy-gradient loss and group advantages against closed forms: B4, B7, B8, B11, P-T12."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.metrics import Metrics
from learner.algorithms.policy_gradient import group_advantage, policy_gradient
from learner.algorithms.prdp import prdp
from learner.two_pass import differentiate
from protocol.algorithms import PolicyGradient, Prdp
from tests.learner.toy_chains import SIX_POINTS, LinearChain, all_groups

NUM_ENTRIES = 4
FORMS = ["centred", "leave_one_out", "group_std", "global_std"]
DIVIDED_FORMS = ["group_std", "global_std"]
LatentReduce = Literal["latent_mean", "latent_sum"]
REDUCES: tuple[LatentReduce, ...] = ("latent_mean", "latent_sum")


@dataclass(frozen=True)
class Round:
    """What the loss is a function of."""

    log_prob_PGT: Tensor
    old_PGT: Tensor
    advantage_PG: Tensor
    scored_PT: Tensor
    kernel_kl_PGT: Tensor

    def map(self, function: str, *arguments: object) -> Round:
        """Applies a tensor method to every tensor."""
        return Round(*(getattr(tensor, function)(*arguments) for tensor in vars(self).values()))

    @property
    def num_scored(self) -> int:
        """Scored entries: steps of all siblings."""
        return int(self.scored_PT.sum()) * self.advantage_PG.shape[1]


@dataclass(frozen=True)
class Outcome:
    """The loss, its gradients, and the metrics."""

    loss: Tensor
    gradient_PGT: Tensor
    kl_gradient_PGT: Tensor
    metrics: Metrics


def evaluate(
    round_: Round,
    *,
    clip_range: float | None = None,
    latent_reduce: LatentReduce = "latent_sum",
    kl_coef: float = 0.0,
    normaliser: int | None = None,
) -> Outcome:
    """Runs the loss, with its KL, as one rank does that has the whole round unless a normaliser is given."""
    log_prob_PGT = round_.log_prob_PGT.clone().requires_grad_()
    kernel_kl_PGT = round_.kernel_kl_PGT.clone().requires_grad_()
    loss, metrics = policy_gradient(
        log_prob_PGT,
        round_.old_PGT,
        round_.advantage_PG,
        round_.scored_PT,
        clip_range=clip_range,
        latent_reduce=latent_reduce,
        num_latent_entries=NUM_ENTRIES,
        normaliser=round_.num_scored if normaliser is None else normaliser,
        kernel_kl_PGT=kernel_kl_PGT,
        kl_coef=kl_coef,
    )
    gradient_PGT, kl_gradient_PGT = torch.autograd.grad(loss, (log_prob_PGT, kernel_kl_PGT))
    return Outcome(loss.detach(), gradient_PGT, kl_gradient_PGT, metrics)


def tensor(values: object) -> Tensor:
    """Numbers in fp64."""
    return torch.tensor(values, dtype=torch.float64)


def random_round(*, groups: int = 3, siblings: int = 4, steps: int = 5, seed: int = 0) -> Round:
    """A round whose groups differ in how many of their last steps are unscored; log-ratios are about 0.1."""
    generator = torch.Generator().manual_seed(seed)
    old, change, kl = torch.randn((3, groups, siblings, steps), generator=generator, dtype=torch.float64)
    advantage_PG = torch.randn(groups, siblings, generator=generator, dtype=torch.float64)
    scored_PT = torch.arange(steps) < steps - torch.arange(groups)[:, None] % 3
    return Round(50 * old + change / 10, 50 * old, advantage_PG, scored_PT, kl.square())


def one_step(ratio: float, advantage: float) -> Round:
    """One sample whose only step has the given ratio."""
    log_prob_PGT = tensor([[[math.log(ratio) - 7]]])
    scored_PT = torch.ones(1, 1, dtype=torch.bool)
    return Round(log_prob_PGT, tensor([[[-7]]]), tensor([[advantage]]), scored_PT, tensor([[[0]]]))


def settings(advantage: str = "leave_one_out") -> PolicyGradient:
    """Settings with the given form of advantage."""
    return PolicyGradient.model_validate({"name": "policy_gradient", "advantage": advantage, "clip_range": None})


def means(metrics: Metrics) -> dict[str, float]:
    """Metrics divided by their counts."""
    return {name: (total / count).item() for name, (total, count) in metrics.items()}


def assert_equal(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to an absolute tolerance."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance, check_dtype=False)


# The loss and its gradient.


@pytest.mark.parametrize(("latent_reduce", "divisor"), [("latent_mean", NUM_ENTRIES), ("latent_sum", 1)])
def test_without_a_window_the_loss_is_minus_the_mean_of_advantage_times_ratio(
    latent_reduce: LatentReduce, divisor: int
) -> None:
    round_ = random_round()
    outcome = evaluate(round_, latent_reduce=latent_reduce)
    scored_PGT = round_.scored_PT[:, None, :].expand(3, 4, 5)
    gain_PGT = round_.advantage_PG[..., None] * ((round_.log_prob_PGT - round_.old_PGT) / divisor).exp() * scored_PGT
    assert_equal(outcome.loss, -gain_PGT.sum() / round_.num_scored, 1e-12)
    assert_equal(outcome.gradient_PGT, -gain_PGT / (divisor * round_.num_scored), 1e-12)


@pytest.mark.parametrize("latent_reduce", REDUCES)
@pytest.mark.parametrize("clip_range", [None, 0.0, 1e-4])
def test_where_theta_is_old_the_window_changes_nothing(latent_reduce: LatentReduce, clip_range: float | None) -> None:
    round_ = random_round()
    round_ = replace(round_, log_prob_PGT=round_.old_PGT)
    outcome = evaluate(round_, clip_range=clip_range, latent_reduce=latent_reduce)
    free = evaluate(round_, latent_reduce=latent_reduce)
    assert torch.equal(outcome.loss, free.loss)
    assert torch.equal(outcome.gradient_PGT, free.gradient_PGT)
    assert (outcome.gradient_PGT[round_.scored_PT[:, None, :].expand(3, 4, 5)] != 0).all()
    assert means(outcome.metrics)["pg/ratio_abs_minus_1"] == means(outcome.metrics)["pg/clip_fraction"] == 0


@pytest.mark.parametrize(("ratio", "advantage"), [(1.3, 2.0), (0.7, -2.0)])
def test_a_step_that_left_the_window_in_the_improving_direction_gets_no_gradient(
    ratio: float, advantage: float
) -> None:
    outcome = evaluate(one_step(ratio, advantage), clip_range=0.2)
    edge = 1.2 if ratio > 1 else 0.8
    assert outcome.loss.item() == pytest.approx(-advantage * edge, rel=1e-12)
    assert outcome.gradient_PGT.item() == 0
    assert means(outcome.metrics)["pg/clip_fraction"] == 1


@pytest.mark.parametrize(("ratio", "advantage"), [(0.7, 2.0), (1.3, -2.0), (1.1, 2.0), (0.9, -2.0)])
def test_a_step_that_left_it_in_the_other_direction_or_not_at_all_gets_the_full_gradient(
    ratio: float, advantage: float
) -> None:
    outcome = evaluate(one_step(ratio, advantage), clip_range=0.2)
    assert outcome.loss.item() == pytest.approx(-advantage * ratio, rel=1e-12)
    assert outcome.gradient_PGT.item() == pytest.approx(-advantage * ratio, rel=1e-12)
    assert means(outcome.metrics)["pg/clip_fraction"] == (abs(ratio - 1) > 0.2)


def test_a_window_of_zero_leaves_gradient_only_to_steps_that_moved_the_wrong_way() -> None:
    assert evaluate(one_step(1.01, 1.0), clip_range=0.0).gradient_PGT.item() == 0
    assert evaluate(one_step(0.99, 1.0), clip_range=0.0).gradient_PGT.item() == pytest.approx(-0.99)


def test_the_gate_is_each_steps_own() -> None:
    round_ = random_round(groups=1, siblings=2, steps=3)
    log_ratio_PGT = tensor([[[0.3, 0.05, -0.3], [0.3, 0.05, -0.3]]])
    round_ = replace(round_, log_prob_PGT=round_.old_PGT + log_ratio_PGT, advantage_PG=tensor([[1, -1]]))
    gradient_GT = evaluate(round_, clip_range=0.2).gradient_PGT[0] * 6
    r = log_ratio_PGT[0, 0].exp()
    assert_equal(gradient_GT, torch.stack([-r * tensor([0, 1, 1]), r * tensor([1, 1, 0])]))


def test_a_window_under_latent_mean_is_on_the_root_of_the_ratio() -> None:
    """Under latent_mean, an entry's ratio is the true one to the power 1/D."""
    inside, outside = (one_step(ratio**NUM_ENTRIES, 1.0) for ratio in (1.19, 1.21))
    assert evaluate(inside, clip_range=0.2, latent_reduce="latent_mean").gradient_PGT.item() == pytest.approx(-1.19 / 4)
    assert evaluate(outside, clip_range=0.2, latent_reduce="latent_mean").gradient_PGT.item() == 0


# B4: the gradient is the policy's.


@pytest.mark.parametrize(("advantage", "factor"), [("leave_one_out", 1.0), ("centred", 0.5)])
def test_the_gradient_is_that_of_the_expected_reward_of_a_gaussian_policy(advantage: str, factor: float) -> None:
    """r = -(x - c)^2 under N(m, sigma^2): d E[r]/dm = 2 (c - m). Groups of two: the centred form has half of it."""
    shift, target, noise_PGT = tensor([0.5]).requires_grad_(), 2.0, all_groups(SIX_POINTS, 1)
    chain = LinearChain(decay_T=(1.0,), sigma_T=(0.8,))
    states_PGS = chain.sample(shift.detach(), torch.zeros(noise_PGT.shape[:2], dtype=torch.float64), noise_PGT)
    log_prob_PGT = chain.log_prob(shift, states_PGS)
    loss, _ = policy_gradient(
        log_prob_PGT,
        log_prob_PGT.detach(),
        group_advantage(-(states_PGS[..., -1] - target).square(), settings(advantage)),
        torch.ones(len(noise_PGT), 1, dtype=torch.bool),
        clip_range=1e-4,
        latent_reduce="latent_sum",
        num_latent_entries=1,
        normaliser=log_prob_PGT.numel(),
    )
    (slope,) = torch.autograd.grad(loss, shift)
    assert slope.item() == pytest.approx(-factor * 3.0, abs=1e-9)


# P-T12: what PRDP begins with.


@pytest.mark.parametrize(("latent_reduce", "time_reduce"), [*itertools.product(REDUCES, ["time_mean", "time_sum"])])
def test_at_the_reference_prdp_with_a_quarter_of_beta_has_this_gradient(
    latent_reduce: LatentReduce, time_reduce: str
) -> None:
    round_ = replace(random_round(), scored_PT=torch.tensor([[True, True, True, True, False]]).expand(3, 5))
    round_ = replace(round_, log_prob_PGT=round_.old_PGT)
    reward_PG, ref_PGT = round_.advantage_PG, round_.old_PGT
    whole = Prdp.model_validate(
        {
            "name": "prdp",
            "kl_weight": 0.3,
            "clip_eps": 1e-6,
            "latent_reduce": latent_reduce,
            "time_reduce": time_reduce,
            "loss_scale": "quarter_beta",
        }
    )
    _, expected_PGT, _ = differentiate(
        lambda log_prob_PGT: prdp(
            log_prob_PGT,
            ref_PGT,
            ref_PGT,
            round_.scored_PT,
            reward_PG,
            settings=whole,
            num_latent_entries=NUM_ENTRIES,
            normaliser=3,
        ),
        round_.log_prob_PGT,
    )
    round_ = replace(round_, advantage_PG=group_advantage(reward_PG, settings("leave_one_out")))
    num_units = round_.num_scored if time_reduce == "time_mean" else reward_PG.numel()
    outcome = evaluate(round_, latent_reduce=latent_reduce, clip_range=1e-4, normaliser=num_units)
    assert_equal(outcome.gradient_PGT, expected_PGT, 1e-12)


# B8: the KL to the pretrained model.


def test_the_kl_adds_its_mean_over_scored_entries_times_its_factor() -> None:
    """Means 0.1 apart at sigma 0.5 are a KL of 0.02 an entry; published factor 0.04."""
    round_ = random_round()
    round_ = replace(round_, kernel_kl_PGT=torch.full_like(round_.kernel_kl_PGT, 0.1**2 / (2 * 0.5**2)))
    one, free = evaluate(round_, clip_range=0.1, kl_coef=0.04), evaluate(round_, clip_range=0.1)
    assert (one.loss - free.loss).item() == pytest.approx(0.04 * 0.02, abs=1e-12)
    assert torch.equal(one.gradient_PGT, free.gradient_PGT)
    expected_PGT = round_.scored_PT[:, None, :].expand(3, 4, 5).double() * 0.04 / round_.num_scored
    assert_equal(one.kl_gradient_PGT, expected_PGT, 1e-15)
    assert torch.equal(free.kl_gradient_PGT, torch.zeros(3, 4, 5, dtype=torch.float64))
    assert means(one.metrics)["pg/kernel_kl"] == pytest.approx(0.02, abs=1e-12)


def test_the_kl_of_a_saturated_step_still_counts() -> None:
    round_ = replace(one_step(1.3, 1.0), kernel_kl_PGT=tensor([[[0.02]]]))
    outcome = evaluate(round_, clip_range=0.2, kl_coef=0.5)
    assert outcome.gradient_PGT.item() == 0
    assert outcome.kl_gradient_PGT.item() == 0.5


# B7: group advantages.

PUBLISHED = {
    "centred": [0.5625, -0.4375, 0.0625, -0.1875],
    "leave_one_out": [0.75, -7 / 12, 1 / 12, -0.25],
    "group_std": [1.52128, -1.18322, 0.16903, -0.50709],
    "global_std": [1.52128, -1.18322, 0.16903, -0.50709],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_have_the_published_numbers(form: str, dtype: torch.dtype) -> None:
    advantage_PG = group_advantage(torch.tensor([[1, 0, 0.5, 0.25]], dtype=dtype), settings(form))
    assert advantage_PG.dtype == torch.float64
    assert_equal(advantage_PG[0], tensor(PUBLISHED[form]), 1e-5)


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_others() -> None:
    reward_PG = random_round().advantage_PG
    others_PG = (reward_PG.sum(1, keepdim=True) - reward_PG) / 3
    assert_equal(group_advantage(reward_PG, settings("leave_one_out")), reward_PG - others_PG, 1e-12)


def test_the_groups_std_is_its_own_and_the_rounds_std_is_of_all_rewards() -> None:
    """Groups (0, 2) and (6, 16): stds 1 and 5, the round's mean 6, its variance (36 + 16 + 0 + 100) / 4 = 38."""
    reward_PG = tensor([[0, 2], [6, 16]])
    assert_equal(group_advantage(reward_PG, settings("group_std")), tensor([[-1, 1], [-1, 1]]), 1e-12)
    expected_PG = tensor([[-1, 1], [-5, 5]]) / math.sqrt(38)
    assert_equal(group_advantage(reward_PG, settings("global_std")), expected_PG, 1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e6 - 0.1])
@pytest.mark.parametrize("siblings", [2, 3, 7])
def test_a_group_of_equal_rewards_gets_exactly_zero(form: str, value: float, siblings: int) -> None:
    """Also where the mean of equal numbers is rounded away from them."""
    reward_PG = torch.full((2, siblings), value, dtype=torch.float64)
    assert torch.equal(group_advantage(reward_PG, settings(form)), torch.zeros_like(reward_PG))
    reward_PG[1, 0] += 1
    advantage_PG = group_advantage(reward_PG, settings(form))
    assert torch.equal(advantage_PG[0], torch.zeros_like(advantage_PG[0]))
    assert (advantage_PG[1] != 0).all()


@pytest.mark.parametrize("form", DIVIDED_FORMS)
def test_divided_advantages_are_clipped_to_five(form: str) -> None:
    """Of 101 siblings one is better: 10 stds above the mean, the others 0.1 below."""
    reward_PG = torch.eye(1, 101, dtype=torch.float64)
    advantage_PG = group_advantage(reward_PG, settings(form))
    assert advantage_PG[0, 0] == 5
    assert_equal(advantage_PG[0, 1:], tensor([-0.1]).expand(100), 1e-12)
    assert_equal(group_advantage(-reward_PG, settings(form)), -advantage_PG, 1e-12)


@pytest.mark.parametrize("form", ["centred", "leave_one_out"])
def test_undivided_advantages_are_not_clipped_and_keep_the_rewards_unit(form: str) -> None:
    reward_PG = tensor([[0, 40], [10, 30]])
    expected_PG = tensor([[-20, 20], [-10, 10]]) * (1 if form == "centred" else 2)
    assert torch.equal(group_advantage(reward_PG, settings(form)), expected_PG)


@pytest.mark.parametrize("form", DIVIDED_FORMS)
@given(scale=st.floats(1e-3, 1e3), offset=st.floats(-10, 10))
def test_divided_advantages_ignore_the_rewards_scale_and_offset(form: str, scale: float, offset: float) -> None:
    reward_PG = random_round().advantage_PG
    moved = group_advantage(scale * reward_PG + offset, settings(form))
    assert_equal(moved, group_advantage(reward_PG, settings(form)), 1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_one_sibling_is_refused(form: str) -> None:
    with pytest.raises(ValueError, match="at least 2, not 1"):
        group_advantage(torch.zeros(3, 1), settings(form))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_reward_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="non-finite reward"):
        group_advantage(tensor([[0.0, value]]), settings())


@pytest.mark.parametrize("form", FORMS)
@given(seed=st.integers(0, 99))
def test_permuting_siblings_and_groups_permutes_the_advantages(form: str, seed: int) -> None:
    reward_PG = random_round(seed=seed).advantage_PG
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    permuted = group_advantage(reward_PG[:, order].flip(0), settings(form))
    assert_equal(permuted, group_advantage(reward_PG, settings(form))[:, order].flip(0), 1e-12)


# B11: invariances of every method.

WINDOWS: list[dict[str, Any]] = [
    {"clip_range": None, "latent_reduce": "latent_sum", "kl_coef": 0.0},
    {"clip_range": 0.05, "latent_reduce": "latent_sum", "kl_coef": 0.04},
    {"clip_range": 0.01, "latent_reduce": "latent_mean", "kl_coef": 0.04},
]


@pytest.mark.parametrize("window", WINDOWS)
@given(seed=st.integers(0, 99))
def test_permuting_siblings_permutes_the_gradient(window: dict[str, Any], seed: int) -> None:
    round_ = random_round(seed=seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    permuted = Round(
        round_.log_prob_PGT[:, order],
        round_.old_PGT[:, order],
        round_.advantage_PG[:, order],
        round_.scored_PT,
        round_.kernel_kl_PGT[:, order],
    )
    one, other = evaluate(round_, **window), evaluate(permuted, **window)
    assert_equal(other.loss, one.loss)
    assert_equal(other.gradient_PGT, one.gradient_PGT[:, order])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_groups_dealt_to_ranks_add_up_to_the_whole_round(window: dict[str, Any], first: int) -> None:
    """The groups have 5, 4 and 3 scored steps; a rank without groups adds exactly nothing."""
    round_ = random_round()
    whole = evaluate(round_, **window)
    ranks = [
        evaluate(round_.map("narrow", 0, start, count), normaliser=round_.num_scored, **window)
        for start, count in ((0, first), (first, 3 - first))
    ]
    assert_equal(ranks[0].loss + ranks[1].loss, whole.loss)
    assert first > 0 or ranks[0].loss == 0
    assert_equal(torch.cat([rank.gradient_PGT for rank in ranks]), whole.gradient_PGT)
    assert_equal(torch.cat([rank.kl_gradient_PGT for rank in ranks]), whole.kl_gradient_PGT)
    for name, total in whole.metrics.items():
        assert_equal(ranks[0].metrics[name] + ranks[1].metrics[name], total)


@pytest.mark.parametrize("window", WINDOWS)
def test_unscored_steps_have_no_influence_not_even_as_nan(window: dict[str, Any]) -> None:
    round_ = random_round()
    unscored_PGT = ~round_.scored_PT[:, None, :].expand(3, 4, 5)
    changed = replace(
        round_,
        log_prob_PGT=round_.log_prob_PGT.masked_fill(unscored_PGT, math.nan),
        old_PGT=round_.old_PGT.masked_fill(unscored_PGT, -1e9),
        kernel_kl_PGT=round_.kernel_kl_PGT.masked_fill(unscored_PGT, math.nan),
    )
    one, other = evaluate(round_, **window), evaluate(changed, **window)
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.gradient_PGT, other.gradient_PGT)
    assert means(one.metrics) == means(other.metrics)
    assert (other.gradient_PGT[unscored_PGT] == 0).all()
    assert (other.kl_gradient_PGT[unscored_PGT] == 0).all()


# Degenerate inputs.


def test_advantages_of_zero_give_exactly_nothing() -> None:
    round_ = replace(random_round(), advantage_PG=torch.zeros(3, 4, dtype=torch.float64))
    outcome = evaluate(round_, clip_range=0.05)
    assert outcome.loss == 0
    assert torch.equal(outcome.gradient_PGT, torch.zeros_like(outcome.gradient_PGT))
    assert means(outcome.metrics)["pg/zero_advantage_groups"] == 1


def test_a_group_counts_as_without_advantage_only_if_all_its_siblings_are() -> None:
    round_ = random_round()
    round_.advantage_PG[0] = round_.advantage_PG[1, 0] = 0
    assert means(evaluate(round_).metrics)["pg/zero_advantage_groups"] == pytest.approx(1 / 3)


def test_a_group_without_a_scored_step_is_refused() -> None:
    round_ = random_round()
    round_.scored_PT[1] = False
    with pytest.raises(ValueError, match="a deterministic sampler has none"):
        evaluate(round_)


@pytest.mark.parametrize(("field", "name"), [("old_PGT", "old"), ("advantage_PG", "advantage")])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_frozen_inputs_are_refused_by_name(field: str, name: str, value: float) -> None:
    round_ = random_round()
    getattr(round_, field)[0, 0] = value
    with pytest.raises(ValueError, match=f"non-finite {name}"):
        evaluate(round_)


@pytest.mark.parametrize("field", ["old_PGT", "advantage_PG", "scored_PT", "kernel_kl_PGT"])
def test_shapes_that_would_broadcast_are_refused(field: str) -> None:
    round_ = random_round()
    with pytest.raises(ValueError, match=rf"{field} of shape .*, expected"):
        evaluate(replace(round_, **{field: getattr(round_, field)[:, :1]}))


def test_a_kl_factor_without_a_kl_is_refused() -> None:
    round_ = random_round()
    with pytest.raises(ValueError, match=r"kl_coef 0\.04 but no kernel_kl_PGT"):
        policy_gradient(
            round_.log_prob_PGT,
            round_.old_PGT,
            round_.advantage_PG,
            round_.scored_PT,
            clip_range=None,
            latent_reduce="latent_mean",
            num_latent_entries=NUM_ENTRIES,
            normaliser=1,
            kl_coef=0.04,
        )


# Metrics.


def test_metrics_have_their_closed_forms_and_carry_no_graph() -> None:
    log_ratio_PGT = tensor([[[1.3, 1.1]], [[0.9, 5.0]]]).log()
    scored_PT = torch.tensor([[True, True], [True, False]])
    kernel_kl_PGT = tensor([[[1.0, 2.0]], [[6.0, 9.0]]])
    round_ = Round(log_ratio_PGT, torch.zeros(2, 1, 2), tensor([[-3.0], [0.0]]), scored_PT, kernel_kl_PGT)
    metrics = evaluate(round_, clip_range=0.2).metrics
    assert means(metrics) == pytest.approx(
        {
            "pg/ratio_abs_minus_1": 0.5 / 3,
            "pg/clip_fraction": 1 / 3,
            "pg/advantage_abs_mean": 1.5,
            "pg/advantage_square": 4.5,
            "pg/zero_advantage_groups": 0.5,
            "pg/kernel_kl": 3.0,
        }
    )
    assert not any(value.requires_grad for value in metrics.values())
    assert {value.dtype for value in metrics.values()} == {torch.float64}
