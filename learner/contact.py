"""A rank's contact with the driver: what it says of itself, and the driver's wish that it stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from protocol.errors import RedisError
from protocol.stream import Streams

REPORT_EVERY_S = 1.0
CHECK_STOP_EVERY_S = 1.0


class StopAsked(Exception):  # noqa: N818  # Not an error: the driver has asked for it.
    """The run is to end at the next place where nothing is lost."""


class Contact:
    """Talks through Redis; while that is away, nobody hears and nobody is heard."""

    def __init__(self, streams: Streams, role: str) -> None:
        self._streams, self._role = streams, role
        self._checked_stop_at = self._reported_at = 0.0
        self._waiting_s, self._started_at = 0.0, time.monotonic()
        self.wait_s = 0.0
        """How long the last wait was."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is within is not learning."""
        started = time.monotonic()
        yield
        self.wait_s = time.monotonic() - started
        self._waiting_s += self.wait_s

    def report(self, state: str, round_: int, *, at_once: bool = False) -> None:
        """Says that the rank lives: `at_once`, or no more often than is of use."""
        now = time.monotonic()
        if not at_once and now - self._reported_at < REPORT_EVERY_S:
            return
        self._reported_at, alive_s = now, now - self._started_at
        busy_s = alive_s - self._waiting_s
        with suppress(RedisError):
            self._streams.report_progress(self._role, round=round_, state=state, busy_s=busy_s, alive_s=alive_s)

    def check_stop(self) -> None:
        """Raises StopAsked where the driver has asked for it."""
        now = time.monotonic()
        if now - self._checked_stop_at > CHECK_STOP_EVERY_S:
            self._checked_stop_at = now
            with suppress(RedisError):
                if self._streams.is_stop_asked():
                    raise StopAsked

    def ask_to_stop(self) -> None:
        """Asks every rank to stop."""
        with suppress(RedisError):
            self._streams.ask_to_stop()
