"""`sfumato rewards`: what is shown without importing it, and what a trial lets through and refuses."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from actors.reward_actor import RewardActor
from cluster.cli import run_command_line
from cluster.environments import environment_of
from cluster.reward_tools import Sheet, check_reward, examine, list_rewards, read_kwargs
from protocol.errors import RecipeError, RewardError
from protocol.paths import ROOT
from rewards.contract import check_scores, probe_images
from rewards.loading import builtin_names
from tests.cluster.package_shelf import add_package

IMAGES = probe_images(4, 8)

MINE = """
'''Rewards of all kinds.'''
import os, signal, sys
import numpy as np

class Brightness:
    def __init__(self, scale=1.0):
        self.scale = scale
    def __call__(self, images, prompts):
        print("a word on the side")
        return self.scale * images.mean(axis=(1, 2, 3))

def needs_a_file(images, prompts):
    raise FileNotFoundError("weights.bin")

def dies(images, prompts):
    os.kill(os.getpid(), signal.SIGKILL)

def leaves(images, prompts):
    os._exit(3)
"""
AGED = """
'''How old hjson is.'''
PINS = ("hjson==0.0.1",)
import hjson

def age(images, prompts):
    return [hjson.age] * len(images)
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py"


def sheet_of(score: Any, images: np.ndarray = IMAGES) -> Sheet:
    with closing(RewardActor("mine", score, check_scores)) as actor:
        return examine("mine", actor, "generated", images, "a red seven")


def brightness(images: np.ndarray, prompts: list[str]) -> Any:
    return images.mean(axis=(1, 2, 3))


def ranks(images: np.ndarray, prompts: list[str]) -> Any:
    return np.argsort(np.argsort(brightness(images, prompts))).astype(float)


def centred(images: np.ndarray, prompts: list[str]) -> Any:
    scores = brightness(images, prompts)
    return (scores - scores.mean()) / np.float64(scores.std() or np.nan)


def test_a_function_of_each_image_passes() -> None:
    sheet = sheet_of(brightness)
    assert sheet.scores == tuple(brightness(IMAGES, []).astype(np.float32))
    assert (sheet.repeated, sheet.permuted, sheet.alone) == (0.0, 0.0, 0.0)
    assert sheet.seconds > 0


def test_rounding_that_depends_on_the_batch_passes_and_is_told() -> None:
    def rounded(images: np.ndarray, prompts: list[str]) -> Any:
        return brightness(images, prompts) * (1 + 1e-4 * (len(images) == 1))

    alone = sheet_of(rounded).alone
    assert alone is not None
    assert 1e-5 < alone < 1e-3


def test_what_depends_on_siblings_must_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardError, match=r"another score without its siblings.*declare group_wise = True"):
        sheet_of(lambda images, prompts: ranks(images[::-1], prompts)[::-1] + 1.0)
    with pytest.raises(RewardError, match=r"(?s)cannot score an image without its siblings.*declare group_wise = True"):
        sheet_of(centred)
    monkeypatch.setattr(ranks, "group_wise", True, raising=False)
    sheet = sheet_of(ranks)
    assert sheet.alone is None
    assert sheet.permuted == 0.0


def test_an_only_child_has_nothing_to_be_compared_with() -> None:
    assert sheet_of(brightness, IMAGES[:1]).alone is None


def test_what_answers_otherwise_when_asked_again_must_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)

    def votes(images: np.ndarray, prompts: list[str]) -> Any:
        return generator.uniform(size=len(images))

    with pytest.raises(RewardError, match=r"other scores when it is asked again.*declare is_pure = False"):
        sheet_of(votes)
    monkeypatch.setattr(votes, "is_pure", False, raising=False)
    assert sheet_of(votes).repeated > 0


def test_what_scores_places_and_not_images_is_refused() -> None:
    with pytest.raises(RewardError, match="other scores when the siblings change places"):
        sheet_of(lambda images, prompts: 1.0 + np.arange(len(images)))


def test_a_trial_has_generated_and_given_images_of_every_prompt(mine: str, tmp_path: Path) -> None:
    for name, size, value in (("a", (6, 4), 10), ("b", (6, 4), 20), ("c", (5, 5), 40)):
        Image.new("RGB", size, (value,) * 3).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in "abc"]
    said = check_reward(
        f"{mine}:Brightness", {"scale": 2.0}, prompts=["p", "q"], files=files, size=16, num_images=3, tell=pytest.fail
    )
    assert said["reward"] == "Rewards of all kinds."
    assert said["environment"] == "main"
    assert said["kind"] == "pure, point-wise"
    scores = [said[f"scores {number}"] for number in range(1, 7)]
    assert scores[1:3] == ["20 40   (a.png, b.png, 6x4; 'p')", "80   (c.png, 5x5; 'p')"]
    assert [line.replace("'p'", "'q'") for line in scores[:3]] == scores[3:]
    assert "generated, 16x16" in scores[0]
    assert said["one alone"] == "the same scores"
    assert "images/s on 1 CPU thread" in said["speed"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("needs_a_file", "needs_a_file raised FileNotFoundError: weights.bin"),
        ("dies", "dies was killed by signal 9, most often for want of memory"),
        ("leaves", "leaves ended with exit code 3"),
        ("nobody", "has no class or function nobody"),
    ],
)
def test_whatever_becomes_of_a_trial_is_told(mine: str, name: str, told: str) -> None:
    with pytest.raises(RewardError, match=told):
        check_reward(f"{mine}:{name}", {}, size=8, tell=pytest.fail)


def test_a_trial_runs_in_the_rewards_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_package(tmp_path, "hjson", "0.0.1", "age = 1000.0\n")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "aged.py").write_text(AGED)
    told: list[str] = []
    said = check_reward(f"{tmp_path}/aged.py:age", {}, size=8, tell=told.append)
    assert said["scores 1"].startswith("1000 1000 1000 1000 ")
    assert str(environment_of("age", ["hjson==0.0.1"]).folder) in said["environment"]
    assert "installing age's environment: Installing collected packages: hjson" in told
    with pytest.raises(RewardError, match=r"(?s)pip says:.*hjson==0\.0\.2"):
        check_reward(f"{tmp_path}/aged.py:age", {}, pins=["hjson==0.0.2"], size=8, tell=told.append)


def test_the_list_holds_every_reward_and_imports_none() -> None:
    assert list(list_rewards()) == builtin_names()
    code = (
        "import sys; from cluster.reward_tools import list_rewards; list_rewards(); "
        "print([name for name in ('torch', 'ray', 'transformers', *sys.modules) "
        "if name in ('torch', 'ray', 'transformers') and name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_list_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["rewards", "list"]) == 0
    out = capsys.readouterr().out
    assert "jpeg_compressibility    How small an image is as a JPEG" in out
    assert "environment: main; downloads: nothing" in out


def test_the_command_checks_a_builtin_reward_with_the_size_that_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["rewards", "check", "digit_alignment", "--kwargs", "floor=-1e1", "--num-images", "2"]) == 0
    out = capsys.readouterr().out
    assert "generated, 32x32; 'a red seven on a blue ground'" in out
    assert "other order  the same scores" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["jpg_compressibility"], "no built-in reward of this name; did you mean jpeg_compressibility?"),
        (["./nowhere.py:Score"], "does not exist"),
        (["jpeg_compressibility", "--images", "nowhere.png"], "there is no such image file. Got: 'nowhere.png'"),
        (["jpeg_compressibility", "--images", __file__], "cannot be read: cannot identify image file"),
        (["jpeg_compressibility", "--num-images", "0"], "--num-images is too small. Got: 0"),
        (["jpeg_compressibility", "--kwargs", "quality=1"], "cannot be built: TypeError"),
        (["jpeg_compressibility", "--kwargs", "quality"], "not of the form key.sub=value"),
        (["digit_alignment", "--prompt", "a cat"], "digit_alignment cannot read a prompt. Got: 'a cat'"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["rewards", "check", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert told in message
    assert "Traceback" not in message


def test_arguments_are_read_as_in_recipes() -> None:
    assert read_kwargs(["a=1e-3", "b=[x, y]", "c.d=true", "e="]) == {
        "a": 1e-3,
        "b": ["x", "y"],
        "c": {"d": True},
        "e": None,
    }
    with pytest.raises(RecipeError, match="is not YAML"):
        read_kwargs(["a=["])
