"""Asking reward actors for scores: images go through Ray's object store once, rewards score concurrently."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from protocol.errors import RewardError, SfumatoError
from protocol.roles import Reward
from rewards.composition import named_scores

RESTART_POLL_S = 0.5


@dataclass(frozen=True)
class RewardPool:
    """One reward's settings and the handles of its actors."""

    settings: Reward
    actors: tuple[Any, ...]


class Scorer:
    """Hands out `score(images, prompt, ticket_id)`; results come in as a PendingGroupScores."""

    def __init__(self, pools: Sequence[RewardPool]) -> None:
        self._pools = pools

    def __call__(self, images: np.ndarray, prompt: str, ticket_id: str) -> PendingGroupScores:
        """Sends uint8 images (G, H, W, 3) of one prompt to one actor of every pool."""
        return PendingGroupScores(self._pools, ray.put(images), prompt, ticket_id)


class PendingGroupScores:
    """The scores of one group, on their way from every pool."""

    def __init__(self, pools: Sequence[RewardPool], images: Any, prompt: str, ticket_id: str) -> None:
        self._pools, self._images, self._prompt, self._ticket_id = pools, images, prompt, ticket_id
        self._refs = [self._ask(pool, attempt=0) for pool in pools]

    def ready(self) -> bool:
        """True once every pool has answered, with scores or with an error."""
        done, _ = ray.wait(self._refs, num_returns=len(self._refs), timeout=0)
        return len(done) == len(self._refs)

    def result(self) -> Mapping[str, np.ndarray]:
        """Waits; a lost actor, a time-out or an error is tried again up to the reward's max_attempts."""
        parts = {pool.settings.label: self._wait(pool, ref) for pool, ref in zip(self._pools, self._refs, strict=True)}
        weights = {pool.settings.label: pool.settings.weight for pool in self._pools}
        return named_scores(parts, weights)

    def _ask(self, pool: RewardPool, attempt: int) -> Any:
        # By ticket, so that a pool's load is even whatever the order; a retry asks the next actor.
        number = (zlib.crc32(self._ticket_id.encode()) + attempt) % len(pool.actors)
        return pool.actors[number].score.remote(self._images, self._prompt)

    def _wait(self, pool: RewardPool, ref: Any) -> np.ndarray:
        settings = pool.settings
        for attempt in range(1, settings.max_attempts + 1):
            try:
                score_G: np.ndarray = ray.get(ref, timeout=settings.timeout_s)
                return score_G
            except (GetTimeoutError, RayTaskError) as error:
                last: Exception = error
            except RayActorError as error:
                last = error
                _wait_until_any_answers(pool)
            ref = self._ask(pool, attempt)
        raise _explain(settings, self._prompt, last)


def _wait_until_any_answers(pool: RewardPool) -> None:
    """Gives Ray the time to restart a lost actor, so that asking again is not asking the dead."""
    deadline = time.monotonic() + pool.settings.timeout_s
    while time.monotonic() < deadline:
        answered, _ = ray.wait([actor.ping.remote() for actor in pool.actors], timeout=RESTART_POLL_S)
        for ping in answered:
            with suppress(RayError):
                ray.get(ping)
                return
        time.sleep(RESTART_POLL_S)


def _explain(settings: Reward, prompt: str, error: Exception) -> SfumatoError:
    cause = getattr(error, "cause", None)
    if isinstance(cause, SfumatoError):
        return cause
    if isinstance(error, GetTimeoutError):
        reason = f"gave no scores within {settings.timeout_s:g} s"
    elif isinstance(error, RayActorError):
        reason = "its actor died"
    else:
        reason = f"raised {type(cause).__name__}: {cause}"
    return RewardError(
        f"reward {settings.name}: {reason}, {settings.max_attempts} times, on the prompt {prompt!r}",
        do="run the reward by itself on an image of this prompt; raise timeout_s if it is only slow",
    )
