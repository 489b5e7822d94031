"""Reading is done by a real model, in an environment of its own (slow); what follows from it is plain arithmetic."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from cluster.environments import environment_of, make
from protocol.errors import RewardError
from protocol.paths import ROOT
from rewards import ocr
from rewards.loading import declared
from rewards.ocr import accuracy, edit_distance, plain, quoted_text

WORDS = st.text(alphabet="abAB ", max_size=8)

READ = """
import importlib.util, json, socket, sys
sys.path.append(sys.argv[3])
import numpy as np
from rewards.contract import check_scores
from rewards.loading import build

def refuse(*_):
    raise OSError("there is no network")

socket.socket.connect = socket.create_connection = refuse
images, prompts = np.load(sys.argv[1]), json.loads(sys.argv[2])
reward = build("ocr", {})
together = check_scores("ocr", reward(images, prompts), prompts)
assert check_scores("ocr", reward(images[1:2], prompts[1:2]), prompts[1:2]) == together[1:2]
assert importlib.util.find_spec("torchvision") is None
print(json.dumps([together.tolist(), [reward.lines(image) for image in images]]))
"""


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Open late"', "Open late"),
        ("a sign that says “Open late”, at night", "Open late"),
        ('"one" above "two"', "onetwo"),
        ("the baker's sign, \"It's hot\"", "It's hot"),
    ],
)
def test_what_must_be_read_stands_in_double_quotes(prompt: str, text: str) -> None:
    assert quoted_text(prompt) == text


@pytest.mark.parametrize("prompt", ["a sign", "a 'sign'", 'a " sign', 'a "" sign', 'a "  " sign', ""])
def test_a_prompt_without_quoted_text_is_named(prompt: str) -> None:
    with pytest.raises(RewardError, match="no text in double quotes") as refused:
        quoted_text(prompt)
    assert repr(prompt) in str(refused.value)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("kitten", "sitting", 3), ("saturday", "sunday", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0)],
)
def test_the_edit_distance_is_levenshteins(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance


@given(WORDS, WORDS, WORDS)
def test_the_edit_distance_is_a_metric_within_its_bounds(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a + "x", b + "x") == edit_distance(a, b)


@pytest.mark.parametrize(
    ("lines", "score"),
    [
        (["Open late"], 1),
        (["OPEN", "LATE"], 1),
        (["Bar", "openlate", "since 1900"], 1),
        (["Ｏｐｅｎ late"], 1),
        (["Open lat"], 1 - 1 / 8),
        (["Opon late!"], 1 - 2 / 8),
        (["Open"], 1 - 4 / 8),
        ([], 0),
        (["quite another text, and a long one"], 0),
    ],
)
def test_accuracy_is_one_minus_the_share_of_characters_to_change(lines: list[str], score: float) -> None:
    assert accuracy(lines, "Open late") == score


@given(st.lists(WORDS, max_size=3), WORDS.filter(plain))
def test_accuracy_is_between_nothing_and_all(lines: list[str], wanted: str) -> None:
    assert 0 <= accuracy(lines, wanted) <= 1
    assert accuracy([*lines, wanted], wanted) == 1
    assert accuracy(lines, wanted.upper()) == accuracy(lines, wanted)


def test_what_the_reward_needs_is_declared_and_all_of_it_comes_with_its_packages() -> None:
    needs = declared("ocr")
    assert needs.pins == ocr.PINS
    assert all("==" in pin for pin in needs.pins)
    assert not needs.downloads
    assert quoted_text(needs.example_prompt) == "Open late"


def sign(text: str) -> np.ndarray:
    """Black text on white, 256 by 256."""
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).text((20, 90), text, font=ImageFont.load_default(34), fill=(10, 10, 120))
    return np.asarray(image)


@pytest.fixture(scope="module")
def python_with_pins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The interpreter of the reward's actors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("cache")))
        environment = environment_of("ocr", ocr.PINS)
        list(make(environment))
        yield str(environment.python)


@pytest.mark.slow
def test_rendered_text_is_read_in_the_rewards_own_environment_without_a_network(
    python_with_pins: str, tmp_path: Path
) -> None:
    images = [sign("Sfumato"), sign("Sfumata"), sign("Open\nlate"), sign("")]
    np.save(tmp_path / "images.npy", np.stack(images))
    prompts = ['a sign, "SFUMATO"', 'a sign, "Sfumato"', 'a neon sign that says "Open late"', '"x"']
    done = subprocess.run(
        [python_with_pins, "-c", READ, str(tmp_path / "images.npy"), json.dumps(prompts), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    scores, lines = json.loads(done.stdout.splitlines()[-1])
    assert scores == pytest.approx([1, 1 - 1 / 7, 1, 0])
    assert lines == [["Sfumato"], ["Sfumata"], ["Open", "late"], []]
