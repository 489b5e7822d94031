"""Our packages win wherever we run, or we say so and stop."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from protocol.paths import ROOT
from sfumato import PACKAGES

SHOW = "import sfumato, sys; sfumato.claim_packages(); import {name}; print({name}.__file__, sys.path[0])"


def run_python(code: str, cwd: Path, path: str = ".") -> subprocess.CompletedProcess[str]:
    """Runs code in a process whose modules are looked up in the working directory first."""
    return subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=cwd,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("form", ["module", "package"])
def test_a_module_of_the_user_does_not_take_the_place_of_ours(tmp_path: Path, name: str, form: str) -> None:
    if form == "module":
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong module')\n")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    done = run_python(SHOW.format(name=name), tmp_path)
    assert done.stdout.split() == [str(ROOT / name / "__init__.py"), str(ROOT)], done.stderr


def test_a_module_that_is_already_there_in_place_of_ours_is_an_error_that_names_both(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import rewards, sfumato; sfumato.claim_packages()"
    done = run_python(code, tmp_path)
    assert done.returncode != 0
    assert f"sfumato needs its own package 'rewards' from {ROOT}" in done.stderr
    assert str(tmp_path / "rewards.py") in done.stderr
    assert "./file.py:Name" in done.stderr


def test_every_package_of_the_architecture_is_claimed() -> None:
    packages = {folder.parent.name for folder in ROOT.glob("*/__init__.py")}
    assert set(PACKAGES) == packages - {"assets", "bench", "recipes"}


def test_the_wheel_has_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = (file.parent.relative_to(ROOT) for name in (*PACKAGES, "assets") for file in (ROOT / name).rglob("*.py"))
    assert set(listed) == {".".join(folder.parts) for folder in folders} | {"recipes"}


def test_claiming_twice_leaves_one_entry(tmp_path: Path) -> None:
    code = "import sfumato, sys; [sfumato.claim_packages() for _ in range(3)]; print(sys.path.count(str(sfumato.ROOT)))"
    assert run_python(code, tmp_path).stdout.strip() == "1"


def test_the_module_is_the_command_too(tmp_path: Path) -> None:
    done = run_python(
        "import runpy, sys; sys.argv = ['s', '--version']; runpy.run_module('sfumato', run_name='__main__')", tmp_path
    )
    assert done.stdout.startswith("sfumato "), done.stderr


def test_bad_input_ends_the_command_with_a_code_and_without_a_traceback(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("sfumato")), "train", "nowhere.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the recipe nowhere.yaml does not exist")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
