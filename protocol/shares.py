"""What roles say of themselves, as shares of time: who works all the time is what others wait for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEARD_WITHIN_S = 60.0
"""Roles that have been silent for longer, compared with the newest, are gone."""


def busy_shares(said: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns each role's share of time spent working, averaged over its processes, by name: of `rollout/0` it is
    `rollout`, of `reward/digit_alignment/0` it is `reward_digit_alignment`."""
    newest = max((words.get("time", 0.0) for words in said.values()), default=0.0)
    shares: dict[str, list[float]] = {}
    for role, words in said.items():
        if newest - words.get("time", newest) > HEARD_WITHIN_S:
            continue
        share = words["busy_s"] / words["alive_s"] if words["alive_s"] else 0.0
        shares.setdefault("_".join(role.split("/")[:-1]) or role, []).append(share)
    return {name: sum(each) / len(each) for name, each in sorted(shares.items())}


def bottleneck(shares: Mapping[str, float]) -> str | None:
    """Returns what to raise where a reward keeps everybody waiting: it works nearly always, the rollouts do not."""
    busiest = max((name for name in shares if name.startswith("reward_")), key=shares.__getitem__, default=None)
    if busiest is None or shares[busiest] < 0.8 or shares.get("rollout", 1.0) > 0.7:
        return None
    label = busiest.removeprefix("reward_")
    return f"rollouts wait for the reward {label}: raise its replicas, or give it a GPU by num_gpus"


def rollout_peaks(said: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Returns {"rollout": the most memory that any rollout actor has held}, or nothing where none has said it."""
    peaks = [
        words["peak_bytes"] for role, words in said.items() if role.startswith("rollout/") and "peak_bytes" in words
    ]
    return {"rollout": max(peaks)} if peaks else {}
