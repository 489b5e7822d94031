"""The Diffusion-Sharpening losses and their selection against closed forms and invariances: D1 to D3, D5 to D7."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import mse_loss

from diffusion.excursion import Start, Visited, excursion_schedule, walk
from diffusion.process import VariancePreserving
from learner.algorithms.metrics import Metrics
from learner.algorithms.sharpening import (
    Selection,
    plain_error,
    sharpening_rlhf,
    sharpening_select,
    sharpening_sft,
)
from learner.two_pass import differentiate
from protocol.algorithms import Excursion

ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
PROCESS = VariancePreserving(ALPHA_BAR)


def tensor(values: object) -> Tensor:
    """Numbers in fp64."""
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, fp64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def select(state_reward_PGM: Tensor, state_mask_PM: Tensor | None = None, **changes: Any) -> Selection:
    """The default selection, all states visited unless given."""
    if state_mask_PM is None:
        state_mask_PM = torch.ones(len(state_reward_PGM), state_reward_PGM.shape[2], dtype=torch.bool)
    whole = {"select_on": "path_mean", "selection": "best", "draws_P": torch.zeros(len(state_reward_PGM))}
    return sharpening_select(state_reward_PGM, None, state_mask_PM, **{**whole, **changes})


def select_final(final_reward_PG: Tensor) -> Selection:
    """The selection by rewards of the clean images."""
    mask_PM = torch.ones(len(final_reward_PG), 3, dtype=torch.bool)
    draws_P = torch.zeros(len(final_reward_PG))
    return sharpening_select(None, final_reward_PG, mask_PM, select_on="final_x0", selection="best", draws_P=draws_P)


@dataclass(frozen=True)
class Duel:
    """What the RLHF loss is a function of."""

    error_P2M: Tensor
    error_ref_P2M: Tensor
    weight_PM: Tensor
    reward_P2: Tensor
    usable_P: Tensor

    def map(self, function: str, *arguments: object) -> Duel:
        """Applies a tensor method to every tensor."""
        return Duel(*(getattr(value, function)(*arguments) for value in vars(self).values()))


@dataclass(frozen=True)
class Outcome:
    """A loss, its gradient in the errors, and the metrics."""

    loss: Tensor
    gradient: Tensor
    metrics: Metrics


def random_duel(*, groups: int = 4, states: int = 3, seed: int = 0) -> Duel:
    """Different errors everywhere; the second group has one state and the last is not usable."""
    errors = normal(2, groups, 2, states, seed=seed).square()
    weight_PM = torch.ones(groups, states, dtype=torch.float64)
    weight_PM[1, 1:] = 0
    usable_P = torch.arange(groups) < groups - 1
    return Duel(errors[0], errors[1], weight_PM, normal(groups, 2, seed=seed + 1), usable_P)


def rlhf(duel: Duel, *, normaliser: int | None = None, **changes: Any) -> Outcome:
    """The RLHF loss as the learner takes it; margin none and beta 1.3 unless given."""
    whole = {
        "beta": 1.3,
        "margin": "none",
        "normaliser": int(duel.usable_P.sum()) if normaliser is None else normaliser,
    }

    def loss(error_P2M: Tensor) -> tuple[Tensor, Metrics]:
        frozen = (duel.error_ref_P2M, duel.weight_PM, duel.reward_P2, duel.usable_P)
        return sharpening_rlhf(error_P2M, *frozen, **{**whole, **changes})

    return Outcome(*differentiate(loss, duel.error_P2M))


def sft(error_PM: Tensor, weight_PM: Tensor | None = None, usable_P: Tensor | None = None, **changes: Any) -> Outcome:
    """The SFT loss as the learner takes it, all groups and states unless given."""
    weight_PM = torch.ones_like(error_PM) if weight_PM is None else weight_PM
    usable_P = torch.ones(len(error_PM), dtype=torch.bool) if usable_P is None else usable_P
    whole = {"normaliser": len(error_PM), **changes}
    return Outcome(*differentiate(lambda error_PM: sharpening_sft(error_PM, weight_PM, usable_P, **whole), error_PM))


def means(metrics: Metrics) -> dict[str, float]:
    """Metrics divided by their counts."""
    return {name: (total / count).item() for name, (total, count) in metrics.items()}


def assert_equal(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    """Equal up to an absolute tolerance."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance, check_dtype=False)


# Selection.


def test_the_best_and_the_worst_path_are_chosen_with_their_scores() -> None:
    rewards = tensor([[[1, 2], [5, 0], [3, 3]], [[0, 0], [-1, 0], [0, -2]]])
    selection = select(rewards)
    assert selection.best_P.tolist() == [2, 0]
    assert selection.worst_P.tolist() == [0, 2]
    assert_equal(selection.reward_P2, tensor([[3, 1.5], [0, -1]]))
    assert_equal(select(rewards, select_on="path_sum").reward_P2, tensor([[6, 3], [0, -2]]))
    assert means(selection.metrics) == {
        "sharpening/score_best": 1.5,
        "sharpening/score_worst": 0.25,
        "sharpening/score_gap": 1.25,
        "sharpening/m_mean": 2.0,
        "pairs/tied": 0.0,
    }


def test_states_that_a_group_does_not_have_do_not_count_whatever_stands_there() -> None:
    rewards = tensor([[[1, 9], [2, -9]], [[1, 9], [2, -9]]])
    mask = torch.tensor([[True, False], [True, True]])
    for padding in (9.0, -math.inf, math.nan):
        rewards[0, :, 1] = padding
        selection = select(rewards, mask)
        assert selection.best_P.tolist() == [1, 0]
        assert_equal(selection.reward_P2, tensor([[2, 1], [5, -3.5]]))
        assert means(selection.metrics)["sharpening/m_mean"] == 1.5


def test_among_equals_the_smallest_sibling_number_is_chosen() -> None:
    selection = select_final(tensor([[0, 1, 0, 1], [2, 2, 1, 1], [3, 3, 3, 3]]))
    assert selection.best_P.tolist() == [1, 0, 0]
    assert selection.worst_P.tolist() == [0, 2, 0]
    assert selection.usable_P.tolist() == [True, True, False]
    assert means(selection.metrics)["pairs/tied"] == pytest.approx(1 / 3)


@given(st.lists(st.lists(st.floats(-3, 3, width=32), min_size=3, max_size=3), min_size=2, max_size=6))
def test_a_groups_mean_and_sum_choose_alike(reward_GM: list[list[float]]) -> None:
    """All siblings of a group have equally many states; only a margin tells the two scores apart."""
    reward_PGM = tensor([reward_GM])
    mean, total = (select(reward_PGM, select_on=select_on) for select_on in ("path_mean", "path_sum"))
    assert_equal(total.reward_P2, 3 * mean.reward_P2)
    chosen = total.reward_P2[0]
    assert chosen[0] == reward_PGM[0].sum(1).max()
    assert chosen[1] == reward_PGM[0].sum(1).min()


@pytest.mark.parametrize("function", [lambda r: r + 100, lambda r: 0.01 * r, torch.exp, lambda r: r**3])
def test_an_increasing_map_of_final_rewards_chooses_the_same(function: Any) -> None:
    """D6. Of path scores this is true of shifts and positive factors only: a mean of exponentials orders otherwise."""
    rewards = normal(50, 5)
    before, after = select_final(rewards), select_final(function(rewards))
    assert torch.equal(before.best_P, after.best_P)
    assert torch.equal(before.worst_P, after.worst_P)


@pytest.mark.parametrize("function", [lambda r: r + 100, lambda r: 0.01 * r])
def test_a_shift_or_positive_factor_of_path_rewards_chooses_the_same(function: Any) -> None:
    rewards = normal(50, 5, 3)
    before, after = select(rewards), select(function(rewards))
    assert torch.equal(before.best_P, after.best_P)
    assert torch.equal(before.worst_P, after.worst_P)


def test_negating_rewards_swaps_best_and_worst() -> None:
    rewards = normal(50, 5, 3)
    before, after = select(rewards), select(-rewards)
    assert torch.equal(before.best_P, after.worst_P)
    assert torch.equal(before.worst_P, after.best_P)


def test_permuting_siblings_permutes_who_is_chosen() -> None:
    rewards, order = normal(50, 5, 3), torch.tensor([3, 0, 4, 1, 2])
    before, after = select(rewards), select(rewards[:, order])
    assert torch.equal(order[after.best_P], before.best_P)
    assert torch.equal(order[after.worst_P], before.worst_P)
    assert torch.equal(after.reward_P2, before.reward_P2)


@pytest.mark.parametrize("group_size", [2, 3, 7])
def test_random_selection_takes_every_ordered_pair_equally_often_whatever_the_rewards(group_size: int) -> None:
    num_pairs = group_size * (group_size - 1)
    draws_P = (torch.arange(10 * num_pairs) + 0.5) / (10 * num_pairs)
    rewards = normal(len(draws_P), group_size, 1)
    selection = select(rewards, selection="random", draws_P=draws_P)
    pairs, counts = torch.stack([selection.best_P, selection.worst_P]).unique(dim=1, return_counts=True)
    assert pairs.shape[1] == num_pairs
    assert (pairs[0] != pairs[1]).all()
    assert (counts == 10).all()
    assert selection.usable_P.all()
    assert_equal(selection.reward_P2[:, 0], rewards[torch.arange(len(draws_P)), selection.best_P, 0])


@pytest.mark.parametrize("group_size", [2, 3, 7, 8, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_next_to_one_is_the_last_sibling(group_size: int, dtype: torch.dtype) -> None:
    largest = torch.ones(1, dtype=dtype).nextafter(torch.zeros(1, dtype=dtype))
    assert select(normal(1, group_size, 1), selection="random", draws_P=largest).best_P.item() == group_size - 1


def test_a_lone_sibling_is_best_and_worst_and_not_usable() -> None:
    for selection in ("best", "random"):
        chosen = select(normal(2, 1, 3), selection=selection, draws_P=tensor([0.3, 0.9]))
        assert chosen.best_P.tolist() == chosen.worst_P.tolist() == [0, 0]
        assert chosen.usable_P.tolist() == [False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_refused(bad: float) -> None:
    rewards = normal(2, 3, 2)
    rewards[1, 2, 0] = bad
    for changes in ({}, {"selection": "random"}):
        with pytest.raises(ValueError, match="non-finite reward"):
            select(rewards, **changes)
    with pytest.raises(ValueError, match="non-finite reward"):
        select_final(rewards[:, :, 0])


def test_rewards_that_were_not_asked_are_missed_by_name() -> None:
    with pytest.raises(ValueError, match="final_x0, but its groups have no final rewards"):
        select(normal(2, 3, 2), select_on="final_x0")


def test_groups_without_states_and_draws_outside_of_0_to_1_are_refused() -> None:
    with pytest.raises(ValueError, match="without a visited state"):
        select(normal(2, 3, 2), torch.tensor([[True, True], [False, False]]))
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        select(normal(2, 3, 2), selection="random", draws_P=tensor([0.5, 1.0]))


# SFT.


def test_one_candidate_and_one_state_make_plain_regression_exactly() -> None:
    """D1: value and gradient in the predicted noise."""
    noise, predicted = normal(5, 4, 8, 8), normal(5, 4, 8, 8, seed=1).requires_grad_()
    selection = select(normal(5, 1, 1))
    error_PG = (predicted - noise).square().flatten(1).mean(1, keepdim=True)
    loss, _ = sharpening_sft(
        error_PG.gather(1, selection.best_P[:, None]), torch.ones(5, 1), torch.ones(5, dtype=torch.bool), normaliser=5
    )
    plain = mse_loss(predicted, noise)
    assert_equal(loss, plain)
    assert_equal(*(torch.autograd.grad(value, predicted)[0] for value in (loss, plain)))


def test_the_loss_is_the_mean_over_groups_of_the_mean_over_states_of_weighted_errors() -> None:
    errors, weights = tensor([[1, 2, 3], [4, 5, 6]]), tensor([[1, 1, 1], [2, 0.5, 0]])
    outcome = sft(errors, weights)
    assert outcome.loss.item() == pytest.approx((2 + (8 + 2.5) / 2) / 2)
    assert_equal(outcome.gradient, tensor([[1 / 6, 1 / 6, 1 / 6], [0.5, 0.125, 0]]))
    assert means(outcome.metrics)["sharpening/error_selected"] == pytest.approx(outcome.loss.item())


def test_equal_rewards_train_the_first_sibling_and_are_counted() -> None:
    """D3."""
    selection = select(torch.full((3, 4, 2), 0.7))
    assert selection.best_P.tolist() == [0, 0, 0]
    assert means(selection.metrics)["pairs/tied"] == 1
    errors = normal(3, 4, 2).square()
    chosen = errors[torch.arange(3), selection.best_P]
    assert torch.equal(sft(chosen).loss, sft(errors[:, 0]).loss)


def test_a_group_that_does_not_count_may_hold_anything() -> None:
    errors, usable = normal(3, 2).square(), torch.tensor([True, False, True])
    expected = sft(errors[[0, 2]], normaliser=2)
    errors[1] = math.nan
    outcome = sft(errors, usable_P=usable, normaliser=2)
    assert torch.equal(outcome.loss, expected.loss)
    assert torch.equal(outcome.gradient[[0, 2]], expected.gradient)
    assert outcome.gradient[1].tolist() == [0, 0]
    assert outcome.metrics["sharpening/error_selected"][1] == 2


def test_the_error_of_who_was_not_selected_is_taken_as_that_of_who_was() -> None:
    errors, weights = tensor([[1, 2, 3], [4, 5, math.nan]]), tensor([[1, 1, 1], [2, 0.5, 0]])
    assert_equal(plain_error(errors, weights), tensor([2, (8 + 2.5) / 2]))
    assert plain_error(errors, weights).mean().item() == pytest.approx(sft(errors, weights).loss.item())
    with pytest.raises(ValueError, match="without a visited state"):
        plain_error(errors, torch.zeros(2, 3))


# RLHF.


@pytest.mark.parametrize("num_states", [1, 2, 3])
def test_at_the_reference_the_loss_is_ln_2_for_every_number_of_states(num_states: int) -> None:
    """D5."""
    duel = random_duel(states=num_states)
    duel = replace(duel, error_ref_P2M=duel.error_P2M)
    outcome = rlhf(duel, beta=2500.0)
    assert outcome.loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert means(outcome.metrics)["sharpening/margin"] == 0


def test_a_reference_at_the_first_state_only_leaves_ln_2_where_there_are_more() -> None:
    """D5 for the released code."""
    for num_states, is_ln_2 in ((1, True), (2, False), (3, False)):
        duel = random_duel(states=num_states)
        first = duel.error_P2M[:, :, :1].expand(-1, -1, num_states)
        loss = rlhf(replace(duel, error_ref_P2M=first)).loss.item()
        assert (loss == pytest.approx(math.log(2), rel=1e-12)) == is_ln_2


def test_the_loss_and_its_gradient_have_the_closed_form_without_a_margin() -> None:
    duel = random_duel()
    outcome = rlhf(duel)
    expected, gradient = [], torch.zeros_like(duel.error_P2M)
    for p, num_states in ((0, 3), (1, 1), (2, 3)):
        gain_2 = (duel.error_P2M - duel.error_ref_P2M)[p, :, :num_states].mean(1)
        logit = -1.3 * (gain_2[0] - gain_2[1]).item()
        expected.append(math.log1p(math.exp(-logit)) / 3)
        push = 1.3 / (1 + math.exp(logit)) / num_states / 3
        gradient[p, :, :num_states] = tensor([[push], [-push]])
    assert outcome.loss.item() == pytest.approx(sum(expected), rel=1e-12)
    assert_equal(outcome.gradient, gradient)


def test_with_the_margin_inside_the_loss_has_the_published_numbers() -> None:
    """D6: a reward difference of 0.2 at theta = ref."""
    duel = random_duel(groups=2)
    duel = replace(duel, error_ref_P2M=duel.error_P2M, reward_P2=tensor([[0.9, 0.7], [5, 0]]))
    inside, none = rlhf(duel, margin="inside"), rlhf(duel)
    assert inside.loss.item() == pytest.approx(0.798139, abs=5e-7)
    assert_equal(inside.gradient[0], 1.099668 * none.gradient[0], 5e-7)


def test_outside_the_margin_moves_the_loss_and_not_the_gradient() -> None:
    duel = random_duel()
    outside, none = rlhf(duel, margin="outside"), rlhf(duel)
    gap_P = (duel.reward_P2[:, 0] - duel.reward_P2[:, 1])[:3]
    assert outside.loss.item() - none.loss.item() == pytest.approx(gap_P.mean().item(), rel=1e-12)
    assert torch.equal(outside.gradient, none.gradient)


def test_no_gradient_reaches_the_reference() -> None:
    """Errors of both may come from one array, as where a rank evaluates them together."""
    duel = random_duel()
    error_P4M = torch.cat([duel.error_P2M, duel.error_ref_P2M], dim=1).requires_grad_()
    frozen = (duel.weight_PM, duel.reward_P2, duel.usable_P)
    loss, _ = sharpening_rlhf(*error_P4M.split(2, dim=1), *frozen, beta=1.3, margin="none", normaliser=3)
    loss.backward()
    assert torch.equal(error_P4M.grad[:, :2], rlhf(duel).gradient)
    assert error_P4M.grad[:, 2:].eq(0).all()


@pytest.mark.parametrize("margin", ["none", "inside", "outside"])
def test_a_shift_of_rewards_changes_nothing(margin: str) -> None:
    """D6."""
    duel = random_duel()
    shifted = rlhf(replace(duel, reward_P2=duel.reward_P2 + 7), margin=margin)
    assert_equal(shifted.loss, rlhf(duel, margin=margin).loss)
    assert_equal(shifted.gradient, rlhf(duel, margin=margin).gradient)


def test_swapping_best_and_worst_turns_the_logit_around() -> None:
    duel = random_duel()
    swapped = replace(duel, error_P2M=duel.error_P2M.flip(1), error_ref_P2M=duel.error_ref_P2M.flip(1))
    one, other = rlhf(duel).metrics["sharpening/margin"], rlhf(swapped).metrics["sharpening/margin"]
    assert_equal(one[0], -other[0])


def test_huge_logits_give_finite_losses_and_gradients() -> None:
    for sign in (-1, 1):
        errors = sign * tensor([[[1.0], [0.0]]])
        duel = Duel(errors, torch.zeros_like(errors), torch.ones(1, 1), torch.zeros(1, 2), torch.tensor([True]))
        outcome = rlhf(duel, beta=1e6)
        assert outcome.loss.item() == pytest.approx(1e6 * (sign == 1))
        assert_equal(outcome.gradient.flatten(), 1e6 * (sign == 1) * tensor([1, -1]))


def test_a_lone_candidate_is_ln_2_without_gradient_and_is_skipped() -> None:
    """D2: both columns are one candidate, so a weight moves both errors alike."""
    selection = select(normal(1, 1, 3))
    weight = tensor(0.3).requires_grad_()
    error_P2M = (weight * normal(1, 1, 3)).square().expand(1, 2, 3)
    ref_P2M = normal(1, 1, 3, seed=1).square().expand(1, 2, 3)
    losses = [
        sharpening_rlhf(
            error_P2M, ref_P2M, torch.ones(1, 3), selection.reward_P2, usable, beta=9.0, margin="none", normaliser=1
        )[0]
        for usable in (torch.tensor([True]), selection.usable_P)
    ]
    assert losses[0].item() == pytest.approx(math.log(2), rel=1e-12)
    assert losses[1].item() == 0
    assert all(torch.autograd.grad(loss, weight, retain_graph=True)[0].item() == 0 for loss in losses)
    assert means(selection.metrics)["pairs/tied"] == 1


def test_groups_that_are_not_usable_and_states_that_are_not_there_may_hold_anything() -> None:
    duel = random_duel()
    expected = rlhf(duel, margin="inside")
    duel.error_P2M[3] = duel.error_ref_P2M[3] = duel.reward_P2[3] = math.nan
    duel.error_P2M[1, :, 1:] = duel.error_ref_P2M[1, :, 1:] = math.inf
    outcome = rlhf(duel, margin="inside")
    assert torch.equal(outcome.loss, expected.loss)
    assert torch.equal(outcome.gradient, expected.gradient)
    assert outcome.gradient[3].eq(0).all()
    assert outcome.gradient[1, :, 1:].eq(0).all()


# Both.


def test_ranks_with_unequal_counts_add_up_to_one_rank_with_all_groups() -> None:
    duel = random_duel(groups=6)
    whole = rlhf(duel, margin="inside")
    parts = [rlhf(duel.map("__getitem__", rows), margin="inside", normaliser=5) for rows in ([4, 0], [2], [5, 3, 1])]
    assert_equal(sum(part.loss for part in parts), whole.loss)
    gradient = torch.cat([part.gradient for part in parts])[torch.tensor([4, 0, 2, 5, 3, 1]).argsort()]
    assert_equal(gradient, whole.gradient)
    errors = normal(6, 3).square()
    assert_equal(sft(errors[:1], normaliser=6).loss + sft(errors[1:], normaliser=6).loss, sft(errors).loss)


def test_a_rank_without_groups_has_loss_0_and_takes_part() -> None:
    empty = random_duel().map("__getitem__", slice(0, 0))
    for normaliser in (0, 5):
        assert rlhf(empty, normaliser=normaliser).loss.item() == 0
        assert sft(torch.zeros(0, 3), normaliser=normaliser).loss.item() == 0
    selection = select(torch.zeros(0, 4, 3))
    assert len(selection.best_P) == 0
    assert all(count == 0 for _, count in selection.metrics.values())


def test_where_no_rank_has_a_usable_group_loss_and_gradient_are_0() -> None:
    duel = replace(random_duel(), usable_P=torch.zeros(4, dtype=torch.bool))
    outcome = rlhf(duel, margin="outside")
    assert outcome.loss.item() == 0
    assert outcome.gradient.eq(0).all()


@pytest.mark.parametrize("field", ["error_ref_P2M", "reward_P2"])
def test_a_frozen_input_that_is_not_finite_is_refused(field: str) -> None:
    duel = random_duel()
    getattr(duel, field)[0] = math.nan
    with pytest.raises(ValueError, match="non-finite"):
        rlhf(duel)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_must_be_finite_and_not_negative(weight: float) -> None:
    duel = random_duel()
    duel.weight_PM[0, 0] = weight
    with pytest.raises(ValueError, match="weight"):
        rlhf(duel)
    with pytest.raises(ValueError, match="weight"):
        sft(duel.error_P2M[:, 0], duel.weight_PM)


def test_arguments_that_do_not_fit_are_refused() -> None:
    duel = random_duel()
    with pytest.raises(ValueError, match="weights of shape"):
        rlhf(replace(duel, weight_PM=duel.weight_PM[:, :2]))
    with pytest.raises(ValueError, match="reference"):
        rlhf(replace(duel, error_ref_P2M=duel.error_ref_P2M[:, :, :1]))
    with pytest.raises(ValueError, match="without a visited state"):
        rlhf(replace(duel, weight_PM=torch.zeros_like(duel.weight_PM)))
    with pytest.raises(ValueError, match="normaliser"):
        rlhf(duel, normaliser=2)


# D7: the chosen alone, or all in one pass.


class Denoiser(torch.nn.Module):
    """A small network with a few weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()

    def forward(self, state_NCHW: Tensor, timestep_N: Tensor) -> Tensor:
        """Predicts noise in latents of two entries."""
        features = torch.cat([state_NCHW.flatten(1), timestep_N[:, None] / 1000], dim=1)
        return self.layers(features).view_as(state_NCHW)


def take_excursion(denoiser: Denoiser, rows: Tensor, noise_NCHW: Tensor) -> Visited:
    """Excursions of some of the candidates, with a graph if there is one to keep."""
    start = Start(613, normal(len(noise_NCHW), 2, 1, 1, seed=3)[rows], noise_NCHW[rows])
    schedule = excursion_schedule(PROCESS, 613, Excursion(noise="fresh", num_states=3))
    step_noise_MGCHW = torch.zeros(3, *start.x0_GCHW.shape)
    return walk(denoiser, start, schedule, step_noise_MGCHW, prediction_type="epsilon", wire_dtype=torch.float64)


def errors_of(denoiser: Denoiser, visited: Visited, noise_NCHW: Tensor) -> Tensor:
    """Errors at the visited states, (N, M)."""
    num_candidates, num_states = visited.states_GMCHW.shape[:2]
    predicted = denoiser(visited.states_GMCHW.flatten(0, 1), visited.timestep_M.repeat(num_candidates))
    target = noise_NCHW.repeat_interleave(num_states, 0)
    return (predicted - target).square().flatten(1).mean(1).view(num_candidates, num_states)


@pytest.mark.parametrize("through_steps", [False, True])
@pytest.mark.parametrize("variant", ["sft", "rlhf"])
def test_the_gradient_of_the_chosen_alone_is_that_of_one_pass_over_all_candidates(
    variant: str, through_steps: bool
) -> None:
    num_groups, group_size, denoiser = 4, 3, Denoiser()
    noise_NCHW = normal(num_groups * group_size, 2, 1, 1, seed=4)
    everyone = torch.arange(len(noise_NCHW)).view(num_groups, group_size)
    with torch.no_grad():
        rollout = take_excursion(denoiser, everyone.flatten(), noise_NCHW)
    selection = select(rollout.x0hat_GMCHW.flatten(2).sum(2).view(num_groups, group_size, 3))
    chosen_P2 = torch.stack([selection.best_P, selection.worst_P], dim=1)

    def gradient(rows_PN: Tensor, column_P2: Tensor) -> Tensor:
        rows = rows_PN.flatten()
        visited = take_excursion(denoiser, rows, noise_NCHW)
        if not through_steps:
            visited = replace(visited, states_GMCHW=rollout.states_GMCHW[rows])
        error_PNM = errors_of(denoiser, visited, noise_NCHW[rows]).view(*rows_PN.shape, 3)
        error_P2M = error_PNM.gather(1, column_P2[:, :, None].expand(-1, -1, 3))
        loss, _ = loss_of(error_P2M)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(denoiser.parameters()))])

    def loss_of(error_P2M: Tensor) -> tuple[Tensor, Metrics]:
        weight_PM, usable_P = torch.ones(num_groups, 3), selection.usable_P
        if variant == "sft":
            return sharpening_sft(error_P2M[:, 0], weight_PM, usable_P, normaliser=num_groups)
        frozen = (torch.zeros_like(error_P2M), weight_PM, selection.reward_P2, usable_P)
        return sharpening_rlhf(error_P2M, *frozen, beta=2.0, margin="inside", normaliser=num_groups)

    one_pass = gradient(everyone, chosen_P2)
    alone = gradient(everyone.gather(1, chosen_P2), torch.tensor([[0, 1]]).expand(num_groups, 2))
    assert one_pass.abs().max() > 1e-3
    assert_equal(alone, one_pass, 1e-9)
