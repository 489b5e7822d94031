"""A reward is found by its module's name, by file or by dotted path; nothing of the user's hides anything of ours."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
import pytest

import rewards.contract
from protocol.errors import RewardError
from protocol.roles import Reward
from rewards.jpeg_compressibility import JpegCompressibility
from rewards.loading import (
    FOLDER,
    Declaration,
    build,
    builtin_names,
    check_exists,
    declared,
    pins_of,
    resolve,
    source_of,
)

MINE = """
class Brightness:
    def __init__(self, scale=1.0):
        self.scale = scale
    def __call__(self, images, prompts):
        return self.scale * images.mean(axis=(1, 2, 3))

def brightness(images, prompts, scale=1.0):
    return scale * images.mean(axis=(1, 2, 3))

class Placed:
    def __init__(self, device, scale=1.0):
        self.device = device
    def __call__(self, images, prompts):
        return self.device

async def placed(images, prompts, device="nowhere"):
    return device

def vote(images, prompts, scale=1.0):
    return [1.0] * len(images)
vote.is_pure = False

class Mute:
    pass

class Fussy:
    def __init__(self):
        raise OSError("no such judge")

threshold = 0.5
"""
IMAGES = np.full((2, 4, 4, 3), 7, np.uint8)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's working directory with a file of rewards."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def test_names_and_modules_are_the_same_thing() -> None:
    assert {"digit_alignment", "jpeg_compressibility", "jpeg_incompressibility"} <= set(builtin_names())
    assert not {"__init__", "contract", "loading"} & set(builtin_names())
    assert resolve("jpeg_compressibility") is JpegCompressibility
    for name in builtin_names():
        assert resolve(name).__name__ == "".join(part.capitalize() for part in name.split("_"))


@pytest.mark.parametrize("form", ["./mine.py:{}", "mine.py:{}", "mine:{}", "mine.{}"])
@pytest.mark.parametrize("name", ["Brightness", "brightness"])
def test_a_class_and_a_function_are_found_by_file_and_by_dotted_path(desk: Path, form: str, name: str) -> None:
    if not form.startswith(("./", "mine.py")):
        sys.modules.pop("mine", None)
    assert list(build(form.format(name), {"scale": 2.0})(IMAGES, ["p", "p"])) == [14.0, 14.0]


def test_an_absolute_path_is_found_from_anywhere(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert list(build(f"{desk}/mine.py:Brightness", {})(IMAGES, ["p", "p"])) == [7.0, 7.0]


@pytest.mark.parametrize("file", ["rewards.py", "protocol.py", "contract.py", "numpy.py"])
def test_a_file_of_any_name_hides_nothing(desk: Path, file: str) -> None:
    (desk / file).write_text(MINE)
    build(f"./{file}:Brightness", {})
    assert sys.modules["rewards.contract"] is rewards.contract
    assert sys.modules["numpy"] is np
    assert resolve("jpeg_compressibility") is JpegCompressibility


def test_files_of_one_name_in_two_folders_are_two_rewards(desk: Path) -> None:
    (desk / "other").mkdir()
    (desk / "other" / "mine.py").write_text("def brightness(images, prompts):\n    return [0.0] * len(images)\n")
    assert list(build("./other/mine.py:brightness", {})(IMAGES, ["p", "p"])) == [0.0, 0.0]
    assert list(build("./mine.py:brightness", {})(IMAGES, ["p", "p"])) == [7.0, 7.0]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("./mine.py:Mute", "makes objects that cannot be called"),
        ("./mine.py:Fussy", "cannot be built: OSError: no such judge"),
        ("./mine.py:threshold", "has no class or function threshold.*Brightness, Fussy, Mute, Placed, brightness"),
        ("./mine.py:", "has no class or function "),
        ("mine:Nothing", "has no class or function Nothing"),
        ("jpeg", "no built-in reward of this name"),
        ("", "no built-in reward of this name"),
        ("loading", "no built-in reward of this name"),
        ("rewards.loading:Nothing", "give your own file as ./file.py:Name"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(desk: Path, spec: str, told: str) -> None:
    with pytest.raises(RewardError, match=told):
        build(spec, {})


def test_arguments_that_a_class_does_not_take_are_refused_with_those_that_it_does(desk: Path) -> None:
    with pytest.raises(RewardError, match=r"cannot be built: TypeError.*\{'scala': 2\}.*Brightness\(scale=1.0\)"):
        build("./mine.py:Brightness", {"scala": 2})


def test_a_file_that_failed_to_load_can_be_mended_and_loaded(desk: Path) -> None:
    file = desk / "slip.py"
    file.write_text("import numpi\n")
    with pytest.raises(RewardError, match="ModuleNotFoundError: No module named 'numpi'"):
        resolve("./slip.py:score")
    file.write_text("def score(images, prompts):\n    return [1.0] * len(images)\n")
    assert list(build("./slip.py:score", {})(IMAGES, ["p", "p"])) == [1.0, 1.0]


def test_looking_whether_a_reward_exists_runs_none_of_it(desk: Path) -> None:
    (desk / "bomb.py").write_text("raise SystemExit\n")
    for spec in ("./bomb.py:Score", "bomb:Score", "jpeg_compressibility"):
        check_exists(spec)
    for spec in ("./nowhere.py:Score", "jpeg", ""):
        with pytest.raises(RewardError):
            check_exists(spec)


DECLARES = """
'''Sharpness by an edge detector.

More about it.
'''
import a_package_that_is_not_here

PINS: tuple[str, ...] = ("opencv-python-headless==4.10.0.84", "numpy<2")
DOWNLOADS = "28 MB: " "weights"
ENVIRONMENT = "0.1 GB"
IMAGE_SIZE = 32
EXAMPLE_PROMPT = "a cat"
raise SystemExit
"""


@pytest.mark.parametrize("form", ["./said.py:Sharpness", "said:Sharpness", "said.Sharpness", "package.said:Sharpness"])
def test_what_a_file_declares_is_read_without_running_it(desk: Path, form: str) -> None:
    (desk / "package").mkdir()
    (desk / "package" / "__init__.py").write_text("raise SystemExit")
    for folder in (desk, desk / "package"):
        (folder / "said.py").write_text(DECLARES)
    pins = ("opencv-python-headless==4.10.0.84", "numpy<2")
    assert declared(form) == Declaration(
        pins, "28 MB: weights", "0.1 GB", "Sharpness by an edge detector.", 32, "a cat"
    )
    assert pins_of(Reward(name=form)) == pins
    assert pins_of(Reward(name=form, pins=("numpy<2",))) == ("numpy<2",)
    assert pins_of(Reward(name=form, pins=())) == ()


def test_a_file_that_declares_nothing_needs_nothing(desk: Path) -> None:
    assert declared("./mine.py:brightness") == Declaration()
    assert declared("nowhere.at_all:brightness") == Declaration()
    assert source_of("mine:brightness") == desk / "mine.py"
    assert source_of("jpeg_compressibility") == FOLDER / "jpeg_compressibility.py"
    assert source_of("sys:path") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("PINS = 'timm==1.0'", r"PINS in .*odd.py cannot be read without running.*PINS = 'timm==1.0'.*a tuple"),
        ("PINS = ('timm==' + VERSION,)", "write it out, without names or calls"),
        ("PINS = ('timm', 1)", "are not all text"),
        ("DOWNLOADS = 28", "DOWNLOADS in .* Expected: text"),
        ("PINS = (", "cannot be read: '\\(' was never closed"),
    ],
)
def test_what_cannot_be_read_is_refused(desk: Path, text: str, told: str) -> None:
    (desk / "odd.py").write_text(text + "\n")
    with pytest.raises(RewardError, match=told):
        declared("./odd.py:Odd")


def test_every_builtin_says_what_it_is() -> None:
    assert not [name for name in builtin_names() if not declared(name).summary]


def test_where_a_reward_computes_is_told_to_those_that_ask(desk: Path) -> None:
    assert build("./mine.py:Placed", {}, "cuda")(IMAGES, []) == "cuda"
    assert build("./mine.py:Placed", {"device": "cuda:1"}, "cuda")(IMAGES, []) == "cuda:1"
    assert asyncio.run(build("./mine.py:placed", {})(IMAGES, [])) == "cpu"
    assert list(build("./mine.py:Brightness", {}, "cuda")(IMAGES, ["p", "p"])) == [7.0, 7.0]


def test_a_function_with_arguments_is_still_what_it_declares(desk: Path) -> None:
    assert build("./mine.py:vote", {"scale": 2.0}).is_pure is False
