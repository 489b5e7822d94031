"""From each reward's scores to the number that is trained on: normalised, weighted and added up, in ticket order.

It happens here and not where scores are made, so that neither who scored nor when can matter: a running mean is over
all tickets so far, and an optional reward that failed on one group is left out for the whole round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from learner.collect import Collected
from protocol.groups import Group
from protocol.roles import Fixed, Reward, Running
from protocol.scores import STATE_TOTAL, TOTAL, labels_in, part_name, state_part_name, weighted_sum

Gather = Callable[[Any], list[Any]]
"""Every rank's value, in the order of ranks."""


@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared distances from the mean of all scores so far."""

    num: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @staticmethod
    def of(scores: np.ndarray) -> Moments:
        """Returns those of one group's scores."""
        values = scores.astype(np.float64).ravel()
        return Moments(values.size, float(values.mean()), float(np.square(values - values.mean()).sum()))

    def with_more(self, other: Moments) -> Moments:
        """Returns those of both together (Chan et al., Updating formulae for computing sample variances, 1979)."""
        num = self.num + other.num
        apart = other.mean - self.mean
        squares = self.squares + other.squares + apart**2 * self.num * other.num / num
        return Moments(num, self.mean + apart * other.num / num, squares)

    @property
    def std(self) -> float:
        """Of the population; 1 where all scores are equal, which then count as 0."""
        return float(np.sqrt(self.squares / self.num)) or 1.0


class Composition:
    """Adds up the rewards of a learner's groups.

    collected: parts only --> left out? --> running moments move on --> reward_G, receipts with what counted
    """

    def __init__(self, rewards: Sequence[Reward], gather: Gather) -> None:
        self._rewards, self._gather = tuple(rewards), gather
        self._moments = {reward.label: Moments() for reward in rewards if isinstance(reward.normalise, Running)}
        self.left_out: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {label: vars(moments).copy() for label, moments in self._moments.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` returned. A reward that was added meanwhile starts afresh."""
        self._moments |= {label: Moments(**state[label]) for label in self._moments if label in state}

    def compose(self, collected: Collected) -> Collected:
        """Returns a rank's part of a round with `reward_G` in every group that was scored. All ranks call it."""
        self._look_at_all(collected.groups)
        groups = [self._compose(group) for group in collected.groups]
        receipts = [
            replace(receipt, rewards=self._rewards_of(group))
            for receipt, group in zip(collected.receipts, groups, strict=True)
        ]
        return Collected(groups, receipts)

    def _look_at_all(self, groups: Sequence[Group]) -> None:
        """Finds out what failed somewhere in the round, and moves the running moments on, group by group."""
        if all(reward.required for reward in self._rewards) and not self._moments:
            return
        said = sorted((one for part in self._gather(self._say_all(groups)) for one in part), key=lambda one: one[0])
        labels = [reward.label for reward in self._rewards]
        self.left_out = tuple(label for label in labels if any(label not in has for _, has, _ in said))
        for _, _, moments in said:
            for label in self._moments.keys() - set(self.left_out):
                self._moments[label] = self._moments[label].with_more(moments[label])

    def _say_all(self, groups: Sequence[Group]) -> list[tuple[str, list[str], dict[str, Moments]]]:
        """Returns of each group that was scored which rewards it has, and the moments of those that need them."""
        has = {group.ticket_id: labels_in(group.arrays) for group in groups if _scored(group)}
        return [
            (id_, has[id_], {label: Moments.of(_part(group, label)) for label in self._moments if label in has[id_]})
            for group in groups
            if (id_ := group.ticket_id) in has
        ]

    def _compose(self, group: Group) -> Group:
        if not _scored(group):
            return group
        rewards = [reward for reward in self._rewards if reward.label not in self.left_out]
        parts = {reward.label: self._normalised(reward, _part(group, reward.label)) for reward in rewards}
        total = weighted_sum(parts, {reward.label: reward.weight for reward in rewards})
        if total.ndim == 1:
            return replace(group, arrays={**group.arrays, TOTAL: total})
        means = {part_name(r.label): _mean(group.arrays[state_part_name(r.label)]) for r in rewards}
        return replace(group, arrays={**group.arrays, **means, STATE_TOTAL: total, TOTAL: _mean(total)})

    def _normalised(self, reward: Reward, scores: np.ndarray) -> np.ndarray:
        scores = scores.astype(np.float64)
        if isinstance(reward.normalise, Fixed):
            return (scores - reward.normalise.mean) / reward.normalise.std
        if isinstance(reward.normalise, Running):
            moments = self._moments[reward.label]
            return (scores - moments.mean) / moments.std
        return scores

    def _rewards_of(self, group: Group) -> dict[str, tuple[float, ...]]:
        if not _scored(group):
            return {}
        labels = [reward.label for reward in self._rewards if reward.label not in self.left_out]
        parts = {label: tuple(group.array(part_name(label)).tolist()) for label in labels}
        return {**parts, "mean": tuple(group.array(TOTAL).tolist())}


def _scored(group: Group) -> bool:
    """Groups of datasets are not; of those that are, a required reward has scored every one."""
    return bool(labels_in(group.arrays))


def _part(group: Group, label: str) -> np.ndarray:
    name = part_name(label)
    return group.arrays[name] if name in group.arrays else group.array(state_part_name(label))


def _mean(score_GM: np.ndarray) -> np.ndarray:
    mean_G: np.ndarray = score_GM.mean(axis=1, dtype=np.float64).astype(np.float32)
    return mean_G
