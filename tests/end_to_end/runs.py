"""Running the command line as people do, in a process of its own, and reading what it leaves."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import torch

from cluster.cli import run_command_line
from diffusion.weights import unpack
from learner.checkpoint import latest_checkpoint

COMMAND = str(Path(sys.executable).with_name("sfumato"))
TIMEOUT_S = 300.0


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours, without what would make a run join somebody's cluster or find somebody's modules."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    return {**inherited, **extra}


def sfumato(
    *arguments: str | Path,
    cwd: Path,
    env: Mapping[str, str] = {},
    timeout_s: float = TIMEOUT_S,
    prefix: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Runs `[PREFIX] sfumato ARGUMENTS` and returns its exit code and output, whatever they are."""
    # Files, since Ray's agents would hold pipes open for a while after a time-out.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [*prefix, COMMAND, *map(str, arguments)],
            cwd=cwd,
            env=environment(env),
            stdout=output,
            stderr=errors,
            timeout=timeout_s,
            check=False,
        )
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(done.args, done.returncode, output.read(), errors.read())


def sfumato_here(*arguments: str | Path, cwd: Path, env: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    """Runs `sfumato ARGUMENTS` in this process, where libraries are loaded: for what starts no process of its own."""
    words = [*map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        for name, value in env.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = run_command_line(words)
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())


@dataclass(frozen=True)
class Run:
    """A finished run: its directory and what it printed."""

    folder: Path
    output: str = ""

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return rows(self.folder / "metrics.jsonl")

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """The rows of ledger.jsonl."""
        return rows(self.folder / "ledger.jsonl")

    @property
    def digests(self) -> dict[int, str]:
        """The digest of every version."""
        ledger = self.ledger
        return {0: ledger[0]["digest"], **{row["published_version"]: row["published_digest"] for row in ledger}}

    @property
    def digest(self) -> str:
        """The digest of the newest version."""
        return str(self.ledger[-1]["published_digest"])

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights of the newest checkpoint."""
        found = latest_checkpoint(self.folder)
        assert found is not None
        return unpack(found.version_bytes(found.meta.round))


def rows(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a file that may be growing."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def finished(process: subprocess.CompletedProcess[str], folder: Path) -> Run:
    """Returns the run that a process has made, or fails with all that it said."""
    assert process.returncode == 0, f"exit code {process.returncode}\n{process.stdout}\n{process.stderr}"
    return Run(folder, process.stdout)


class Driver:
    """A driver that runs beside the test, so that the test can kill what it started."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str | Path],
        *,
        cwd: Path,
        env: Mapping[str, str] = {},
        prefix: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self._log = cwd / f"{folder.name}.log"
        command = [*prefix, COMMAND, "train", *map(str, arguments), "--run-dir", str(folder)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=cwd, env=environment(env), stdout=log, stderr=subprocess.STDOUT, text=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
        """Waits until a condition holds while the driver lives."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None, f"the driver ended first:\n{self.output()}"
            assert time.monotonic() < deadline, f"nothing happened:\n{self.output()}"
            time.sleep(0.02)

    def rounds_done(self) -> int:
        """Returns how many rounds the journal has."""
        return len(rows(self.folder / "metrics.jsonl"))

    def attempt(self) -> int:
        """Returns the number of the attempt that is on, from 0."""
        return int(json.loads((self.folder / "run.json").read_text())["attempt"])

    def kill_one(self, title: str) -> None:
        """Kills a process below the driver whose title or command says so."""
        self._find(title).kill()

    def stop_one(self, title: str) -> None:
        """Stops a process below the driver, which then lives and does nothing."""
        self._find(title).suspend()

    def _find(self, title: str) -> psutil.Process:
        below = {process: _title(process) for process in self._below()}
        found = [process for process, its_title in below.items() if title in its_title]
        assert found, f"no {title} among {list(below.values())}"
        return found[-1]

    def kill(self) -> list[psutil.Process]:
        """Kills the driver alone, at once. Returns what was below it and computed or served.

        Ray's own agents are left out: they look for their parent once a minute or so.
        """
        below = [process for process in self._below() if "Agent" not in _title(process)]
        self._process.kill()
        self._process.wait()
        return below

    def finish(self) -> Run:
        """Waits for the end."""
        code = self._process.wait(TIMEOUT_S)
        assert code == 0, f"exit code {code}\n{self.output()}"
        return Run(self.folder, self.output())

    def wait_for_failure(self, code: int = 2) -> None:
        """Waits until the driver has ended by itself, with an error of ours or another exit code."""
        assert self._process.wait(TIMEOUT_S) == code, self.output()

    def ask_to_end(self, number: int) -> None:
        """Sends the driver a signal."""
        self._process.send_signal(number)

    def output(self) -> str:
        """Returns all that it has said."""
        return self._log.read_text()

    def _below(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
