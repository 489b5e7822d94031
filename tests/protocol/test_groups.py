"""A group's content is what its ticket determines, and nothing else."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable

import numpy as np
import pytest

from protocol.codec import decode_group, encode_group
from protocol.errors import TrainingError
from protocol.groups import Group


def test_copies_made_by_different_workers_have_one_checksum(make_group: Callable[..., Group]) -> None:
    copy = dataclasses.replace(
        make_group(), worker="rollout-9@elsewhere", rollout_s=99.0, reward_s=9.0, num_images=9, num_evaluations=9
    )
    assert copy.content_checksum() == make_group().content_checksum()


def test_the_wire_does_not_change_the_checksum(make_group: Callable[..., Group]) -> None:
    assert decode_group(encode_group(make_group())).content_checksum() == make_group().content_checksum()


def test_the_order_and_the_layout_of_arrays_do_not_change_the_checksum(
    make_group: Callable[..., Group],
) -> None:
    group = make_group()
    shuffled = {name: np.asfortranarray(group.arrays[name]) for name in sorted(group.arrays, reverse=True)}
    assert dataclasses.replace(group, arrays=shuffled).content_checksum() == group.content_checksum()


@pytest.mark.parametrize("field", ["ticket_id", "prompt", "weights_digest", "sampler"])
def test_other_content_has_another_checksum(make_group: Callable[..., Group], field: str) -> None:
    other = dataclasses.replace(make_group(), **{field: "other"})  # type: ignore[arg-type]
    assert other.content_checksum() != make_group().content_checksum()


def test_one_flipped_bit_changes_the_checksum(make_group: Callable[..., Group]) -> None:
    group = make_group()
    rewards = group.arrays["reward_G"].copy()
    rewards.view(np.uint8)[0] ^= 1
    flipped = dataclasses.replace(group, arrays={**group.arrays, "reward_G": rewards})
    assert flipped.content_checksum() != group.content_checksum()


def test_a_missing_field_is_named_along_with_those_there_are(make_group: Callable[..., Group]) -> None:
    with pytest.raises(TrainingError, match=r"lacks the field win_margin_G.*reward_G"):
        make_group().array("win_margin_G")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_field_that_is_not_finite_is_named(make_group: Callable[..., Group], value: float) -> None:
    group = make_group()
    assert group.non_finite_field() is None
    bad = dataclasses.replace(group, arrays={**group.arrays, "reward_G": np.array([1.0, value])})
    assert bad.non_finite_field() == "reward_G"


def test_errors_survive_the_way_between_processes() -> None:
    error = TrainingError("a gap", value=3, expected="none", do="look")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (TrainingError, "a gap. Got: 3. Expected: none. To do: look.")
