"""What the updater on images makes of errors: items that are dropped or dead, the encoder's gain, a matched beta."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import learner.images
from learner.images import with_gain
from learner.probes import PerceptualProbe, TargetProbe
from learner.units import draw_timestep
from protocol.errors import TrainingError
from protocol.groups import Group
from tests.learner.updater_bench import LN_2, Bench, Wrapped, latents, make_group, same

pytestmark = pytest.mark.usefixtures("gang_of_one")

FAR = 50.0
"""A mean that shows through any noise."""


def pair(index: int) -> Group:
    """A dataset's pair."""
    return make_group(index, pair_x0_2CHW=latents(index, 2))


def far_pair(index: int) -> Group:
    """A pair of which the loser lies where `blind` encoders see nothing."""
    return make_group(index, pair_x0_2CHW=latents(index, 2) + np.array([0, FAR], np.float16)[:, None, None, None])


def blind(encoder: Any) -> Wrapped:
    """An encoder that has no features of what is far."""
    return Wrapped(encoder, lambda feature, state: torch.where(is_far(state)[:, None, None, None], 0.0, feature))


def is_far(state: Tensor) -> Tensor:
    """Signal levels are 0.068 at least."""
    return state.mean((1, 2, 3)) > 2


def dark(encoder: Any) -> Wrapped:
    """An encoder that has no features at all."""
    return Wrapped(encoder, lambda feature, state: 0.0 * feature)


def louder(factor: float) -> Any:
    """Encoders with features so many times as large."""
    return lambda encoder: Wrapped(encoder, lambda feature, state: factor * feature)


def ncp(name: str = "ncp_dpo", *, norm: str = "relative", blocks: str = "down", **settings: Any) -> dict[str, Any]:
    """An algorithm on features; with a beta where there is one."""
    beta = {} if name == "ncp_sft" else {"beta_full": 1e4}
    return {"name": name, **beta, **settings, "perception": {"norm": norm, "blocks": blocks}}


# --- what cannot be divided by ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ncp_dpo", "ncp_cpo"])
def test_a_pair_with_a_target_without_features_is_as_if_it_were_not_there(tiny_model: str, name: str) -> None:
    """Loss, gradient and weights to the last bit: its weight is 0 and the normaliser does not count it."""
    whole, part = (Bench(tiny_model, ncp(name), micro_batch_size=2) for _ in range(2))
    for bench in (whole, part):
        bench.wrap_encoder(blind)
        bench.move_weights()
    one = whole.learn([pair(0), far_pair(1), pair(2)], round_=1)
    other = part.learn([pair(0), pair(2)], round_=1)
    assert same(whole.weights(), part.weights())
    assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    (details,), (expected,) = one.details, other.details
    assert details.pop("ncp/dead_items") == pytest.approx(1 / 6)
    assert expected.pop("ncp/dead_items") == 0
    assert details == expected


def test_whatever_is_dropped_the_loss_at_the_reference_is_ln_2(tiny_model: str) -> None:
    """Of all pairs of three siblings, a third each, two are dropped, and the one that is left counts for a third."""
    bench = Bench(tiny_model, ncp(pairs={"rule": "all_pairs"}))
    bench.wrap_encoder(blind)
    x0_GCHW, rewards = latents(0, 3), np.array([0.9, 0.5, 0.1], np.float32)
    x0_GCHW[1] += np.float16(FAR)
    report = bench.learn([make_group(0, x0_GCHW=x0_GCHW, reward_G=rewards)])
    assert report.loss[0] == pytest.approx(LN_2, abs=1e-12)
    # Of six latents, two a pair, sibling 1 is two.
    assert report.details[0]["ncp/dead_items"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["ncp_sft", "ncp_dpo", "ncp_cpo"])
def test_where_nothing_has_features_no_step_is_taken(tiny_model: str, name: str) -> None:
    """AdamW would still decay weights."""
    bench = Bench(tiny_model, ncp(name))
    bench.wrap_encoder(dark)
    bench.move_weights()
    before = bench.weights()
    report = bench.learn([pair(0), pair(1)], round_=1)
    assert same(before, bench.weights())
    assert (report.loss, report.grad_norm, report.skipped) == ([0.0], [0.0], 1)
    assert report.details[0]["ncp/dead_items"] == 1
    assert all(math.isfinite(number) for number in report.details[0].values())


def test_without_division_nothing_is_dropped(tiny_model: str) -> None:
    bench = Bench(tiny_model, ncp(norm="none"))
    bench.wrap_encoder(dark)
    report = bench.learn([pair(0), pair(1)])
    assert report.loss[0] == pytest.approx(LN_2, abs=1e-12)
    assert report.details[0]["ncp/dead_items"] == report.skipped == 0


def test_at_timestep_0_an_image_is_counted_as_dead_and_its_error_of_0_counts(tiny_model: str) -> None:
    bench, alone = (Bench(tiny_model, ncp("ncp_sft", norm="none", min_tau=0)) for _ in range(2))
    seed = bench.recipe.seed
    zero = next(i for i in range(1, 10000) if draw_timestep(seed, 0, 1000, f"000000-{i:04d}", 0, 0) == 0)
    one = bench.learn([pair(0), pair(zero)])
    other = alone.learn([pair(0)])
    assert one.loss[0] == pytest.approx(other.loss[0] / 2, rel=1e-3)
    assert (one.details[0]["ncp/dead_items"], other.details[0]["ncp/dead_items"]) == (0.5, 0)


def test_dividing_encodes_no_target_twice(tiny_model: str) -> None:
    """N14: as the table of algorithms.md 7.2 has it, and once more before the first step of a run."""
    costs = []
    for norm in ("none", "relative"):
        bench = Bench(tiny_model, ncp(norm=norm))
        bench.learn([pair(0), pair(1), pair(2)], round_=1)
        costs.append(bench.updater.costs)
    assert costs[0] == costs[1]
    assert costs[0].encoder_forward == 3 * (4 + 2)


def test_features_that_were_kept_give_the_errors_that_encoding_again_gives(tiny_model: str) -> None:
    bench = Bench(tiny_model, ncp(norm="relative", blocks="multi", shared_noise=False))
    bench.move_weights()
    updater: Any = bench.updater
    units = updater._units([pair(i) for i in range(3)])
    probe = updater._probe(units, 0)
    targets, place_31 = TargetProbe(probe), torch.arange(3)[:, None]
    descent = updater._tools.descent
    with torch.no_grad():
        assert descent.evaluate(targets, bench.engine.denoiser, place_31).all()
        known = targets.encoded()
        num_before = bench.updater.costs.encoder_forward
        for order in ([0, 1, 2], [2, 0], [1]):
            items = torch.tensor(order)[:, None]
            one, other = (each(bench.policy.denoiser, items) for each in (known, probe))
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    assert bench.updater.costs.encoder_forward - num_before == 6 * (4 + 6)
    # A filler has no features of its own; nobody reads its errors.
    assert torch.isfinite(known(bench.policy.denoiser, known.filler_1K)).all()


# --- the encoder's gain -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "factor"), [("ncp_sft", 3.0), ("ncp_dpo", 1.0)])
def test_the_gain_of_the_latent_times_a_factor_is_its_square(tiny_model: str, name: str, factor: float) -> None:
    """N2: identity features have k^2 times the error in noise."""
    bench = Bench(tiny_model, ncp(name, norm="none", blocks="identity"))
    bench.wrap_encoder(louder(factor))
    report = bench.learn([pair(i) for i in range(4)])
    assert report.details[0]["ncp/encoder_gain"] == pytest.approx(factor**2, rel=1e-4)


def test_where_every_error_is_0_there_is_no_gain() -> None:
    assert with_gain({"loss": 1.0, "ncp/error": 0.0, "ncp/identity_error": 0.0}) == {"loss": 1.0}
    assert with_gain({"loss": 1.0, "ncp/error": 6.0, "ncp/identity_error": 2.0}) == {"loss": 1.0, "ncp/encoder_gain": 3}


# --- a beta that is matched on the base -------------------------------------------------------------------


def matched(bench: Bench, num_pairs: int = 4, round_: int = 0) -> float:
    """The beta that a round's steps have."""
    details = bench.learn([pair(i) for i in range(num_pairs)], round_).details
    assert len({row["ncp/beta_full"] for row in details}) == 1
    return details[0]["ncp/beta_full"]


@pytest.fixture
def few_matched(monkeypatch: pytest.MonkeyPatch) -> int:
    """Latents that are enough to match on; 1024 take seconds."""
    monkeypatch.setattr(learner.images, "NUM_MATCHED", 20)
    return 20


@pytest.mark.parametrize("name", ["ncp_dpo", "ncp_cpo"])
@pytest.mark.usefixtures("few_matched")
def test_errors_in_noise_are_matched_by_dpos_own_beta(tiny_model: str, name: str) -> None:
    """Divided by k^2, identity features have the errors in noise."""
    bench = Bench(tiny_model, ncp(name, norm="k2", blocks="identity", beta_full="match_dpo"))
    assert matched(bench) == pytest.approx(2500, rel=1e-4)


@pytest.mark.usefixtures("few_matched")
def test_louder_features_get_a_beta_that_is_smaller_by_the_square(tiny_model: str) -> None:
    """So that beta times error, and with it every logit and update, stays."""
    benches = [Bench(tiny_model, ncp(norm="none", beta_full="match_dpo", num_updates=3)) for _ in range(2)]
    benches[1].wrap_encoder(louder(4.0))
    quiet, loud = (matched(bench) for bench in benches)
    assert loud == pytest.approx(quiet / 16, rel=1e-6)
    for name, tensor in benches[0].weights().items():
        torch.testing.assert_close(benches[1].weights()[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("few_matched")
def test_matching_asks_the_base_whatever_the_weights_and_the_micro_batches(tiny_model: str) -> None:
    settings = ncp(norm="relative", beta_full="match_dpo")
    bench, moved, rebatched = (Bench(tiny_model, settings, micro_batch_size=size) for size in (60, 60, 14))
    moved.move_weights()
    beta = matched(bench)
    assert matched(moved, round_=1) == beta
    assert matched(rebatched) == pytest.approx(beta, rel=1e-5)


def test_as_many_latents_as_asked_or_more_are_matched_on_once_in_a_run(tiny_model: str, few_matched: int) -> None:
    bench = Bench(tiny_model, ncp(norm="none", beta_full="match_dpo"))
    beta = matched(bench, num_pairs=3)
    # Of six latents four times over; then filler and three pairs, of policy and reference.
    assert bench.updater.costs.unet_forward == math.ceil(few_matched / 6) * 6 + (1 + 3) * 4
    assert matched(bench, num_pairs=4) == beta


@pytest.mark.usefixtures("few_matched")
def test_a_resumed_run_keeps_what_was_matched(tiny_model: str) -> None:
    settings = ncp(norm="none", beta_full="match_dpo")
    bench, resumed = Bench(tiny_model, settings), Bench(tiny_model, settings)
    beta = matched(bench)
    resumed.updater.load_state(json.loads(json.dumps(bench.updater.state())))
    assert resumed.learn([pair(7)], round_=1).details[0]["ncp/beta_full"] == beta
    assert resumed.updater.costs.unet_forward == 4


@pytest.mark.usefixtures("few_matched")
def test_features_without_any_error_cannot_be_matched(tiny_model: str) -> None:
    bench = Bench(tiny_model, ncp(norm="none", beta_full="match_dpo"))
    bench.wrap_encoder(dark)
    with pytest.raises(TrainingError, match=r"match_dpo finds no error.*give beta_full as a number"):
        bench.learn([pair(0)])


@pytest.mark.usefixtures("few_matched")
def test_a_first_step_without_a_pair_leaves_the_matching_to_the_next(tiny_model: str) -> None:
    bench = Bench(tiny_model, ncp(norm="none", beta_full="match_dpo"))
    tied = make_group(5, x0_GCHW=latents(5, 3), reward_G=np.full(3, 0.5, np.float32))
    assert "ncp/beta_full" not in bench.learn([tied]).details[0]
    assert matched(bench) > 0


# --- by the quarter of the schedule -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "dpo", "beta_full": 100},
        {"name": "cpo", "beta_full": 100, "sft_weight": 0.5},
        {"name": "sft"},
        ncp("ncp_dpo", norm="k2"),
    ],
    ids=lambda settings: settings["name"],
)
def test_a_loss_is_also_told_by_quarters_of_the_schedule(tiny_model: str, settings: dict[str, Any]) -> None:
    """Of timesteps that all lie in the last quarter, it is the loss."""
    bench = Bench(tiny_model, {**settings, "min_tau": 750})
    bench.move_weights()
    report = bench.learn([pair(i) for i in range(3)], round_=1)
    assert report.details[0]["loss/tau_quartile_4"] == pytest.approx(report.loss[0], rel=1e-6)
    assert not {f"loss/tau_quartile_{i}" for i in (1, 2, 3)} & report.details[0].keys()


def test_an_errors_k_is_that_of_its_own_timestep(tiny_model: str) -> None:
    bench = Bench(tiny_model, ncp(norm="k2"))
    updater: Any = bench.updater
    probe = updater._probe(updater._units([pair(i) for i in range(5)]), 0)
    assert isinstance(probe, PerceptualProbe)
    alone = [replace(probe).k_NK(torch.tensor([unit])) for unit in range(5)]
    assert torch.equal(probe.k_NK(torch.arange(5)), torch.cat(alone))
    assert torch.equal(probe.k_NK(torch.arange(5))[:, 0], probe.k_NK(torch.arange(5))[:, 1])
