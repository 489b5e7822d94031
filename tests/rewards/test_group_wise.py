"""Rewards that see all siblings: closed forms, and what permuting the siblings does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps
from transformers import CLIPConfig, CLIPModel

from actors.reward_actor import RewardActor
from assets.digits import Variation, random_scene, to_uint8
from protocol.errors import RewardError
from protocol.paths import ROOT
from rewards.contract import check_scores, probe_images
from rewards.image_diversity import ImageDiversity, mean_distance
from rewards.jpeg_compressibility import JpegCompressibility
from rewards.loading import build
from rewards.pairwise_win_rate import PairwiseWinRate, win_rate

PROMPT = "a red seven on a blue ground"
OF = """
import numpy as np

class Impure:
    is_pure = False
    def __init__(self, device="nowhere"):
        self.device = device
    async def __call__(self, images, prompts):
        return images.mean(axis=(1, 2, 3))

def broken(images, prompts):
    return np.full(len(prompts), np.nan)
"""


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """Five different scenes."""
    torch.set_num_threads(1)
    return to_uint8(random_scene(5, False, Variation(), torch.Generator().manual_seed(3))[0])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with random weights, as on the hub."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**layers, "image_size": 32, "patch_size": 8}
    text = {**layers, "vocab_size": 580, "max_position_embeddings": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    for file in (ROOT / "assets" / "digits-base" / "tokenizer").iterdir():
        copy(file, folder)
    return folder


@pytest.fixture
def of(tmp_path: Path) -> Iterator[str]:
    """The file of somebody's own rewards."""
    (tmp_path / "of.py").write_text(OF)
    return str(tmp_path / "of.py")


def rate(reward: PairwiseWinRate, images: np.ndarray) -> list[float]:
    scores: list[float] = list(asyncio.run(reward(images, [PROMPT] * len(images))))
    return scores


def test_a_distance_is_the_mean_of_one_minus_cosine_to_the_others() -> None:
    east_north_west = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], dtype=torch.float64)
    assert mean_distance(east_north_west).tolist() == [1.5, 1.0, 1.5]
    angle = torch.tensor([0.0, 1.0], dtype=torch.float64)
    pair = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert mean_distance(pair).tolist() == pytest.approx([1 - np.cos(1.0)] * 2, rel=1e-12)


@pytest.mark.parametrize("row", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_an_embedding_without_direction_is_refused(row: list[float]) -> None:
    with pytest.raises(RewardError, match="zero or not finite"):
        mean_distance(torch.tensor([[1.0, 0.0], row]))


@given(nps.arrays(np.float64, (4, 3), elements=st.floats(0.1, 10)), st.floats(0.1, 10))
def test_diversity_does_not_depend_on_lengths_and_goes_with_the_images(rows: np.ndarray, factor: float) -> None:
    embedding = torch.from_numpy(rows)
    distance = mean_distance(embedding)
    assert mean_distance(embedding * factor).tolist() == pytest.approx(distance.tolist(), abs=1e-12)
    assert mean_distance(embedding.flip(0)).flip(0).tolist() == pytest.approx(distance.tolist(), abs=1e-12)
    assert ((distance >= 0) & (distance <= 2)).all()


@pytest.mark.parametrize("embedding", ["digits", "clip"])
def test_copies_have_no_diversity_and_one_odd_image_has_the_most(
    digits: np.ndarray, clip_folder: Path, embedding: str
) -> None:
    reward = ImageDiversity(embedding if embedding == "digits" else str(clip_folder))
    copies = np.repeat(digits[:1], 4, axis=0)
    assert reward(copies, [PROMPT] * 4) == pytest.approx([0] * 4, abs=1e-6)
    odd = np.concatenate([copies[:3], digits[1:2]])
    scores = check_scores("image_diversity", reward(odd, [PROMPT] * 4), [PROMPT] * 4)
    assert scores[3] > 1e-4
    assert scores[:3] == pytest.approx([scores[3] / 3] * 3, rel=1e-3)
    order = [4, 2, 0, 1, 3]
    assert reward(digits[order], [PROMPT] * 5) == pytest.approx(reward(digits, [PROMPT] * 5)[order], rel=1e-4)


def test_diversity_sees_different_digits_as_further_apart_than_one_digits_shades(digits: np.ndarray) -> None:
    reward = ImageDiversity()
    shades = np.stack([np.clip(digits[0].astype(int) + shift, 0, 255) for shift in range(5)]).astype(np.uint8)
    assert reward(digits, [PROMPT] * 5).mean() > 10 * reward(shades, [PROMPT] * 5).mean()


@pytest.mark.parametrize("size", [16, 64])
def test_the_digits_embedding_says_what_to_do_about_other_sizes(size: int) -> None:
    with pytest.raises(RewardError, match=r"cannot see images of this size.*give a CLIP model"):
        ImageDiversity()(probe_images(2, size), [PROMPT] * 2)


def test_clip_sees_images_of_any_shape(clip_folder: Path) -> None:
    images = np.random.Generator(np.random.Philox(2)).integers(0, 256, (3, 40, 56, 3), np.uint8)
    assert (ImageDiversity(str(clip_folder))(images, [PROMPT] * 3) > 0).all()


def test_a_clip_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=f"image_diversity finds no .*{tmp_path}"):
        ImageDiversity(str(tmp_path))


def test_a_rate_is_the_share_that_is_beaten_and_ties_count_half() -> None:
    assert win_rate(np.float32([1, 2, 3, 4, 5])).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert win_rate(np.float32([1, 7, 7])).tolist() == [0, 0.75, 0.75]
    assert win_rate(np.float32([3, 3, 3, 3])).tolist() == [0.5] * 4


@given(nps.arrays(np.float32, st.integers(2, 9), elements=st.integers(-5, 5)))
def test_rates_depend_on_order_alone_and_average_to_one_half(scores: np.ndarray) -> None:
    rates = win_rate(scores)
    assert rates.tolist() == win_rate(np.exp(scores)).tolist()
    assert (1 - rates).tolist() == pytest.approx(win_rate(-scores).tolist())
    assert win_rate(scores[::-1])[::-1].tolist() == rates.tolist()
    assert rates.mean() == pytest.approx(0.5)


def test_another_reward_is_compared_within_the_group() -> None:
    images = probe_images(5, 16)
    reward = build("pairwise_win_rate", {"of": "jpeg_compressibility"})
    assert isinstance(reward, PairwiseWinRate)
    assert reward.is_pure
    marks = np.float32(JpegCompressibility()(images, [PROMPT] * 5))
    assert rate(reward, images) == win_rate(marks).tolist()
    assert rate(reward, images[::-1]) == win_rate(marks).tolist()[::-1]


def test_what_it_is_made_of_may_be_a_coroutine_and_makes_it_impure(of: str) -> None:
    reward = PairwiseWinRate(f"{of}:Impure", device="cuda")
    assert not reward.is_pure
    images = np.stack([np.full((4, 4, 3), grey, np.uint8) for grey in (9, 7, 8)])
    assert rate(reward, images) == [1, 0, 0.5]


@pytest.mark.parametrize(("kwargs", "device"), [({}, "cuda"), ({"device": "cpu"}, "cpu")])
def test_the_device_is_handed_on_where_the_other_reward_has_one(of: str, kwargs: dict[str, Any], device: str) -> None:
    reward = PairwiseWinRate(f"{of}:Impure", kwargs, device="cuda")
    assert reward.of.device == device  # type: ignore[attr-defined]
    PairwiseWinRate("jpeg_compressibility", device="cuda")


def test_scores_of_the_other_reward_are_checked_under_its_name(of: str) -> None:
    with pytest.raises(RewardError, match=r"of\.py:broken.*not finite"):
        rate(PairwiseWinRate(f"{of}:broken"), probe_images(2, 16))
    with pytest.raises(RewardError, match="no built-in reward of this name"):
        build("pairwise_win_rate", {"of": "jpeg_compresibility"})


def test_a_group_of_one_is_refused_in_clear_words() -> None:
    image = probe_images(1, 32)
    for name, kwargs in (("image_diversity", {}), ("pairwise_win_rate", {"of": "jpeg_compressibility"})):
        reward = build(name, kwargs)
        assert reward.group_wise is True  # type: ignore[attr-defined]
        told = rf"{name} compares siblings.*a group of 1.*{PROMPT}.*at least 2"
        with closing(RewardActor(name, reward, check_scores)) as actor, pytest.raises(RewardError, match=told):
            actor.score(image, PROMPT)
