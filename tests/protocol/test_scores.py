"""Names of scores, and their sum."""

from __future__ import annotations

import numpy as np
import pytest

from protocol.roles import Reward
from protocol.scores import labels_in, part_name, plain_total, state_part_name, weighted_sum


def test_a_sum_is_weighted_and_added_up_in_fp64() -> None:
    parts = {"a": np.float32([1e8, 1]), "b": np.float32([-1e8, 2]), "c": np.float32([1, 3])}
    total = weighted_sum(parts, {"a": 1.0, "b": 1.0, "c": 0.5})
    assert total.tolist() == [0.5, 4.5]
    assert total.dtype == np.float32


def test_a_sum_needs_a_weight_for_every_part() -> None:
    with pytest.raises(ValueError, match="do not go with weights"):
        weighted_sum({"a": np.float32([1])}, {"b": 1.0})
    with pytest.raises(ValueError, match="do not go with weights"):
        weighted_sum({}, {"a": 1.0})


def test_labels_are_read_from_the_names_that_they_make() -> None:
    labels = ["G", "GM", "ocr", "state_of_art", "reward_x"]
    names = ["latents_GSCHW", "reward_G", "state_reward_GM", "scored_T", "state_timestep_M"]
    for make in (part_name, state_part_name):
        assert labels_in([*names, *map(make, labels)]) == sorted(labels)
    assert labels_in(names) == []


def test_a_plain_total_has_fixed_normalisations_and_no_running_ones() -> None:
    rewards = [
        Reward(name="a", weight=2.0),
        Reward(name="b", normalise={"how": "fixed", "mean": 1.0, "std": 4.0}),
        Reward(name="c", weight=-1.0, normalise={"how": "running"}),
    ]
    parts = {"a": np.float32([1, 2]), "b": np.float32([5, 9]), "c": np.float32([3, 3]), "held_out": np.float32([0, 0])}
    assert plain_total(parts, rewards).tolist() == [0, 3]
