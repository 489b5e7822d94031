"""Evaluation's statistics against closed forms, and its images against their seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.evaluator import draw_images, estimate, score_prompts, win_rate
from diffusion.chain import Chain
from diffusion.policy import Policy
from protocol.recipe import Lora, Sampler
from tests.models import make_tiny_model


def test_an_estimate_is_over_prompts_whose_images_are_not_independent() -> None:
    found = estimate(np.array([[1.0, 3.0], [4.0, 6.0], [8.0, 8.0]]))
    # Means of the prompts are 2, 5 and 8: their standard deviation is 3.
    assert found.mean == 5.0
    assert found.standard_error == pytest.approx(3 / math.sqrt(3))


def test_more_images_that_say_the_same_do_not_make_an_estimate_surer() -> None:
    scores = np.array([[1.0], [2.0], [4.0]])
    assert estimate(np.repeat(scores, 10, axis=1)) == estimate(scores)


def test_one_prompt_has_no_standard_error() -> None:
    found = estimate(np.array([[1.0, 2.0, 3.0]]))
    assert found.mean == 2.0
    assert math.isnan(found.standard_error)


def test_large_fp32_scores_are_averaged_without_losing_digits() -> None:
    scores = np.full((1000, 10), 16_777_217.0, dtype=np.float32)
    assert estimate(scores).mean == float(np.float32(16_777_217.0))


def test_ties_count_half_in_a_win_rate() -> None:
    tuned, base = np.array([[2.0, 1.0], [0.0, 5.0]]), np.array([[1.0, 1.0], [3.0, 4.0]])
    # Wins of the prompts: (1 + 1/2) / 2 and (0 + 1) / 2.
    assert win_rate(tuned, base).mean == pytest.approx((0.75 + 0.5) / 2)


@given(st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=6), st.integers(0, 9))
def test_win_rates_of_two_models_against_each_other_add_up_to_one(scores: list[list[int]], seed: int) -> None:
    ours = np.array(scores)
    theirs = np.random.default_rng(seed).integers(-3, 3, ours.shape)
    assert win_rate(ours, theirs).mean + win_rate(theirs, ours).mean == pytest.approx(1)
    assert win_rate(ours, ours).mean == 0.5


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    policy = Policy(str(make_tiny_model(tmp_path_factory.mktemp("evaluator") / "model")), trainable=Lora(), seed=0)
    return Chain(policy, Sampler(num_steps=3))


def test_an_image_depends_on_its_prompt_number_and_seed_alone(chain: Chain) -> None:
    three = draw_images(chain, "a red seven", 3, seed=1)
    assert three.shape == (3, 16, 16, 3)
    assert three.dtype == np.uint8
    assert np.array_equal(three, draw_images(chain, "a red seven", 3, seed=1))
    assert not np.array_equal(three, draw_images(chain, "a red seven", 3, seed=2))
    assert not np.array_equal(three, draw_images(chain, "a blue one", 3, seed=1))
    assert len({image.tobytes() for image in three}) == 3


def test_scores_are_kept_by_label_prompt_and_image(chain: Chain) -> None:
    def score(images: np.ndarray, prompt: str) -> dict[str, np.ndarray]:
        return {"length": np.full(len(images), len(prompt)), "number": np.arange(len(images))}

    scores = score_prompts(chain, ["ab", "abcd", "a"], 2, 0, score)
    assert scores["length"].tolist() == [[2, 2], [4, 4], [1, 1]]
    assert scores["number"].tolist() == [[0, 1]] * 3
