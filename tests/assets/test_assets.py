"""What comes with sfumato: prompts that share no scene, a tokenizer that knows them, a model that anybody can load."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTokenizer

from assets.digits import Variation, load_strokes, random_scene, render, split_scenes, to_uint8, write_prompt
from protocol.paths import EMBEDDED_MODEL, ROOT, read_prompts
from rewards.digit_alignment import COLOURS, DIGITS, DigitAlignment, Said, parse_prompt

LARGEST_BYTES = 11 * 10**6
ASSETS = ROOT / "assets"


def prompts_of(name: str) -> list[str]:
    return read_prompts(str(ASSETS / f"prompts_{name}.txt"))


def test_prompts_are_disjoint_and_together_every_scene() -> None:
    train, held_out = prompts_of("train"), prompts_of("held_out")
    every = {
        write_prompt(Said(*scene))
        for scene in product(range(len(DIGITS)), range(len(COLOURS)), range(len(COLOURS)))
        if scene[1] != scene[2]
    }
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == every
    assert (len(train), len(held_out)) == (648, 72)
    assert len(train) + len(held_out) == len(every)


def test_every_word_of_a_held_out_prompt_was_trained_on_in_its_place() -> None:
    trained = [parse_prompt(prompt) for prompt in prompts_of("train")]
    for said in map(parse_prompt, prompts_of("held_out")):
        for field in Said._fields:
            assert getattr(said, field) in {getattr(scene, field) for scene in trained}


def test_held_out_scenes_are_balanced() -> None:
    _, held_out = split_scenes()
    assert [write_prompt(scene) for scene in held_out] == prompts_of("held_out")
    for number in range(len(COLOURS)):
        assert sum(scene.colour == number for scene in held_out) == 8
        assert sum(scene.ground == number for scene in held_out) == 8
    assert {sum(scene.digit == number for scene in held_out) for number in range(len(DIGITS))} == {7, 8}


def test_the_tokenizer_knows_every_word_of_every_prompt() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_MODEL, subfolder="tokenizer")
    for prompt in [*prompts_of("train"), *prompts_of("held_out")]:
        tokens = tokenizer.tokenize(prompt)
        assert tokens == [f"{word}</w>" for word in prompt.split()]
        assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True).strip() == prompt
        assert len(tokens) + 2 <= tokenizer.model_max_length


def test_the_model_is_one_that_plain_diffusers_loads_and_draws_with() -> None:
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED_MODEL)
    pipeline.set_progress_bar_config(disable=True)
    prompts = prompts_of("held_out")[::9]
    generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    images = pipeline(prompts, num_inference_steps=20, eta=1.0, guidance_scale=3.0, generator=generators).images
    assert {image.size for image in images} == {(32, 32)}
    right = DigitAlignment().is_right(np.stack([np.asarray(image) for image in images]), prompts)
    digit_N, colour_N, ground_N = right.T
    assert digit_N.mean() > 0.7
    # It mixes colours up on purpose, but draws both that it was told.
    assert colour_N.mean() > 0.3
    assert ground_N.mean() > 0.3


def test_assets_are_small() -> None:
    committed = [path for path in ASSETS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in committed) < LARGEST_BYTES


def test_strokes_are_real_digits_in_two_parts_that_share_none() -> None:
    training, held_out = load_strokes(True), load_strokes(False)
    assert len(training.digit_N) + len(held_out.digit_N) == 1797
    assert set(training.digit_N.tolist()) == set(held_out.digit_N.tolist()) == set(range(10))
    # The collection itself has no two equal scans, so equal strokes would be one digit in both parts.
    seen = {stroke.numpy().tobytes() for stroke in training.ink_N88}
    assert not any(stroke.numpy().tobytes() in seen for stroke in held_out.ink_N88)


def test_a_rendered_scene_has_its_ground_at_the_rim_and_its_colour_in_the_strokes() -> None:
    plain = Variation(colour=0.0)
    strokes = load_strokes(False).ink_N88[:8]
    red, blue = torch.full((8,), COLOURS.index("red")), torch.full((8,), COLOURS.index("blue"))
    images = to_uint8(render(strokes, red, blue, plain, torch.Generator().manual_seed(0)))
    assert (images.shape, images.dtype) == ((8, 32, 32, 3), np.uint8)
    assert (images[:, 0, :, 2] > images[:, 0, :, 0]).all()
    reddest = images.reshape(8, -1, 3)[np.arange(8), images[..., 0].reshape(8, -1).argmax(axis=1)]
    assert (reddest[:, 0] > reddest[:, 2]).all()


@pytest.mark.parametrize("training", [False, True])
def test_a_scene_repeats_itself_and_never_hides_a_digit_in_its_ground(training: bool) -> None:
    pictures, said = zip(
        *(random_scene(50, training, Variation(), torch.Generator().manual_seed(3)) for _ in range(2)), strict=True
    )
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(said[0], said[1])
    assert (said[0][:, 1] != said[0][:, 2]).all()


def test_a_data_card_says_what_the_model_is() -> None:
    card = Path(ASSETS / "README.md").read_text().lower()
    for word in ("scikit-learn", "held-out", "accuracy", "licen"):
        assert word in card
