"""A process that runs other versions than its driver is refused."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.versions import LIBRARIES, OF_REWARDS, own_versions, refuse_others
from protocol.errors import TrainingError
from protocol.paths import ROOT
from sfumato import PACKAGES

WANTED = {"sfumato": "0.1.0, code 9f86d081", "Python": "3.11.9", "ray": "2.50.0", "torch": "2.9.0"}


def test_equal_versions_are_let_in() -> None:
    refuse_others("rollout 0", WANTED, WANTED)
    refuse_others("rollout 0", own_versions(), own_versions())


@pytest.mark.parametrize("name", WANTED)
def test_each_difference_is_refused_and_the_table_has_it_alone(name: str) -> None:
    with pytest.raises(TrainingError, match="rollout 0 on node a runs other versions") as refused:
        refuse_others("rollout 0 on node a", {**WANTED, name: "other"}, WANTED)
    lines = [line.split() for line in str(refused.value).splitlines()[1:-1]]
    assert lines == [["here", "driver"], [name, "other", *WANTED[name].split()]]


def test_what_is_missing_differs() -> None:
    with pytest.raises(TrainingError, match=r"torch +none +2\.9\.0"):
        refuse_others("rollout 0", {name: WANTED[name] for name in WANTED if name != "torch"}, WANTED)


def test_a_reward_may_have_other_libraries_but_not_other_code() -> None:
    refuse_others("reward a", {**WANTED, "torch": "1.0"}, WANTED, OF_REWARDS)
    with pytest.raises(TrainingError, match="code 0"):
        refuse_others("reward a", {**WANTED, "sfumato": "0.1.0, code 0"}, WANTED, OF_REWARDS)


def test_builds_of_one_version_count_as_equal() -> None:
    assert own_versions()["torch"] == importlib.metadata.version("torch").split("+")[0]
    assert {"sfumato", "Python", *LIBRARIES} == set(own_versions())


def test_a_changed_line_of_code_changes_the_version(tmp_path: Path) -> None:
    shutil.copy(ROOT / "sfumato.py", tmp_path)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))

    def version() -> str:
        command = [sys.executable, "-c", "from cluster.versions import own_versions; print(own_versions()['sfumato'])"]
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert version() == own_versions()["sfumato"]
    with (tmp_path / "diffusion" / "chain.py").open("a") as file:
        file.write("# one line more\n")
    assert version() != own_versions()["sfumato"]
