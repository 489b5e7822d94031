"""`ray job submit` to a real head: our own repository and a user's project run there, are followed, and stop with what
they have learnt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.redis_server import free_port
from learner.checkpoint import latest_checkpoint
from protocol.paths import ROOT
from tests.end_to_end.conftest import RECIPE
from tests.end_to_end.runs import Run, environment, rows

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).with_name("ray"))
HOST = "127.0.0.1"
TIMEOUT_S, STOP_WAIT_S = 600.0, 120
REWARDS = """
def brightness(images, prompts):
    return [float(image.mean()) for image in images]
"""


@dataclass(frozen=True)
class Head:
    """A head with a dashboard, as `ray up` leaves one: where it listens, and where jobs keep their runs."""

    address: str
    runs: Path

    def job(self, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Runs `ray job ARGUMENTS` and returns what it says, standard error included."""
        command, *rest = arguments
        return subprocess.run(
            [RAY, "job", command, "--address", self.address, *rest],
            cwd=cwd,
            env=environment({}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def run(self, recipe: str) -> Run:
        """The one run of a recipe, in the folder that the environment names."""
        (folder,) = self.runs.glob(f"{recipe}-*")
        return Run(folder)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Ray as a cluster file starts it. Its folder is short, since Unix sockets' paths are."""
    folder, runs = Path(tempfile.mkdtemp(prefix="ray-")), tmp_path_factory.mktemp("runs")
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    ports = {name: free_port(HOST) for name in names}
    options = [f"--{name}={port}" for name, port in ports.items()]
    command = [RAY, "start", "--head", f"--node-ip-address={HOST}", f"--temp-dir={folder}", "--num-cpus=8"]
    # Of an installed sfumato this is where it is.
    env = {"SFUMATO_RUNS": str(runs), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), "PYTHONPATH": str(ROOT)}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    # A file, since what it starts would hold a pipe open.
    with (folder / "head.log").open("w") as log:
        started = subprocess.run(
            [*command, *options],
            cwd=folder,
            env=environment(env),
            stdout=log,
            stderr=log,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert started.returncode == 0, (folder / "head.log").read_text()
    yield Head(f"http://{HOST}:{ports['dashboard-port']}", runs)
    # `ray stop` would end every Ray of this machine.
    for process in of_session(folder):
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def of_session(folder: Path) -> list[psutil.Process]:
    """What runs of the Ray whose files are in a folder, and below it."""
    named = [process for process in psutil.process_iter(["cmdline"]) if str(folder) in str(process.info["cmdline"])]
    return list({*named, *(below for process in named for below in process.children(recursive=True))})


@pytest.fixture
def project(workshop: Path, tmp_path: Path) -> Path:
    """A user's project: a recipe, a model, prompts, and a rewards.py that shares our package's name."""
    shutil.copytree(workshop / "model", tmp_path / "model")
    for name in ("prompts.txt", "held_out.txt"):
        shutil.copy(workshop / name, tmp_path / name)
    recipe = {**RECIPE, "rounds": 2, "rewards": [{"name": "./rewards.py:brightness"}]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


def test_this_repository_runs_as_a_job_and_its_log_is_followed(head: Head) -> None:
    smaller = ["rounds=1", "rollouts=1", "batch.num_groups=2", "batch.group_size=2", "learner.world_size=1"]
    command = ["sfumato", "train", "recipes/tiny_prdp.yaml", *smaller]
    submitted = head.job("submit", "--submission-id", "ours", "--working-dir", ".", "--", *command)
    assert submitted.returncode == 0, submitted.stdout
    assert "run directory: " in submitted.stdout
    assert "Job 'ours' succeeded" in head.job("status", "ours").stdout
    assert "done: " in head.job("logs", "ours").stdout
    run = head.run("tiny_prdp")
    assert len(run.metrics) == 1
    assert latest_checkpoint(run.folder) is not None


def test_a_users_project_with_a_rewards_module_of_its_own_runs_as_a_job(head: Head, project: Path) -> None:
    command = ["sfumato", "train", "mine.yaml"]
    submitted = head.job("submit", "--submission-id", "theirs", "--working-dir", ".", "--", *command, cwd=project)
    assert submitted.returncode == 0, submitted.stdout
    assert "Job 'theirs' succeeded" in head.job("status", "theirs").stdout
    assert [row["reward/brightness"] > 0 for row in head.run("mine").metrics] == [True, True]


def test_a_job_that_would_keep_its_run_in_rays_session_is_refused(head: Head, project: Path) -> None:
    command = ["sfumato", "train", "mine.yaml", "--run-dir", "runs/a"]
    submitted = head.job("submit", "--submission-id", "lost", "--working-dir", ".", "--", *command, cwd=project)
    assert submitted.returncode != 0
    assert "the run directory is inside Ray's session folder" in submitted.stdout
    assert "set SFUMATO_RUNS" in submitted.stdout
    assert "Job 'lost' failed" in head.job("status", "lost").stdout


def test_a_job_that_is_stopped_leaves_a_checkpoint_of_all_that_was_learnt(head: Head, project: Path) -> None:
    folder = head.runs / "stopped"
    command = [
        "sfumato",
        "train",
        "mine.yaml",
        "rounds=1000",
        "checkpoints.every_rounds=1000",
        "--run-dir",
        str(folder),
    ]
    options = ["--no-wait", "--submission-id", "long", "--working-dir", "."]
    assert head.job("submit", *options, "--", *command, cwd=project).returncode == 0
    deadline = time.monotonic() + TIMEOUT_S
    while len(rows(folder / "metrics.jsonl")) < 2:
        assert time.monotonic() < deadline, head.job("logs", "long").stdout
        time.sleep(0.2)
    before = latest_checkpoint(folder)
    assert before is None or before.meta.round == 0
    head.job("stop", "long")
    while "Job 'long' was stopped" not in (status := head.job("status", "long").stdout):
        assert time.monotonic() < deadline, status
    found = latest_checkpoint(folder)
    assert found is not None
    assert found.meta.round == len(rows(folder / "metrics.jsonl")) >= 2
    assert "go on with --resume" in head.job("logs", "long").stdout
