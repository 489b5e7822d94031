"""Being asked to stop: SIGTERM is to a cluster what Ctrl-C is to a person. A run saves what it has learnt."""

from __future__ import annotations

import signal
import threading
from types import FrameType

TERMINATED = threading.Event()
"""Set once SIGTERM has come. What it raises does not always pass through Ray's waiting calls as what it was."""


def interrupt_on_sigterm() -> None:
    """Makes SIGTERM raise KeyboardInterrupt in the main thread, as Ctrl-C does; a second one ends what is being saved.
    Called again after Ray has started, which has a handler of its own."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    TERMINATED.set()
    raise KeyboardInterrupt
