"""A bound command ends with whoever started it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.bound import bound
from protocol.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parents")

SLEEP = Path(shutil.which("sleep") or "/bin/sleep")
START_AND_WAIT = f"""
import subprocess
from cluster.bound import bound
process = subprocess.Popen(bound(["{SLEEP}", "60"]))
print(process.pid, flush=True)
process.wait()
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    """A process that waits for a bound command of a minute, whose number it has said."""
    with subprocess.Popen([sys.executable, "-c", START_AND_WAIT], stdout=subprocess.PIPE, cwd=ROOT, text=True) as it:
        yield it
        it.kill()


def test_a_command_is_killed_with_its_parent(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert alive == []


def wait_until_it_sleeps(process: subprocess.Popen[bytes]) -> None:
    """Waits until the command has taken the place of what binds it."""
    deadline = time.monotonic() + 20
    while psutil.Process(process.pid).cmdline()[:1] != [str(SLEEP)]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_command_is_killed_with_the_thread_that_started_it() -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        started.append(subprocess.Popen(bound([SLEEP, "60"])))
        wait_until_it_sleeps(started[0])

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert started[0].wait(10) == -signal.SIGKILL


def test_a_command_gets_its_arguments_and_gives_its_exit_code() -> None:
    shell = Path(shutil.which("sh") or "/bin/sh")
    done = subprocess.run(
        bound([shell, "-c", "echo $0 $1; exit 3", "a b", "c"]), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "a b c\n")


@pytest.mark.parametrize("is_blocked", [True, False])
def test_sigterm_is_blocked_where_that_is_asked_for(is_blocked: bool) -> None:
    with subprocess.Popen(bound([SLEEP, "60"], is_sigterm_blocked=is_blocked)) as process:
        wait_until_it_sleeps(process)
        os.kill(process.pid, signal.SIGTERM)
        try:
            assert process.wait(0.5) == -signal.SIGTERM
            assert not is_blocked
        except subprocess.TimeoutExpired:
            assert is_blocked
        finally:
            process.kill()
