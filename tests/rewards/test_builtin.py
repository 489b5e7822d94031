"""The rewards that come with sfumato, judged on images whose answers are known."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from assets.digits import Variation, random_scene, to_uint8, write_prompt
from protocol.errors import RewardError
from protocol.paths import ROOT, read_prompts
from rewards.contract import check_scores, probe_images
from rewards.digit_alignment import COLOURS, DIGITS, DigitAlignment, Said, parse_prompt
from rewards.jpeg_compressibility import JpegCompressibility
from rewards.jpeg_incompressibility import JpegIncompressibility

PROMPT = "a red seven on a blue ground"


@pytest.fixture(scope="module")
def alignment() -> DigitAlignment:
    torch.set_num_threads(1)
    return DigitAlignment()


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, list[str], list[Said]]:
    """Real digits that the classifier was not trained on, and what they show."""
    images, said_N3 = random_scene(600, False, Variation(), torch.Generator().manual_seed(5))
    said = [Said(*row) for row in said_N3.tolist()]
    return to_uint8(images), [write_prompt(each) for each in said], said


def test_a_jpeg_reward_is_the_size_of_the_file_that_pillow_writes() -> None:
    images = probe_images(4, 32)
    sizes = []
    for image in images:
        Image.fromarray(image).save(buffer := io.BytesIO(), format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    assert JpegIncompressibility()(images, [PROMPT] * 4) == sizes
    assert JpegCompressibility()(images, [PROMPT] * 4) == [-size for size in sizes]
    assert sizes == sorted(sizes), "noise compresses badly"


@pytest.mark.parametrize(
    "reward",
    [JpegCompressibility(), JpegIncompressibility(), DigitAlignment()],
    ids=lambda reward: type(reward).__name__,
)
def test_a_score_does_not_depend_on_who_else_is_in_the_batch(reward: DigitAlignment) -> None:
    images = probe_images(5, 32)
    together = check_scores("reward", reward(images, [PROMPT] * 5), [PROMPT] * 5)
    alone = [check_scores("reward", reward(image[None], [PROMPT]), [PROMPT])[0] for image in images]
    assert together == pytest.approx(alone, rel=1e-5)


def test_every_prompt_of_ours_says_what_it_was_written_from() -> None:
    for digit in range(len(DIGITS)):
        for colour in range(len(COLOURS)):
            for ground in range(len(COLOURS)):
                said = Said(digit, colour, ground)
                assert parse_prompt(write_prompt(said)) == said
    for file in ("prompts_train.txt", "prompts_held_out.txt"):
        for prompt in read_prompts(str(ROOT / "assets" / file)):
            assert write_prompt(parse_prompt(prompt)) == prompt


@pytest.mark.parametrize(
    "spelling", ["A Red Seven on a blue ground", " a red seven  on a blue ground.", "an red seven on an blue ground"]
)
def test_case_spaces_articles_and_a_full_stop_do_not_matter(spelling: str) -> None:
    assert parse_prompt(spelling) == parse_prompt(PROMPT) == Said(7, 0, 4)


@pytest.mark.parametrize("prompt", ["", "a cat", "a red seven", f"{PROMPT} and more", "a red ten on a blue ground"])
def test_a_prompt_outside_the_grammar_is_named(alignment: DigitAlignment, prompt: str) -> None:
    with pytest.raises(RewardError, match="cannot read a prompt") as refused:
        alignment(probe_images(1, 32), [prompt])
    assert repr(prompt) in str(refused.value)


def test_images_of_another_size_are_refused(alignment: DigitAlignment) -> None:
    with pytest.raises(RewardError, match=r"images of this size.*\(1, 16, 16, 3\)"):
        alignment(probe_images(1, 16), [PROMPT])


def test_the_classifier_reads_real_digits_that_it_has_not_seen(
    alignment: DigitAlignment, scene: tuple[np.ndarray, list[str], list[Said]]
) -> None:
    images, prompts, _ = scene
    digit, colour, ground = alignment.is_right(images, prompts).mean(axis=0)
    assert digit > 0.93
    assert colour > 0.97
    assert ground > 0.99


def test_saying_what_an_image_shows_scores_above_saying_anything_else(
    alignment: DigitAlignment, scene: tuple[np.ndarray, list[str], list[Said]]
) -> None:
    images, prompts, said = scene
    right = alignment(images, prompts)
    for wrong in (
        [write_prompt(each._replace(digit=(each.digit + 3) % 10)) for each in said],
        [write_prompt(each._replace(ground=each.colour, colour=each.ground)) for each in said],
    ):
        assert (right > alignment(images, wrong)).mean() > 0.9
    assert right.mean() > -1


def test_scores_lie_between_three_floors_and_zero(
    alignment: DigitAlignment, scene: tuple[np.ndarray, list[str], list[Said]]
) -> None:
    images, prompts, _ = scene
    scores = alignment(images, prompts[::-1])
    assert scores.max() <= 0
    assert scores.min() >= -18
    deeper = DigitAlignment(floor=-10.0)(images, prompts[::-1])
    assert (deeper <= scores).all()
    assert deeper.min() >= -30
    unclamped = alignment.log_probs(images, prompts[::-1])
    assert scores == pytest.approx(np.maximum(unclamped, -6).sum(axis=1))


@pytest.mark.parametrize("floor", [0.0, 1.0, float("nan")])
def test_a_floor_must_be_negative(floor: float) -> None:
    with pytest.raises(RewardError, match="needs a negative floor"):
        DigitAlignment(floor=floor)


def test_weights_that_are_not_there_are_named() -> None:
    with pytest.raises(RewardError, match=r"finds no classifier weights.*nowhere\.safetensors"):
        DigitAlignment(classifier="nowhere.safetensors")


def test_weights_that_are_torn_are_named(tmp_path: Path) -> None:
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(RewardError, match=r"torn\.safetensors of digit_alignment cannot be read"):
        DigitAlignment(classifier=str(tmp_path / "torn.safetensors"))
