"""However a run ends, none of its processes lives on: not a role, not Ray, not Redis, not what they started."""

from __future__ import annotations

import signal
import time
import uuid
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.runs import Driver

pytestmark = pytest.mark.slow

MARK = "SFUMATO_TEST_MARK"
ENDED_WITHIN_S = 20.0
KILLED_WITHIN_S = 120.0
"""Ray's agents look for their parent once a minute or so."""

LONG = ("recipe.yaml", "rounds=1000", "checkpoints.every_rounds=1000")
FAILS_LATER = """
import itertools

CALLS = itertools.count()


def fails(images, prompts):
    if next(CALLS) > 8:
        raise RuntimeError("no more scores")
    return [0.0 for _ in images]
"""


def marked(mark: str) -> list[str]:
    """Returns the command of every process that has a mark in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:200] or process.name())
        except psutil.Error:
            continue
    return found


def left_after(mark: str, timeout_s: float) -> list[str]:
    """Returns what lives on when all were given some time to end."""
    deadline = time.monotonic() + timeout_s
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def interrupt(driver: Driver) -> None:
    """Presses Ctrl-C."""
    driver.wait_for(lambda: driver.rounds_done() >= 1)
    driver.ask_to_end(signal.SIGINT)
    driver.wait_for_failure(130)


def terminate(driver: Driver) -> None:
    """Asks as a cluster does."""
    driver.wait_for(lambda: driver.rounds_done() >= 1)
    driver.ask_to_end(signal.SIGTERM)
    driver.wait_for_failure(143)


def kill(driver: Driver) -> None:
    """Ends the driver at once."""
    driver.wait_for(lambda: driver.rounds_done() >= 1)
    driver.kill()


def kill_while_starting(driver: Driver) -> None:
    """Ends the driver at once while its actors start."""
    driver.wait_for(lambda: "starting actors" in driver.output())
    driver.kill()


def finish(driver: Driver) -> None:
    """Lets it be."""
    driver.finish()


def fail(driver: Driver) -> None:
    """Waits until it has ended with an error of ours."""
    driver.wait_for_failure()


def lose_the_learner(driver: Driver) -> None:
    """Kills a learner that is not to be started again."""
    driver.wait_for(lambda: driver.rounds_done() >= 1)
    driver.kill_one("ray::LearnerProcess")
    driver.wait_for_failure()


WAYS = {
    "success": (finish, ("recipe.yaml", "rounds=1")),
    "refused": (fail, (*LONG, "rollout_worker.resources={spot: 1}")),
    "reward_fails": (fail, (*LONG, "rewards.0.name=./fails.py:fails")),
    "learner_lost": (lose_the_learner, (*LONG, "supervision.max_restarts=0")),
    "ctrl_c": (interrupt, LONG),
    "sigterm": (terminate, LONG),
    "sigkill": (kill, LONG),
    "sigkill_early": (kill_while_starting, LONG),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_process_of_a_run_outlives_it(workshop: Path, way: str) -> None:
    end, arguments = WAYS[way]
    (workshop / "fails.py").write_text(FAILS_LATER)
    mark = uuid.uuid4().hex
    with Driver(workshop / f"left-{way}", arguments, cwd=workshop, env={MARK: mark}) as driver:
        driver.wait_for(lambda: bool(marked(mark)))
        end(driver)
    left = left_after(mark, KILLED_WITHIN_S if end in (kill, kill_while_starting) else ENDED_WITHIN_S)
    assert left == [], f"{len(left)} processes live on"
