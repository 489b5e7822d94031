"""The run directory: who may write into it, and which run and attempt it holds.

recipe.yaml  run.json                   what the run is
prompts.txt  data-*.jsonl               what its tickets start from (cluster/sources.py)
held_out.txt  checks.txt                what is never trained on; what its firewall draws
metrics.jsonl  ledger.jsonl             a line a round
checkpoints/  samples/  export/         state, pictures, and weights for other tools
learners/<name>/                        the same of each follower
.lock                                   held while a driver lives
.rollouts                               how many rollout actors `sfumato scale` asked for
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

from protocol.errors import RecipeError, RunDirError
from protocol.recipe import Recipe
from protocol.recipe_file import dump_recipe, parse_recipe
from protocol.roles import LAYOUT
from protocol.stream import redacted_url

SCALE_FILE = ".rollouts"
RAY_SESSION = re.compile(r"/(ray/session_[^/]+|session_\d{4}(-\d\d){2}_\d\d(-\d\d){2}_\d+_\d+)(/|$)")
"""In Ray's usual folder, or in one that `ray start --temp-dir` names."""


def follower_dir(run_dir: Path, name: str) -> Path:
    """Returns where a follower's files are: a run directory as `sfumato evaluate`, `sample` and `digest` take it."""
    return run_dir / "learners" / name


def home_of(run_dir: Path) -> Path:
    """Returns the run that a follower's directory belongs to; of any other the directory itself."""
    home = run_dir.absolute().parent.parent
    follows = run_dir.absolute().parent.name == "learners" and (home / "run.json").is_file()
    return home if follows else run_dir


class RunDir:
    """A run directory that this process alone writes to, until `release`."""

    def __init__(self, path: Path, recipe: Recipe, *, resume: bool) -> None:
        """Makes a new run's directory, or takes up an old one's. Raises RunDirError and changes nothing then."""
        self.path = path.expanduser().absolute()
        _refuse_ray_session(self.path)
        self.notice: str | None = None
        if resume:
            _refuse_other_recipe(self.path, recipe)
            self.notice = _layout_change(read_recipe(self.path), recipe)
        else:
            _refuse_taken(self.path)
        _make(self.path)
        self._lock = _lock(self.path)
        if not resume:
            _clear_false_start(self.path)
        elif read_recipe(self.path).prompts.held_out != recipe.prompts.held_out:
            (self.path / "held_out.txt").unlink(missing_ok=True)  # It is of the set that was named before.
        before = _read_run(self.path) if resume else None
        self.run_id: str = before["run_id"] if before else uuid.uuid4().hex[:12]
        self.attempt: int = before["attempt"] if before else -1
        self.next_attempt()
        (self.path / SCALE_FILE).unlink(missing_ok=True)
        _write(self.path / "recipe.yaml", dump_recipe(_without_password(recipe)))
        for follower in recipe.followers:
            folder = follower_dir(self.path, follower.name)
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.path / "run.json", folder / "run.json")
            _write(folder / "recipe.yaml", dump_recipe(_without_password(recipe.of_follower(follower.name))))

    def wanted_rollouts(self) -> int | None:
        """Returns how many rollout actors `sfumato scale` has asked this driver for, if it has."""
        try:
            return int((self.path / SCALE_FILE).read_text())
        except FileNotFoundError:
            return None

    def next_attempt(self) -> int:
        """Counts a new attempt, whose Redis keys are its own. Returns its number."""
        self.attempt += 1
        run = {"run_id": self.run_id, "attempt": self.attempt, "started": time.time()}
        _write(self.path / "run.json", json.dumps(run, indent=1))
        return self.attempt

    def release(self) -> None:
        """Lets other drivers use the directory."""
        os.close(self._lock)


def read_recipe(run_dir: Path) -> Recipe:
    """Returns the resolved recipe of a run."""
    file = run_dir / "recipe.yaml"
    if not (run_dir / "run.json").is_file() or not file.is_file():
        raise RunDirError(
            "this is not a run directory", value=str(run_dir), expected="a folder that `sfumato train` has made"
        )
    return parse_recipe(yaml.safe_load(file.read_text()), source=str(file))


def scale(run_dir: Path, num_rollouts: int) -> None:
    """Asks the driver of a run for another number of rollout actors. Raises RecipeError or RunDirError."""
    read_recipe(run_dir)
    if num_rollouts < 1:
        raise RecipeError("a run needs rollout actors", value=num_rollouts, expected="1 or more")
    if not _is_driven(run_dir):
        raise RunDirError(
            "no driver is running this run, so there is nothing to scale",
            value=str(run_dir),
            do="resume it with rollouts=N",
        )
    _write(run_dir / SCALE_FILE, str(num_rollouts))


def _is_driven(run_dir: Path) -> bool:
    with (run_dir / ".lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _read_run(path: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads((path / "run.json").read_text())
    return run


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(
            f"the run directory cannot be made: {error.strerror}", value=str(path), do="give another --run-dir"
        ) from error


def _refuse_ray_session(path: Path) -> None:
    if RAY_SESSION.search(str(path.resolve())):
        raise RunDirError(
            "the run directory is inside Ray's session folder, which does not outlive the session",
            value=str(path),
            expected="an absolute path on storage that stays, and that all nodes see",
            do="give one with --run-dir, or set SFUMATO_RUNS to the folder of all runs",
        )


def _refuse_taken(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise RunDirError("the run directory is a file", value=str(path), do="give another --run-dir")
    if (path / "run.json").exists():
        if not (path / "ledger.jsonl").exists():
            return  # A run that failed before its first round: there is nothing to lose.
        raise RunDirError(
            "the run directory already holds a run",
            value=str(path),
            do="go on with it by --resume, or give another --run-dir",
        )
    if path.is_dir() and any(entry.name != ".lock" for entry in path.iterdir()):
        raise RunDirError(
            "the run directory is not empty and holds no run of ours",
            value=str(path),
            expected="a new or empty folder",
            do="give another --run-dir",
        )


def _clear_false_start(path: Path) -> None:
    """Deletes what a run left that failed before its first round."""
    names = ("run.json", "recipe.yaml", "prompts.txt", "held_out.txt", "checks.txt", "redis.log")
    for file in (*(path / name for name in names), *path.glob("data-*")):
        file.unlink(missing_ok=True)
    for name in ("samples", "learners", "scores"):
        shutil.rmtree(path / name, ignore_errors=True)


def _refuse_other_recipe(path: Path, recipe: Recipe) -> None:
    if not (path / "run.json").exists():
        raise RunDirError(
            "there is no run to resume", value=str(path), do="leave --resume away to start one, or correct --run-dir"
        )
    differing = sorted(_differences(read_recipe(path).identity(), recipe.identity()))
    if differing:
        raise RunDirError(
            f"the run in {path} was made with another recipe, which differs in {', '.join(differing)}",
            expected="the same recipe: a run is a function of it (rollouts, redis, placement and the learner's layout "
            "may change; rounds too, unless learning rates follow from them)",
            do="resume with the run's own recipe.yaml, or start a new run in another --run-dir",
        )


def _layout_change(old: Recipe, new: Recipe) -> str | None:
    """Returns what a person should know who resumes with another layout of the learner."""
    changed = [name for name in LAYOUT if getattr(old.learner, name) != getattr(new.learner, name)]
    told = ", ".join(f"{name} {getattr(old.learner, name)} -> {getattr(new.learner, name)}" for name in changed)
    return f"the learner's layout changes ({told}): from here on weights differ in the last bits" if changed else None


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            found
            for name in sorted({*old, *new})
            for found in _differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if old == new else [key]


def _lock(path: Path) -> int:
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunDirError(
            "the run directory is in use by another driver",
            value=str(path),
            do="wait for it, stop it, or give another --run-dir",
        ) from None
    return descriptor


def _without_password(recipe: Recipe) -> Recipe:
    """A run directory is shared and kept; a password does not belong there."""
    if recipe.redis.url is None:
        return recipe
    redis = recipe.redis.model_copy(update={"url": redacted_url(recipe.redis.url)})
    return recipe.model_copy(update={"redis": redis})


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
