"""docs/rewards.md is true: its example runs, its recipes parse, its tables name what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from protocol.errors import RewardError
from protocol.paths import ROOT
from protocol.recipe import Recipe
from protocol.roles import Reward
from rewards.contract import probe_images
from rewards.judge_client import Endpoint
from rewards.loading import build, builtin_names, check_exists

GUIDE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
EXAMPLE = "./my_reward.py:Sharpness"


def blocks(language: str) -> list[str]:
    """The guide's code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


def first_cells(heading: str) -> list[str]:
    """What stands in backquotes in the first column of the table under a heading."""
    section = GUIDE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [
        name for row in re.findall(r"^\|([^|]*)\|", section, re.MULTILINE) for name in re.findall(r"`([^`]*)`", row)
    ]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the guide's example, saved as the guide says."""
    (example,) = (block for block in blocks("python") if "class Sharpness" in block)
    (tmp_path / "my_reward.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_scores_a_noisy_image_above_a_smooth_one(desk: Path) -> None:
    images = probe_images(4, 32)
    scores = build(EXAMPLE, {"scale": 500})(images, ["a cat"] * 4)
    assert scores.tolist() == sorted(scores)
    assert scores == pytest.approx(2 * build(EXAMPLE, {})(images, ["a cat"] * 4))
    assert build(EXAMPLE, {})(np.full((1, 8, 8, 3), 9, np.uint8), ["a cat"]) == pytest.approx([0])
    with pytest.raises(RewardError, match="scale must be above 0"):
        build(EXAMPLE, {"scale": 0})


def test_the_command_that_tries_the_example_works_as_written(desk: Path) -> None:
    (command,) = (line for block in blocks("bash") for line in block.splitlines() if EXAMPLE in line)
    program, *arguments = command.split()
    assert program == "sfumato"
    done = subprocess.run(
        [sys.executable, str(ROOT / "sfumato.py"), *arguments], capture_output=True, text=True, timeout=120, cwd=desk
    )
    assert done.returncode == 0, done.stderr
    assert "pure, point-wise" in done.stdout
    assert "images/s" in done.stdout


def test_every_recipe_in_the_guide_parses_and_names_rewards_that_exist(desk: Path) -> None:
    for block in blocks("yaml"):
        said = yaml.safe_load(block)
        rest = {"rewards": [{"name": "jpeg_compressibility", "called": "other"}], "prompts": {"train": "p.txt"}}
        algorithm = {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2}
        batch = {"num_groups": 1, "group_size": 2}
        recipe = Recipe.model_validate({"rounds": 9, "algorithm": algorithm, "batch": batch, **rest, **said})
        for reward in recipe.scored_rewards:
            check_exists(reward.name)
            if "base_url" in reward.kwargs:
                Endpoint(**{**reward.kwargs, "api_key_env": ""})


def test_the_table_of_rewards_is_what_there_is() -> None:
    assert sorted(first_cells("Built in")) == builtin_names()


def test_the_table_of_settings_is_what_a_recipe_takes() -> None:
    assert sorted(first_cells("Settings")) == sorted(Reward.model_fields)
