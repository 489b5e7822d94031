"""Asking reward actors for scores: images go through Ray's object store once, rewards score concurrently.

    asked --> scores                              --> (score log) --> done
      ^   --> error, or time-out                  --+
      |   --> its actor died --> one answers again --+--> asked again, up to max_attempts --> failed
      +----------------------------------------------+

A required reward that failed is an error; an optional one gives no scores, and the learner leaves it out of the round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cluster.score_log import Entry, ScoreLog, score_key
from protocol.errors import RewardError, SfumatoError
from protocol.roles import Reward

POLL_S = 0.02
PING_EVERY_S = 0.5
RESTART_TIMEOUT_S = 600.0
"""How long a lost actor may take to come back: it loads its model again."""


class MakingWayError(Exception):
    """A process hangs in somebody else's question and is about to be replaced."""


class OutOfTimeError(Exception):
    """A reward has scored for longer than it may; the process that hangs in it makes way for a new one."""


@dataclass(frozen=True)
class RewardPool:
    """One reward's settings and the handles of its actors."""

    settings: Reward
    actors: tuple[Any, ...]
    held_out: bool = False


@dataclass(frozen=True)
class Answer:
    """What a reward actor returns: fp32 scores, and whether they may be asked for again."""

    scores: list[float]
    is_pure: bool


@dataclass(frozen=True)
class Question:
    """What is to be scored. `reference` is where Ray keeps the images."""

    images: np.ndarray
    reference: Any
    prompt: str
    ticket_id: str
    num_states: int
    turn: int

    @cached_property
    def key(self) -> str:
        """Its name in score logs."""
        return score_key(self.ticket_id, self.images, self.prompt)


class Scorer:
    """Hands out `score(images, prompt, ticket_id)`; results come in as a PendingGroupScores."""

    def __init__(self, pools: Sequence[RewardPool], run_dir: Path) -> None:
        self._run_dir = run_dir
        self._pools: dict[str, RewardPool] = {}
        self.use(pools)
        # Scorers do not begin with the same actor, all of them.
        self._turns = count(os.getpid())

    def use(self, pools: Sequence[RewardPool]) -> None:
        """From now on asks these actors, also whenever something that is on its way has to be asked again."""
        self._pools.update({pool.settings.label: pool for pool in pools})

    @property
    def num_replicas(self) -> int:
        """How many actors the largest pool has."""
        return max((len(pool.actors) for pool in self._pools.values()), default=1)

    def __call__(
        self, images: np.ndarray, prompt: str, ticket_id: str, num_states: int = 1, is_check: bool = False
    ) -> PendingGroupScores:
        """Sends uint8 images (G M, H, W, 3) of one prompt to one actor of every pool; the held-out ones see checks."""
        question = Question(images, ray.put(images), prompt, ticket_id, num_states, next(self._turns))
        labels = [label for label, pool in self._pools.items() if is_check or not pool.held_out]
        return PendingGroupScores(
            [PendingPart(self._pools, label, question, ScoreLog(self._run_dir, label)) for label in labels]
        )


class PendingGroupScores:
    """The scores of one group, on their way from every pool."""

    def __init__(self, parts: Sequence[PendingPart]) -> None:
        self._parts = parts

    def ready(self) -> bool:
        """True once every reward has scored or failed. Asks again where that is due; never waits."""
        answered = [part.ready() for part in self._parts]
        return all(answered)

    def result(self) -> Mapping[str, np.ndarray]:
        """Waits; returns label -> fp32 scores of all rewards that did not fail. Raises a required one's error."""
        while not self.ready():
            time.sleep(POLL_S)
        entries = {part.label: part.result() for part in self._parts}
        return {label: entry.scores for label, entry in entries.items() if entry.scores is not None}


class PendingPart:
    """One reward's scores of one group."""

    def __init__(self, pools: Mapping[str, RewardPool], label: str, question: Question, log: ScoreLog) -> None:
        """`pools` are those of now: actors come and go."""
        self._pools, self._settings, self._question, self._log = pools, pools[label].settings, question, log
        self._attempt, self._lost_at, self._pinged_at = 0, 0.0, 0.0
        self._ref: Any = None
        self._actor: Any = None
        self._pings: list[Any] = []
        self._error: SfumatoError | None = None
        self._entry = log.read(question.key) if log.exists() or not self._settings.required else None
        if self._entry is None:
            self._ask()

    @property
    def label(self) -> str:
        """The reward's name."""
        return self._settings.label

    @property
    def _pool(self) -> RewardPool:
        return self._pools[self.label]

    def ready(self) -> bool:
        """Takes what has come; True once that is the end of it."""
        if self._entry is None and self._pings:
            self._ask_once_one_answers()
        elif self._entry is None and ray.wait([self._ref], timeout=0)[0]:
            self._take()
        return self._entry is not None

    def result(self) -> Entry:
        """Returns what came. Raises RewardError if a required reward failed."""
        assert self._entry is not None
        if self._entry.scores is None and self._error and self._settings.required:
            raise self._error
        return self._entry

    def _ask(self) -> None:
        # In turn, so that a pool's load is even; a retry asks the next actor.
        question, actors = self._question, self._pool.actors
        self._actor = actors[(question.turn + self._attempt) % len(actors)]
        self._ref = self._actor.score.remote(question.reference, question.prompt, question.num_states)
        self._pings = []

    def _take(self) -> None:
        try:
            answer: Answer = ray.get(self._ref)
        except (RayError, SfumatoError) as error:
            self._fail(error)
            return
        entry = Entry(np.array(answer.scores, np.float32))
        must_stay = not (answer.is_pure and self._settings.required)
        self._entry = self._log.write(self._question.key, entry) if must_stay else entry

    def _fail(self, error: Exception) -> None:
        if isinstance(error, RayActorError) and self._actor not in self._pool.actors:
            self._ask()  # It was dismissed meanwhile, which is nobody's fault.
            return
        was_asked = not isinstance(_cause(error), MakingWayError)
        self._attempt += was_asked
        self._error = explain(self._settings, self._question.prompt, error)
        if self._attempt < self._settings.max_attempts:
            if isinstance(error, RayActorError) or isinstance(_cause(error), OutOfTimeError | MakingWayError):
                self._lost_at = time.monotonic()
                self._ping()
            else:
                self._ask()
            return
        self._entry = Entry(None, str(self._error))
        if not self._settings.required:
            self._entry = self._log.write(self._question.key, self._entry)

    def _ping(self) -> None:
        self._pinged_at = time.monotonic()
        self._pings = [actor.ping.remote() for actor in self._pool.actors]

    def _ask_once_one_answers(self) -> None:
        """Gives Ray the time to restart a lost actor, so that asking again is not asking the dead."""
        now = time.monotonic()
        answered, _ = ray.wait(self._pings, num_returns=len(self._pings), timeout=0)
        if any(_is_well(ping) for ping in answered) or now - self._lost_at > RESTART_TIMEOUT_S:
            self._ask()
        elif len(answered) == len(self._pings) and now - self._pinged_at > PING_EVERY_S:
            self._ping()


def _is_well(ping: Any) -> bool:
    try:
        ray.get(ping)
    except RayError:
        return False
    return True


def _cause(error: Exception) -> Exception:
    return error.cause if isinstance(error, RayTaskError) else error


def explain(settings: Reward, prompt: str, error: Exception) -> SfumatoError:
    """Returns what a failed call of a reward actor means to a person."""
    cause = _cause(error)
    if isinstance(cause, RewardError):
        return cause
    if isinstance(cause, OutOfTimeError):
        reason = f"gave no scores within {settings.timeout_s:g} s"
    elif isinstance(error, RayActorError):
        reason = "its actor died"
    else:
        reason = f"raised {type(cause).__name__}: {cause}"
    return RewardError(
        f"reward {settings.name}: {reason}, {settings.max_attempts} times, on the prompt {prompt!r}",
        do="try it by itself with `sfumato rewards check`, with this prompt; raise timeout_s if it is only slow",
    )
