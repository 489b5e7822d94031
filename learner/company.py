"""Several learners on one stream: who they are, and how they keep in step.

    first learner    issues tickets, publishes versions, trims the streams
    followers        read the same groups with cursors of their own

A round is closed for the first learner when every follower has collected it, and begins for a follower when the first
learner has published its version: nobody is more than a round away from anybody, so the streams hold no more rounds
than tickets allow, and a checkpoint that all have is at hand when they resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FIRST = "learner"
"""The role of the first learner's ranks in progress reports."""

Said = Mapping[str, Mapping[str, Any]]
"""The last report of each role."""


def role_of(follower: str | None, rank: int) -> str:
    """Returns the role that a rank reports under: `learner/0`, or `learner-dpo/0`."""
    return f"{role_name(follower)}/{rank}"


def role_name(follower: str | None) -> str:
    """Returns what a learner's ranks have in common: `learner`, or `learner-dpo`."""
    return f"{FIRST}-{follower}" if follower else FIRST


@dataclass(frozen=True)
class Company:
    """A learner among others: its own name, None for the first one's, and the ranks of every follower."""

    name: str | None
    followers: Mapping[str, int]

    @property
    def others(self) -> list[str]:
        """Roles of all ranks that read what the first learner trims."""
        return [role_of(name, rank) for name, ranks in self.followers.items() for rank in range(ranks)]

    def all_have(self, round_: int, said: Said) -> bool:
        """True if every follower has collected a round."""
        return all(_has(said.get(role), round_) for role in self.others)

    def first_has_begun(self, round_: int, said: Said) -> bool:
        """True if the first learner has published what comes before a round."""
        return bool(said.get(role_of(None, 0), {}).get("round", -1) >= round_)


def _has(report: Mapping[str, Any] | None, round_: int) -> bool:
    if report is None:
        return False
    at_work = report["state"] in ("learning", "done")
    return bool(report["round"] > round_ or (report["round"] == round_ and at_work))
