"""Which Ray a command joins: the head that RAY_ADDRESS names, or one of its own."""

from __future__ import annotations

import os
import socket

from protocol.errors import TrainingError

ANSWER_TIMEOUT_S = 10.0


def head_address() -> str | None:
    """Returns what RAY_ADDRESS names, as in `ray job submit`; None where a Ray of our own is to be started."""
    address = os.environ.get("RAY_ADDRESS", "local")
    return None if address in ("", "local") else address


def check_head() -> None:
    """Raises TrainingError unless what RAY_ADDRESS names answers: Ray itself goes on trying for minutes."""
    address = head_address()
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in address:
        raise TrainingError(
            "RAY_ADDRESS names no Ray head",
            value=address,
            expected="host:port, such as 10.0.0.4:6379",
            do="correct it, or run on a node of the cluster: `ray job submit` sets it there",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise TrainingError(
            f"no Ray head answers at RAY_ADDRESS ({error})",
            value=address,
            do="start the cluster (`ray up`, `ray start --head`), or unset RAY_ADDRESS to run on this machine alone",
        ) from error
