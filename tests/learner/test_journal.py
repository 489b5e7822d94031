"""The journal has each round once, whatever was cut short, and says what the receipts say."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.collect import Counts
from learner.descent import Step
from learner.journal import Journal, ledger_row, metrics_row, weight_costs
from learner.receipts import Receipt, receipt_of
from learner.update import UpdateReport
from learner.versions import Publication
from protocol.groups import Group

FILES = ("metrics.jsonl", "ledger.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rounds(run_dir: Path, first: int, last: int) -> None:
    journal = Journal(run_dir, first_round=first)
    for round_ in range(first, last):
        journal.write({"round": round_, "kind": "metrics"}, {"round": round_, "kind": "ledger"})


def test_a_new_run_begins_with_empty_files(tmp_path: Path) -> None:
    Journal(tmp_path, first_round=0)
    assert list(tmp_path.iterdir()) == []


def test_each_file_gets_its_own_line_a_round(tmp_path: Path) -> None:
    write_rounds(tmp_path, 0, 3)
    assert lines(tmp_path / "metrics.jsonl") == [{"round": r, "kind": "metrics"} for r in range(3)]
    assert lines(tmp_path / "ledger.jsonl") == [{"round": r, "kind": "ledger"} for r in range(3)]


@pytest.mark.parametrize("resumed_at", [0, 1, 3, 5])
def test_a_resumed_run_writes_the_rounds_after_its_checkpoint_again(tmp_path: Path, resumed_at: int) -> None:
    write_rounds(tmp_path, 0, 5)
    write_rounds(tmp_path, resumed_at, 6)
    for name in FILES:
        assert [row["round"] for row in lines(tmp_path / name)] == list(range(6))


@pytest.mark.parametrize("torn_at", [1, 10, 20])
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path: Path, torn_at: int) -> None:
    write_rounds(tmp_path, 0, 4)
    for name in FILES:
        whole = (tmp_path / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(whole[:3]) + whole[3][:torn_at])
    write_rounds(tmp_path, 3, 5)
    for name in FILES:
        assert [row["round"] for row in lines(tmp_path / name)] == list(range(5))


def receipt(index: int, *, worker: str = "0@host", version: int = 2, device: str = "cpu") -> Receipt:
    rewards = (1.0 * index, 2.0 * index + 1)
    return Receipt(
        ticket_id=f"000003-{index:04d}",
        version=version,
        weights_digest="aa",
        checksum=f"sum{index}",
        worker=worker,
        fingerprint=json.dumps({"device": device}),
        rollout_s=0.5,
        reward_s=0.1,
        num_images=2,
        num_evaluations=20,
        rewards={"mean": rewards, "sharp": tuple(reward / 2 for reward in rewards)},
    )


def test_the_ledger_says_which_groups_a_round_consumed_and_who_made_each_on_what() -> None:
    receipts = [receipt(0, device="gpu"), receipt(1, worker="1@other"), receipt(2)]
    row = ledger_row(3, receipts, "bb", Counts(duplicate=1, reissued=2), 2)
    assert row["tickets"] == ["000003-0000", "000003-0001", "000003-0002"]
    assert row["checksums"] == ["sum0", "sum1", "sum2"]
    assert row["workers"] == ["0@host", "1@other", "0@host"]
    assert [row["fingerprints"][number] for number in row["fingerprint_of"]] == [r.fingerprint for r in receipts]
    assert (row["version"], row["digest"]) == (2, "aa")
    assert (row["published_version"], row["published_digest"]) == (4, "bb")
    assert row["made_good"] == {"duplicate": 1, "reissued": 2, "dead_letter": 0, "stale": 0}
    assert row["world_size"] == 2


def test_a_round_of_two_versions_is_a_defect_of_ours() -> None:
    with pytest.raises(AssertionError, match="one version"):
        ledger_row(3, [receipt(0), receipt(1, version=3)], "bb", Counts(), 1)


def metrics(**changes: Any) -> dict[str, Any]:
    details = [{"clip_fraction": 0.0, "pairs/accuracy": 1.0}, {"clip_fraction": 0.5, "pairs/accuracy": 0.5}]
    settings: dict[str, Any] = {
        "round_": 3,
        "step": 8,
        "on_policy": True,
        "staleness": 2,
        "receipts": [receipt(0), receipt(1)],
        "report": UpdateReport(
            kl=0.25,
            parity_max_abs=1e-7,
            recomputed=False,
            loss=[1.0, 3.0],
            grad_norm=[0.5, 1.5],
            learning_rate=[1e-3, 2e-3],
            details=details,
        ),
        "counts": Counts(duplicate=1, reissued=2, dead_letter=3, stale=4),
        "skipped_updates": 0,
        "times": {"learner_s": 2.0},
        "costs": {"unet_forward": 7},
    }
    return metrics_row(**(settings | changes))


def test_means_are_over_optimizer_steps_and_over_all_images() -> None:
    row = metrics()
    assert (row["loss"], row["grad_norm"], row["learning_rate"]) == (2.0, 1.0, 1.5e-3)
    assert (row["clip_fraction"], row["pairs/accuracy"]) == (0.25, 0.75)
    assert (row["round"], row["version"], row["step"], row["staleness"]) == (3, 4, 8, 2)
    # Rewards of the groups: (0, 1) and (1, 3).
    assert row["reward/mean"] == 1.25
    assert row["reward/sharp"] == 0.625
    assert row["reward/std_within_group"] == 0.75
    assert row["reward/std_between_groups"] == 0.75
    assert [row[f"groups/{name}"] for name in ("duplicate", "reissued", "dead_letter", "stale")] == [1, 2, 3, 4]
    assert (row["time/learner_s"], row["cost/unet_forward"], row["parity/max_abs"]) == (2.0, 7, 1e-7)


def test_what_is_averaged_is_also_listed_step_by_step() -> None:
    row = metrics()
    assert row["updates"] == {
        "loss": [1.0, 3.0],
        "grad_norm": [0.5, 1.5],
        "learning_rate": [1e-3, 2e-3],
        "clip_fraction": [0.0, 0.5],
        "pairs/accuracy": [1.0, 0.5],
    }
    assert all(row[name] == pytest.approx(sum(values) / 2) for name, values in row["updates"].items())


def test_a_version_costs_what_publishing_it_and_the_slowest_of_its_fetches_took() -> None:
    published = Publication(3, 1000, 0.5)
    said = {
        "rollout/0": {"version": 3, "fetch_s": 0.25},
        "rollout/1": {"version": 3, "fetch_s": 0.75},
        "rollout/2": {"version": 2, "fetch_s": 9.0},
        "rollout/3": {"groups": 0},
        "learner/0": {"round": 3},
    }
    costs = {"version": 3, "size_bytes": 1000, "publish_s": 0.5, "num_fetches": 2, "fetch_s": 0.75}
    assert weight_costs(published, said) == costs
    assert weight_costs(published, {}) == {"version": 3, "size_bytes": 1000, "publish_s": 0.5, "num_fetches": 0}
    assert weight_costs(None, said) == {}
    assert metrics(weights=costs).items() >= {f"weights/{name}": value for name, value in costs.items()}.items()


def unscored(index: int) -> Receipt:
    """The receipt of a group that was only encoded."""
    return dataclasses.replace(receipt(index), num_images=0, rewards={})


def test_a_round_of_which_nothing_was_scored_has_no_rewards_and_no_numbers_that_are_none() -> None:
    row = metrics(receipts=[unscored(0), unscored(1)])
    assert not [name for name in row if name.startswith("reward/")]
    json.dumps(row, allow_nan=False)


def test_of_a_mixture_with_data_rewards_are_those_of_the_groups_that_were_scored() -> None:
    mixed = metrics(receipts=[unscored(0), receipt(1), unscored(2), receipt(3)])
    alone = metrics(receipts=[receipt(1), receipt(3)])
    assert {name for name in mixed if name.startswith("reward/")} == {
        *("reward/mean", "reward/sharp", "reward/std_within_group", "reward/std_between_groups")
    }
    assert mixed == alone


def test_a_method_without_log_probabilities_has_neither_kl_nor_parity() -> None:
    report = UpdateReport(loss=[1.0], grad_norm=[0.5], learning_rate=[1e-3], details=[{"error/mean": 0.25}])
    row = json.loads(json.dumps(metrics(report=report), allow_nan=False))
    names = ("kl", "kl_off_policy", "parity/max_abs", "parity/recomputed")
    assert {name: row[name] for name in names} == dict.fromkeys(names)
    assert row["error/mean"] == 0.25


def test_a_step_that_nobody_had_a_gradient_for_is_counted_and_has_norm_0() -> None:
    report = UpdateReport()
    report.add(Step(loss=1.0, grad_norm=None, means={}), 1e-3, {"pairs/tied": 1.0})
    report.add(Step(loss=3.0, grad_norm=0.5, means={}), 2e-3, {"pairs/tied": 0.5})
    assert report.skipped == 1
    row = metrics(report=report, skipped_updates=report.skipped)
    assert (row["loss"], row["grad_norm"], row["skipped_updates"], row["pairs/tied"]) == (2.0, 0.25, 1, 0.75)


def test_a_groups_receipt_says_what_was_scored_of_it(make_group: Callable[..., Group]) -> None:
    group = make_group()
    arrays = {**group.arrays, "reward_digit_alignment_G": np.array([0.5, 1, 2, 4], np.float32)}
    scored = dataclasses.replace(group, arrays=arrays, num_images=12)
    receipt = receipt_of(scored)
    assert receipt.rewards == {}
    assert (receipt.ticket_id, receipt.checksum) == (group.ticket_id, scored.content_checksum())
    assert receipt.num_images == 12
    encoded = dataclasses.replace(group, arrays={"real_x0_CHW": group.array("latents_GSCHW")[0, 0]})
    assert receipt_of(encoded).rewards == {}


def test_an_estimate_of_the_kl_is_called_one_only_on_policy() -> None:
    on, off = metrics(), metrics(on_policy=False)
    assert (on["kl"], on["kl_off_policy"]) == (0.25, None)
    assert (off["kl"], off["kl_off_policy"]) == (None, 0.25)
