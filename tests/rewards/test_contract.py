"""Scores are N finite numbers, or the reward and the prompt are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import RewardError
from rewards.contract import check_scores, probe_images

PROMPTS = ["a red seven"] * 3


@pytest.mark.parametrize(
    "scores",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3], dtype=np.int64),
        np.array([1, 2, 3], dtype=np.float16),
        torch.tensor([1.0, 2.0, 3.0], requires_grad=True),
        [np.float64(1), 2, True + 2],
    ],
    ids=lambda scores: type(scores).__name__,
)
def test_numbers_of_any_kind_become_fp32(scores: object) -> None:
    checked = check_scores("mine", scores, PROMPTS)
    assert checked.tolist() == [1, 2, 3]
    assert checked.dtype == np.float32


@pytest.mark.parametrize("scores", [[1, 2], [1, 2, 3, 4], 1.0, [[1], [2], [3]], np.zeros((3, 1)), []], ids=str)
def test_another_number_of_scores_is_refused(scores: object) -> None:
    with pytest.raises(RewardError, match=r"reward mine, on the prompt 'a red seven', .*wrong number.*\(3,\)"):
        check_scores("mine", scores, PROMPTS)


@pytest.mark.parametrize("scores", [None, "high", ["a", "b", "c"], [[1], [1, 2], 3], object], ids=str)
def test_what_is_no_number_is_refused(scores: object) -> None:
    with pytest.raises(RewardError, match="reward mine, on the prompt 'a red seven',"):
        check_scores("mine", scores, PROMPTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", range(3))
def test_a_score_that_is_not_finite_is_refused_with_its_image(value: float, position: int) -> None:
    scores = [0.0] * 3
    scores[position] = value
    with pytest.raises(RewardError, match=f"not finite, for image {position}. Got: {value}"):
        check_scores("mine", scores, PROMPTS)


def test_a_score_too_large_for_fp32_is_refused_without_a_warning() -> None:
    with pytest.raises(RewardError, match="not finite, for image 1"):
        check_scores("mine", [0.0, 1e300, 0.0], PROMPTS)


@given(st.lists(st.floats(-1e30, 1e30), max_size=5))
def test_finite_scores_pass_unchanged_but_for_rounding(scores: list[float]) -> None:
    checked = check_scores("mine", scores, ["p"] * len(scores))
    assert checked.tolist() == np.array(scores, dtype=np.float32).tolist()


def test_probe_images_are_the_same_every_time_and_differ_from_each_other() -> None:
    images = probe_images(3, 16)
    assert (images.shape, images.dtype) == ((3, 16, 16, 3), np.uint8)
    assert np.array_equal(images, probe_images(3, 16))
    assert len({image.tobytes() for image in images}) == 3
