"""The reward firewall: notices that the trained reward climbs while a held-out one falls.

A check is tickets like any other: the same prompts and seeds with the round's version, drawn by rollout actors, scored
by the trained and the held-out rewards, collected with the round. So a verdict is a function of the run.

    look at version v --> nothing fell          --> v is good: its weights are kept
                      --> a held-out mean is more than `margin` of its first standard deviations below its best so
                          far, and the trained reward above what it was then --> tripped: warn, roll back, or stop
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from learner.composition import Gather
from protocol.firewall import Firewall
from protocol.groups import Group
from protocol.roles import Fixed, Reward, Running
from protocol.scores import labels_in, part_name


@dataclass(frozen=True)
class Look:
    """Means of one check: `Look(version=5, trained=0.31, held_out={"image_diversity": 0.2})`. `trained` is the weighted
    sum; it and what is missing of `held_out` failed to be scored."""

    version: int
    trained: float | None
    held_out: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """What a look says: why it tripped, if it did, and what goes into the metrics."""

    reasons: tuple[str, ...] = ()
    action: Literal["none", "warn", "roll_back", "stop"] = "none"
    metrics: Mapping[str, Any] = field(default_factory=dict)


class Watchman:
    """Remembers all looks. The same on every rank. `good` is the last version that did not trip, at first the base."""

    def __init__(self, settings: Firewall | None, rewards: Sequence[Reward], gather: Gather) -> None:
        self._settings, self._rewards, self._gather = settings, tuple(rewards), gather
        self._looks: list[Look] = []
        self._first: dict[str, tuple[float, float]] = {}
        self.num_roll_backs, self._forgiven_before = 0, 0
        self.good = 0
        self._stopped: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        if not self._looks:
            return {}
        return {
            "looks": [vars(look).copy() for look in self._looks],
            "first": {label: list(pair) for label, pair in self._first.items()},
            "num_roll_backs": self.num_roll_backs,
            "forgiven_before": self._forgiven_before,
            "good": self.good,
            "stopped": self._stopped,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` returned; a firewall that was added meanwhile starts afresh."""
        if not state:
            return
        self._looks = [Look(**look) for look in state["looks"]]
        self._first = {label: (mean, std) for label, (mean, std) in state["first"].items()}
        self.num_roll_backs, self._forgiven_before = state["num_roll_backs"], state["forgiven_before"]
        self.good, self._stopped = state["good"], state["stopped"]

    def look(self, groups: Sequence[Group], version: int) -> Verdict:
        """Judges a version by this rank's part of a check. All ranks call it."""
        assert self._settings is not None
        scores = self._scores(groups)
        for label, score_N in scores.items():
            self._first.setdefault(label, (float(score_N.mean()), float(score_N.std())))
        held_out = [reward.label for reward in self._settings.rewards if reward.label in scores]
        look = Look(version, self._trained(scores), {label: float(scores[label].mean()) for label in held_out})
        # After a roll-back, rounds that were sampled before it still come.
        forgiven = version < self._forgiven_before
        reasons = () if forgiven else tuple(self._reasons(look, self._settings.margin))
        if not forgiven:
            self._looks.append(look)
        num_missing = len(self._settings.rewards) - len(held_out) + (look.trained is None)
        if not (reasons or forgiven or num_missing):
            self.good = version
        action = self._action(self._settings) if reasons else "none"
        self._stopped = {"reasons": reasons, "margin": self._settings.margin} if action == "stop" else None
        return Verdict(reasons, action, self._metrics(look, reasons, num_missing))

    def still_stopped(self) -> Sequence[str]:
        """Returns why a run was stopped that is resumed as if it had not been: nobody has decided otherwise."""
        if not (self._stopped and self._settings):
            return ()
        decided = self._action(self._settings) != "stop" or self._settings.margin > self._stopped["margin"]
        return () if decided else self._stopped["reasons"]

    def roll_back(self, next_version: int) -> int:
        """Takes note that training goes on from the last good version, which it returns, as `next_version`. What was
        seen of versions after the good one no longer counts."""
        self.num_roll_backs += 1
        self._forgiven_before = next_version
        self._looks = [look for look in self._looks if look.version <= self.good]
        return self.good

    def _scores(self, groups: Sequence[Group]) -> dict[str, np.ndarray]:
        """Returns all images' scores by label, in ticket order, of the rewards that scored every group."""
        own = [(g.ticket_id, {label: g.array(part_name(label)) for label in labels_in(g.arrays)}) for g in groups]
        everyone = sorted((one for part in self._gather(own) for one in part), key=lambda one: one[0])
        parts = [scores for _, scores in everyone]
        labels = sorted(set.intersection(*(set(scores) for scores in parts)))
        return {label: np.concatenate([scores[label] for scores in parts]).astype(np.float64) for label in labels}

    def _trained(self, scores: Mapping[str, np.ndarray]) -> float | None:
        """Returns the mean of the weighted sum. A running normalisation would move with what it is to measure: the
        first check's own moments stand for it."""
        if any(reward.label not in scores for reward in self._rewards if reward.weight):
            return None
        total = 0.0
        for reward in self._rewards:
            if not reward.weight:
                continue
            mean, shift, scale = float(scores[reward.label].mean()), 0.0, 1.0
            if isinstance(reward.normalise, Fixed):
                shift, scale = reward.normalise.mean, reward.normalise.std
            elif isinstance(reward.normalise, Running):
                shift, scale = self._first[reward.label][0], self._first[reward.label][1] or 1.0
            total += reward.weight * (mean - shift) / scale
        return total

    def _action(self, settings: Firewall) -> Literal["warn", "roll_back", "stop"]:
        is_last = settings.on_trip == "roll_back" and self.num_roll_backs >= settings.max_roll_backs
        return "stop" if is_last else settings.on_trip

    def _reasons(self, look: Look, margin: float) -> list[str]:
        """Returns a sentence for each held-out reward that fell while the trained one climbed."""
        found = []
        for label, mean in look.held_out.items():
            before = [past for past in self._looks if label in past.held_out and past.trained is not None]
            best = max(before, key=lambda past: past.held_out[label], default=None)
            if best is None or best.trained is None or look.trained is None or look.trained <= best.trained:
                continue
            # Scores that were all equal have no spread: any fall is one.
            allowed = margin * self._first[label][1]
            if best.held_out[label] - mean > allowed:
                found.append(
                    f"{label} fell from {best.held_out[label]:.4g} (version {best.version}) to {mean:.4g} (version "
                    f"{look.version}), by more than {allowed:.4g}, while the trained reward rose from "
                    f"{best.trained:.4g} to {look.trained:.4g}"
                )
        return found

    def _metrics(self, look: Look, reasons: Sequence[str], num_missing: int) -> dict[str, Any]:
        return {
            "firewall/version": look.version,
            "firewall/trained": look.trained,
            **{f"firewall/{label}": mean for label, mean in look.held_out.items()},
            "firewall/tripped": int(bool(reasons)),
            "firewall/missing": num_missing,
            **({"firewall/reason": "; ".join(reasons)} if reasons else {}),
        }
