"""The run's written record: `metrics.jsonl` and `ledger.jsonl`, a line a round, each round once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from learner.collect import Counts
from learner.receipts import Receipt
from learner.update import UpdateReport
from learner.versions import Publication


class Journal:
    """Appends to the two files; a resumed run first cuts them back to the rounds that it keeps."""

    def __init__(self, run_dir: Path, first_round: int) -> None:
        self._metrics, self._ledger = run_dir / "metrics.jsonl", run_dir / "ledger.jsonl"
        for path in (self._metrics, self._ledger):
            _cut_back(path, first_round)

    def write(self, metrics: dict[str, Any], ledger: dict[str, Any]) -> None:
        """Appends one round to each file, and does not return before they are on disk."""
        for path, row in ((self._ledger, ledger), (self._metrics, metrics)):
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())


def ledger_row(
    round_: int,
    receipts: Sequence[Receipt],
    published_digest: str,
    counts: Counts,
    world_size: int,
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns which groups a round consumed, who made each and on what, and the digest that came of it.

    `left_out` names optional rewards that failed in the round. `checksums`, `workers` and `fingerprint_of` have one
    entry a ticket; the last is a position in `fingerprints`.
    """
    versions = {(receipt.version, receipt.weights_digest) for receipt in receipts}
    assert len(versions) == 1, "a round is sampled with one version"
    ((version, digest),) = versions
    fingerprints = sorted({receipt.fingerprint for receipt in receipts})
    return {
        "round": round_,
        "version": version,
        "digest": digest,
        "published_version": round_ + 1,
        "published_digest": published_digest,
        "tickets": [receipt.ticket_id for receipt in receipts],
        "checksums": [receipt.checksum for receipt in receipts],
        "workers": [receipt.worker for receipt in receipts],
        "fingerprint_of": [fingerprints.index(receipt.fingerprint) for receipt in receipts],
        "fingerprints": fingerprints,
        "made_good": vars(counts).copy(),
        "world_size": world_size,
        "left_out": list(left_out),
    }


def metrics_row(
    *,
    round_: int,
    step: int,
    on_policy: bool,
    staleness: int,
    receipts: Sequence[Receipt],
    report: UpdateReport,
    counts: Counts,
    skipped_updates: int,
    times: dict[str, float],
    costs: dict[str, float],
    left_out: Sequence[str] = (),
    busy: dict[str, float] | None = None,
    peaks: dict[str, int] | None = None,
    weights: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Returns a round's line for people and plots. What an optimizer step reports is given as the mean over the
    round's steps, which `updates` lists one by one."""
    steps = {"loss": report.loss, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate}
    names = sorted({name for details in report.details for name in details})
    steps |= {name: [details[name] for details in report.details if name in details] for name in names}
    return {
        "round": round_,
        "step": step,
        "version": round_ + 1,
        "staleness": staleness,
        **_reward_metrics(receipts),
        # Only samples of the current weights estimate their KL without bias.
        "kl": report.kl if on_policy else None,
        "kl_off_policy": None if on_policy else report.kl,
        **{name: float(np.mean(values)) for name, values in steps.items()},
        "updates": steps,
        "parity/max_abs": report.parity_max_abs,
        "parity/recomputed": report.recomputed,
        "skipped_updates": skipped_updates,
        **{f"left_out/{label}": 1 for label in left_out},
        **{f"groups/{name}": value for name, value in vars(counts).items()},
        **{f"time/{name}": value for name, value in times.items()},
        **{f"busy/{name}": share for name, share in (busy or {}).items()},
        **{f"memory/{role}_peak_bytes": value for role, value in (peaks or {}).items()},
        **{f"weights/{name}": value for name, value in (weights or {}).items()},
        **{f"cost/{name}": value for name, value in costs.items()},
    }


def weight_costs(published: Publication | None, said: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns what the last published version has cost so far: its bytes, the seconds to give it to the store, and of
    the rollouts that say to have fetched it how many they are and what the slowest took. A follower's has cost none."""
    if published is None:
        return {}
    fetches_s = [words["fetch_s"] for words in said.values() if words.get("version") == published.version]
    slowest = {"fetch_s": max(fetches_s)} if fetches_s else {}
    return {**vars(published), "num_fetches": len(fetches_s), **slowest}


def _reward_metrics(receipts: Sequence[Receipt]) -> dict[str, float]:
    """Means over the groups that were scored: of a mixture with data those that were sampled."""
    scored = [receipt for receipt in receipts if receipt.rewards]
    if not scored:
        return {}
    total_PG = np.array([receipt.rewards["mean"] for receipt in scored])
    metrics = {
        f"reward/{name}": float(np.mean([receipt.rewards[name] for receipt in scored]))
        for name in sorted(scored[0].rewards)
    }
    metrics["reward/std_within_group"] = float(total_PG.std(axis=1).mean())
    metrics["reward/std_between_groups"] = float(total_PG.mean(axis=1).std())
    return metrics


def _cut_back(path: Path, first_round: int) -> None:
    """Keeps the lines of earlier rounds. A line that a crash cut short is dropped with what follows it."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["round"] >= first_round:
            break
        kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)
