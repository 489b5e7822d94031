"""The PRDP loss against closed forms and invariances: P-T1, P-T8 to P-T10, P-T12."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms.metrics import Metrics
from learner.algorithms.prdp import prdp, summarise
from learner.two_pass import differentiate
from protocol.algorithms import Prdp
from tests.learner.toy_chains import papers_settings

REDUCTIONS = list(itertools.product(["latent_mean", "latent_sum"], ["time_mean", "time_sum"]))
rewards = st.lists(st.floats(-3, 3), min_size=2, max_size=6)


@dataclass(frozen=True)
class Round:
    """What the loss is a function of: log-probabilities under theta, old and ref, the mask, the rewards."""

    log_prob_PGT: Tensor
    old_PGT: Tensor
    ref_PGT: Tensor
    scored_PT: Tensor
    reward_PG: Tensor

    def map(self, function: str, *arguments: object) -> Round:
        """Applies a tensor method to every tensor."""
        return Round(*(getattr(tensor, function)(*arguments) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Outcome:
    """The loss, its gradient in the log-probabilities, and the metrics."""

    loss: Tensor
    gradient_PGT: Tensor
    metrics: Metrics


def evaluate(round_: Round, settings: Prdp, *, num_entries: int = 1, normaliser: int | None = None) -> Outcome:
    """Runs the loss as the learner does."""

    def loss(log_prob_PGT: Tensor) -> tuple[Tensor, Metrics]:
        return prdp(
            log_prob_PGT,
            round_.old_PGT,
            round_.ref_PGT,
            round_.scored_PT,
            round_.reward_PG,
            settings=settings,
            num_latent_entries=num_entries,
            normaliser=len(round_.reward_PG) if normaliser is None else normaliser,
        )

    return Outcome(*differentiate(loss, round_.log_prob_PGT))


def tensor(values: object) -> Tensor:
    """Numbers in fp64."""
    return torch.tensor(values, dtype=torch.float64)


def from_ratios(ratio_PGT: Tensor, reward_PG: Tensor, old_ratio_PGT: Tensor | None = None) -> Round:
    """A round with given log-ratios to ref, all steps scored; old is ref unless given."""
    old = torch.zeros_like(ratio_PGT) if old_ratio_PGT is None else old_ratio_PGT
    scored_PT = torch.ones(ratio_PGT.shape[0], ratio_PGT.shape[2], dtype=torch.bool)
    return Round(ratio_PGT - 7.0, old - 7.0, torch.full_like(ratio_PGT, -7.0), scored_PT, reward_PG)


def random_round(*, groups: int = 3, siblings: int = 4, steps: int = 5, seed: int = 0) -> Round:
    """A round in which theta, old and ref all differ and the last step is unscored."""
    generator = torch.Generator().manual_seed(seed)
    shape = (groups, siblings, steps)
    ref, old, now = 50 * torch.randn((3, *shape), generator=generator, dtype=torch.float64)
    old, now = ref + old / 50, ref + old / 50 + now / 100
    scored_PT = torch.ones(groups, steps, dtype=torch.bool)
    scored_PT[:, -1] = False
    return Round(now, old, ref, scored_PT, torch.randn(groups, siblings, generator=generator))


def means(metrics: Metrics) -> dict[str, float]:
    """Metrics divided by their counts."""
    return {name: (total / count).item() for name, (total, count) in metrics.items()}


def assert_equal(one: Tensor, other: Tensor, tolerance: float = 1e-9) -> None:
    """Equal up to an absolute tolerance."""
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance, check_dtype=False)


# P-T1: loss and gradient without a window.


def test_the_loss_has_the_published_numbers() -> None:
    round_ = from_ratios(tensor([[[0.2], [-0.1], [0.4]]]), tensor([[1, 0, 0.5]]))
    outcome = evaluate(round_, papers_settings(kl_weight=2.0))
    assert outcome.loss.item() == pytest.approx(0.101667, abs=5e-7)
    assert_equal(outcome.gradient_PGT.flatten(), tensor([-0.43333, -0.03333, 0.46667]), 5e-6)


@given(rewards, st.floats(0.1, 10), st.integers(1, 4), st.integers(0, 99))
def test_the_loss_is_twice_the_variance_of_the_log_ratio_minus_the_scaled_reward(
    reward_G: list[float], kl_weight: float, num_steps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ratio_PGT = torch.randn(1, len(reward_G), num_steps, generator=generator, dtype=torch.float64)
    outcome = evaluate(from_ratios(ratio_PGT, tensor([reward_G])), papers_settings(kl_weight=kl_weight))
    u_G = ratio_PGT.sum(2)[0] - tensor(reward_G) / kl_weight
    assert outcome.loss.item() == pytest.approx(2 * u_G.var().item(), rel=1e-9, abs=1e-9)
    gradient_G = 4 / (len(reward_G) - 1) * (u_G - u_G.mean())
    assert_equal(outcome.gradient_PGT[0], gradient_G[:, None].expand(-1, num_steps), 1e-9)


@pytest.mark.parametrize("tie_policy", ["keep", "drop"])
def test_without_ties_the_loss_is_the_papers_listing(tie_policy: str) -> None:
    """Supplement G: the mean over ordered pairs with a positive reward difference, time and latent means."""
    round_, num_entries = random_round(groups=1), 16
    log_ratio_GT = (round_.log_prob_PGT - round_.ref_PGT)[0, :, :-1] / num_entries
    old_GT = (round_.old_PGT - round_.ref_PGT)[0, :, :-1] / num_entries
    clipped_GT = torch.minimum(torch.maximum(log_ratio_GT, old_GT - 0.01), old_GT + 0.01)
    difference_GG = round_.reward_PG[0].double()[:, None] - round_.reward_PG[0].double()[None]
    errors = []
    for ratio_G in (log_ratio_GT.mean(1), clipped_GT.mean(1)):
        errors.append((ratio_G[:, None] - ratio_G[None] - difference_GG / 0.5).square())
    expected = torch.maximum(*errors)[difference_GG > 0].mean()
    settings = Prdp(name="prdp", kl_weight=0.5, clip_eps=0.01, loss_scale="none", tie_policy=tie_policy)
    outcome = evaluate(round_, settings, num_entries=num_entries)
    assert means(outcome.metrics)["prdp/saturated_fraction"] > 0
    assert outcome.loss.item() == pytest.approx(expected.item(), rel=1e-12)


# P-T8: the first step of a run.


def test_at_the_reference_the_gradient_is_a_leave_one_out_policy_gradient() -> None:
    reward_PG = tensor([[1, 0, 0.5, 0.25]])
    round_ = from_ratios(torch.zeros(1, 4, 3, dtype=torch.float64), reward_PG)
    outcome = evaluate(round_, papers_settings(kl_weight=0.5, clip_eps=1e-6))
    assert outcome.loss.item() == pytest.approx(1.458333, abs=5e-7)
    expected_G = tensor([-1.5, 1.166667, -0.166667, 0.5])
    assert_equal(outcome.gradient_PGT[0], expected_G[:, None].expand(4, 3), 5e-7)
    assert means(outcome.metrics)["prdp/saturated_fraction"] == 0


@pytest.mark.parametrize(("latent_reduce", "time_reduce"), REDUCTIONS)
def test_where_theta_is_old_the_window_changes_neither_loss_nor_gradient(latent_reduce: str, time_reduce: str) -> None:
    round_ = random_round()
    round_ = replace(round_, log_prob_PGT=round_.old_PGT)
    with_window, without = (
        evaluate(
            round_,
            papers_settings(clip_eps=clip_eps, latent_reduce=latent_reduce, time_reduce=time_reduce),
            num_entries=16,
        )
        for clip_eps in (1e-6, None)
    )
    assert torch.equal(with_window.loss, without.loss)
    assert torch.equal(with_window.gradient_PGT, without.gradient_PGT)


# P-T9: the gate.


def gate(first: Sequence[float], second: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Gradients with and without the window of two siblings with the given log-ratios; the first is better."""
    round_ = from_ratios(tensor([[first, second]]), tensor([[1, 0]]))
    settings = papers_settings(kl_weight=0.7, clip_eps=0.1)
    free = papers_settings(kl_weight=0.7)
    return evaluate(round_, settings).gradient_PGT[0], evaluate(round_, free).gradient_PGT[0]


def test_a_step_that_moved_far_the_right_way_gets_no_gradient() -> None:
    gated_GT, _ = gate((0.3, 0.05), (0, 0))
    assert_equal(gated_GT, tensor([[0, -2.557], [2.557, 2.557]]), 1e-3)


def test_siblings_that_both_moved_far_the_right_way_get_no_gradient() -> None:
    gated_GT, free_GT = gate((0.3, 0.2), (-0.2, -0.3))
    assert torch.equal(gated_GT, torch.zeros_like(gated_GT))
    assert (free_GT != 0).all()


def test_siblings_that_both_moved_far_the_wrong_way_get_the_full_gradient_on_every_step() -> None:
    gated_GT, free_GT = gate((-0.3, -0.2), (0.2, 0.3))
    assert torch.equal(gated_GT, free_GT)
    assert (gated_GT[0] < 0).all()
    assert (gated_GT[1] > 0).all()


def test_the_window_is_centred_on_old_and_not_on_the_reference() -> None:
    ratio_PGT, reward_PG = tensor([[[5.1], [3.0]]]), tensor([[40.0, 0.0]])
    inside = evaluate(from_ratios(ratio_PGT, reward_PG, tensor([[[5.0], [3.0]]])), papers_settings(clip_eps=0.2))
    outside = evaluate(from_ratios(ratio_PGT, reward_PG, tensor([[[4.0], [3.0]]])), papers_settings(clip_eps=0.2))
    assert means(inside.metrics)["prdp/saturated_fraction"] == 0
    assert (inside.gradient_PGT != 0).all()
    assert means(outside.metrics)["prdp/saturated_fraction"] == 0.5
    assert outside.gradient_PGT[0, 0] == 0


def test_the_maximum_is_taken_for_each_pair() -> None:
    """Pair (0, 1) overshot its target, so its free error is the larger; for pair (0, 2) it is the clipped one."""
    ratio_G, reward_G, clip = tensor([0.9, 0.0, 0.0]), tensor([0.5, 0.0, -9.0]), 0.2
    clipped_G = ratio_G.clamp(-clip, clip)
    pair_losses = [
        max(
            (ratio_G[i] - ratio_G[j] - reward_G[i] + reward_G[j]).square(),
            (clipped_G[i] - clipped_G[j] - reward_G[i] + reward_G[j]).square(),
        )
        for i, j in itertools.combinations(range(3), 2)
    ]
    outcome = evaluate(
        from_ratios(ratio_G.view(1, 3, 1), reward_G[None]), papers_settings(clip_eps=clip, kl_weight=1.0)
    )
    assert outcome.loss.item() == pytest.approx(sum(pair_losses).item() / 3, rel=1e-12)
    assert means(outcome.metrics)["prdp/pair_clipped_fraction"] == pytest.approx(1 / 3)


# P-T10: degenerate inputs, line by line.


def test_one_sibling_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2, these have 1"):
        evaluate(random_round(siblings=1), papers_settings())


def test_a_group_without_a_scored_step_is_refused() -> None:
    round_ = random_round()
    round_.scored_PT[1] = False
    with pytest.raises(ValueError, match="a deterministic sampler has none"):
        evaluate(round_, papers_settings())


@pytest.mark.parametrize(("field", "name"), [("old_PGT", "old"), ("ref_PGT", "ref"), ("reward_PG", "reward")])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_frozen_inputs_are_refused_by_name(field: str, name: str, value: float) -> None:
    round_ = random_round()
    getattr(round_, field)[0, 0] = value
    with pytest.raises(ValueError, match=f"non-finite {name}"):
        evaluate(round_, papers_settings())


def test_a_group_of_equal_rewards_with_ties_dropped_gives_exactly_nothing() -> None:
    round_ = replace(random_round(groups=1), reward_PG=torch.full((1, 4), 0.3))
    outcome = evaluate(round_, papers_settings(tie_policy="drop", clip_eps=0.01))
    assert outcome.loss == 0
    assert torch.equal(outcome.gradient_PGT, torch.zeros_like(outcome.gradient_PGT))


def test_a_tied_group_with_ties_dropped_still_counts_in_the_normaliser() -> None:
    round_ = random_round(groups=2)
    tied = replace(round_, reward_PG=torch.stack([round_.reward_PG[0], torch.ones(4)]))
    settings = papers_settings(tie_policy="drop")
    alone = evaluate(round_.map("narrow", 0, 0, 1), settings)
    assert evaluate(tied, settings).loss == alone.loss / 2


def test_a_group_of_equal_rewards_with_ties_kept_draws_its_siblings_together() -> None:
    ratio_PGT = tensor([[[0.5], [-0.2], [0.1]]])
    outcome = evaluate(from_ratios(ratio_PGT, tensor([[0.3, 0.3, 0.3]])), papers_settings(tie_policy="keep"))
    assert outcome.loss.item() == pytest.approx(2 * ratio_PGT.var().item(), rel=1e-12)
    after = evaluate(
        from_ratios(ratio_PGT - 0.1 * outcome.gradient_PGT, tensor([[0.3, 0.3, 0.3]])),
        papers_settings(tie_policy="keep"),
    )
    assert after.loss < outcome.loss


@pytest.mark.parametrize("tie_policy", ["keep", "drop"])
@pytest.mark.parametrize("clip_eps", [None, 0.0, 1e-6])
def test_equal_rewards_at_the_start_of_a_run_give_exactly_nothing(tie_policy: str, clip_eps: float | None) -> None:
    round_ = from_ratios(torch.zeros(2, 4, 3, dtype=torch.float64), torch.full((2, 4), -1.5))
    outcome = evaluate(round_, papers_settings(tie_policy=tie_policy, clip_eps=clip_eps))
    assert outcome.loss == 0
    assert torch.equal(outcome.gradient_PGT, torch.zeros_like(outcome.gradient_PGT))


def test_with_some_ties_dropped_the_mean_is_over_the_remaining_pairs() -> None:
    ratio_G, reward_G = tensor([0.3, -0.2, 0.1]), tensor([1.0, 1.0, 0.0])
    outcome = evaluate(from_ratios(ratio_G.view(1, 3, 1), reward_G[None]), papers_settings(tie_policy="drop"))
    kept = [(ratio_G[i] - ratio_G[2] - 1).square() for i in (0, 1)]
    assert outcome.loss.item() == pytest.approx((sum(kept) / 2).item(), rel=1e-12)
    assert means(outcome.metrics)["pairs/tied"] == pytest.approx(1 / 3)


def test_a_window_of_zero_leaves_gradient_only_to_pairs_that_moved_the_wrong_way() -> None:
    settings = papers_settings(clip_eps=0.0)
    right = evaluate(from_ratios(tensor([[[0.1], [-0.1]]]), tensor([[1, 0]])), settings)
    wrong = evaluate(from_ratios(tensor([[[-0.1], [0.1]]]), tensor([[1, 0]])), settings)
    free = evaluate(from_ratios(tensor([[[-0.1], [0.1]]]), tensor([[1, 0]])), papers_settings())
    assert torch.equal(right.gradient_PGT, torch.zeros_like(right.gradient_PGT))
    assert torch.equal(wrong.gradient_PGT, free.gradient_PGT)
    assert means(right.metrics)["prdp/saturated_fraction"] == 1


def test_metrics_have_their_closed_forms() -> None:
    ratio_G, reward_G, kl_weight = tensor([0.3, -0.2, 0.1]), tensor([1.0, 0.0, 0.0]), 0.5
    round_ = from_ratios(ratio_G.view(1, 3, 1), reward_G[None])
    outcome = evaluate(round_, papers_settings(kl_weight=kl_weight, clip_eps=0.15))
    rho_Q, target_Q = tensor([0.5, 0.2, -0.3]), tensor([1.0, 1.0, 0.0]) / kl_weight
    correlation = (rho_Q @ target_Q) / (rho_Q.norm() * target_Q.norm())
    expected = {
        "prdp/pair_correlation": correlation.item(),
        "prdp/regime_ratio": (rho_Q.abs().mean() / target_Q.abs().mean()).item(),
        "prdp/target_abs_mean": target_Q.abs().mean().item(),
        "prdp/saturated_fraction": 2 / 3,
        # Pairs (0, 1) and (0, 2) still have far to go, so clipping them back makes their error larger.
        "prdp/pair_clipped_fraction": 2 / 3,
        "pairs/tied": 1 / 3,
    }
    assert summarise(means(outcome.metrics)) == pytest.approx(expected)


def test_metrics_of_a_round_without_any_signal_are_finite() -> None:
    round_ = from_ratios(torch.zeros(1, 2, 1, dtype=torch.float64), torch.zeros(1, 2))
    summary = summarise(means(evaluate(round_, papers_settings()).metrics))
    assert summary["prdp/pair_correlation"] == summary["prdp/regime_ratio"] == 0
    assert summary["pairs/tied"] == 1


# P-T12: the policy gradient that PRDP begins with.


@pytest.mark.parametrize(("latent_reduce", "time_reduce"), REDUCTIONS)
def test_a_quarter_of_beta_times_the_first_gradient_is_the_leave_one_out_policy_gradient(
    latent_reduce: str, time_reduce: str
) -> None:
    """The policy gradient is of mean(-advantage * ratio), ratio exp(change of log-probability) in the same
    reductions, at ratio 1."""
    round_, num_entries = random_round(), 16
    round_ = replace(round_, log_prob_PGT=round_.ref_PGT, old_PGT=round_.ref_PGT)
    settings = Prdp(name="prdp", kl_weight=0.3, clip_eps=1e-6, latent_reduce=latent_reduce, time_reduce=time_reduce)
    log_prob = round_.ref_PGT.clone().requires_grad_()
    divisor = num_entries if latent_reduce == "latent_mean" else 1
    ratio_PGT = torch.exp((log_prob - round_.ref_PGT)[..., :-1] / divisor)
    num_siblings = round_.reward_PG.shape[1]
    reward_PG = round_.reward_PG.double()
    others_PG = (reward_PG.sum(1, keepdim=True) - reward_PG) / (num_siblings - 1)
    gain_PGT = -(reward_PG - others_PG)[..., None] * ratio_PGT
    gain_PG = gain_PGT.mean(2) if time_reduce == "time_mean" else gain_PGT.sum(2)
    (expected_PGT,) = torch.autograd.grad(gain_PG.mean(), log_prob)
    outcome = evaluate(round_, settings, num_entries=num_entries)
    assert_equal(outcome.gradient_PGT, expected_PGT, 1e-12)


# Invariances of every method (0.5) and conversions of the KL weight (0.3).

SETTINGS = [
    papers_settings(kl_weight=0.5, clip_eps=0.3),
    papers_settings(kl_weight=0.5, clip_eps=0.05, latent_reduce="latent_mean", time_reduce="time_mean"),
    Prdp(name="prdp", kl_weight=0.5, clip_eps=0.05, tie_policy="drop"),
]


@pytest.mark.parametrize("settings", SETTINGS)
@given(seed=st.integers(0, 99))
def test_permuting_siblings_permutes_the_gradient(settings: Prdp, seed: int) -> None:
    round_ = random_round(seed=seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    permuted = replace(round_.map("clone"), reward_PG=round_.reward_PG[:, order])
    permuted = replace(
        permuted, **{name: getattr(round_, name)[:, order] for name in ("log_prob_PGT", "old_PGT", "ref_PGT")}
    )
    one, other = evaluate(round_, settings, num_entries=4), evaluate(permuted, settings, num_entries=4)
    assert_equal(other.loss, one.loss)
    assert_equal(other.gradient_PGT, one.gradient_PGT[:, order])


@pytest.mark.parametrize("settings", SETTINGS)
def test_permuting_groups_permutes_the_gradient(settings: Prdp) -> None:
    round_ = random_round()
    one, other = evaluate(round_, settings), evaluate(round_.map("flip", 0), settings)
    assert_equal(other.loss, one.loss)
    assert_equal(other.gradient_PGT, one.gradient_PGT.flip(0))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("first", [1, 2])
def test_groups_dealt_to_ranks_add_up_to_the_whole_round(settings: Prdp, first: int) -> None:
    round_ = random_round()
    whole = evaluate(round_, settings)
    ranks = [
        evaluate(round_.map("narrow", 0, start, count), settings, normaliser=3)
        for start, count in ((0, first), (first, 3 - first))
    ]
    assert_equal(ranks[0].loss + ranks[1].loss, whole.loss)
    assert_equal(torch.cat([rank.gradient_PGT for rank in ranks]), whole.gradient_PGT)
    for name, total in whole.metrics.items():
        assert_equal(sum(rank.metrics[name] for rank in ranks), total)


@pytest.mark.parametrize("settings", SETTINGS)
def test_unscored_steps_have_no_influence(settings: Prdp) -> None:
    round_ = random_round()
    changed = round_.map("clone")
    for log_prob_PGT in (changed.log_prob_PGT, changed.old_PGT, changed.ref_PGT):
        log_prob_PGT[..., -1] = torch.randn(3, 4, dtype=torch.float64)
    one, other = evaluate(round_, settings), evaluate(changed, settings)
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.gradient_PGT, other.gradient_PGT)
    assert (one.gradient_PGT[..., -1] == 0).all()


@pytest.mark.parametrize("settings", SETTINGS)
def test_only_reward_differences_within_a_group_count(settings: Prdp) -> None:
    """The offsets are powers of two, so that adding them is exact."""
    round_ = random_round()
    round_ = replace(round_, reward_PG=(round_.reward_PG * 64).round() / 64)
    shifted = replace(round_, reward_PG=round_.reward_PG + torch.tensor([[8.0], [-4.0], [16.0]]))
    one, other = evaluate(round_, settings), evaluate(shifted, settings)
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.gradient_PGT, other.gradient_PGT)


@pytest.mark.parametrize(("latent_reduce", "time_reduce"), REDUCTIONS)
def test_reductions_convert_the_kl_weight_and_the_window(latent_reduce: str, time_reduce: str) -> None:
    """w under means is w / (D T) under sums, and the loss D T times smaller, both being a quarter of beta."""
    round_, num_entries = random_round(), 16
    latent = num_entries if latent_reduce == "latent_mean" else 1
    time = 4 if time_reduce == "time_mean" else 1
    reduced = Prdp(
        name="prdp",
        kl_weight=2.0,
        clip_eps=0.3 / latent,
        latent_reduce=latent_reduce,
        time_reduce=time_reduce,
    )
    summed = papers_settings(kl_weight=2.0 / (latent * time), clip_eps=0.3, loss_scale="quarter_beta")
    one, other = evaluate(round_, reduced, num_entries=num_entries), evaluate(round_, summed)
    assert_equal(one.loss * latent * time, other.loss)
    assert_equal(one.gradient_PGT * latent * time, other.gradient_PGT)
    assert summarise(means(one.metrics))["prdp/saturated_fraction"] == pytest.approx(
        summarise(means(other.metrics))["prdp/saturated_fraction"]
    )


def test_the_loss_scale_multiplies_the_loss_and_nothing_else() -> None:
    round_ = random_round()
    plain = evaluate(round_, papers_settings(kl_weight=0.5))
    scaled = evaluate(round_, papers_settings(kl_weight=0.5, loss_scale="quarter_beta"))
    assert_equal(scaled.loss, plain.loss / 8, 1e-12)
    assert_equal(scaled.gradient_PGT, plain.gradient_PGT / 8, 1e-12)
    assert means(scaled.metrics) == means(plain.metrics)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_gradient_is_that_of_finite_differences(settings: Prdp) -> None:
    round_ = random_round(groups=2)
    outcome = evaluate(round_, settings, num_entries=4)
    step = 1e-6
    for index in itertools.product(range(2), range(4), range(5)):
        losses = []
        for sign in (1, -1):
            moved = round_.log_prob_PGT.clone()
            moved[index] += sign * step
            losses.append(evaluate(replace(round_, log_prob_PGT=moved), settings, num_entries=4).loss)
        slope = (losses[0] - losses[1]) / (2 * step)
        assert slope.item() == pytest.approx(outcome.gradient_PGT[index].item(), rel=1e-4, abs=1e-6)


def test_metrics_carry_no_graph() -> None:
    round_ = random_round()
    log_prob = round_.log_prob_PGT.clone().requires_grad_()
    _, metrics = prdp(
        log_prob,
        round_.old_PGT,
        round_.ref_PGT,
        round_.scored_PT,
        round_.reward_PG,
        settings=papers_settings(clip_eps=0.1),
        num_latent_entries=1,
        normaliser=3,
    )
    assert not any(value.requires_grad for value in metrics.values())
    assert {value.dtype for value in metrics.values()} == {torch.float64}
