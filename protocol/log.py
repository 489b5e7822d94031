"""Log lines: readable ones, or a JSON object a line where SFUMATO_LOG=json. Each knows its run and its role."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime

from protocol.errors import RecipeError

VARIABLE = "SFUMATO_LOG"
LOG = logging.getLogger("sfumato")
"""What roles log through: `LOG.warning("lost", extra={"role": "rollout/0", "ticket": "000003-0007"})`."""

FIELDS = ("run", "role", "ticket", "round")
"""What a line may say besides its time, level and message."""


def is_json() -> bool:
    """True if lines are to be JSON. Raises RecipeError if the environment asks for something else."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "json"):
        raise RecipeError(
            f"the environment variable {VARIABLE} is not a form of log lines",
            value=wanted,
            expected="json, or nothing for readable lines",
            do=f"set {VARIABLE}=json or unset it",
        )
    return wanted == "json"


def environment() -> dict[str, str]:
    """Returns what a process on another machine needs in its environment to log as this one does."""
    return {VARIABLE: "json"} if is_json() else {}


def set_up(run_id: str, role: str) -> None:
    """Sends this process's lines to its standard output, as of a run and a role unless a line says otherwise."""
    handler = _Stdout()
    handler.setFormatter(JsonLine() if is_json() else ReadableLine())
    handler.addFilter(_Origin(run_id, role))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False


class JsonLine(logging.Formatter):
    """`{"time": "2026-11-22T17:00:00.123+00:00", "level": "info", "run": ..., "role": ..., "message": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns a record as one line, with those of FIELDS that it has."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        has = {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        line = {"time": time, "level": record.levelname.lower(), **has, "message": record.getMessage()}
        return json.dumps(line, ensure_ascii=False)


class ReadableLine(logging.Formatter):
    """The message; a warning says first whom it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns `rollout/0, ticket 000003-0007: lost`, or a message as it is."""
        if record.levelno < logging.WARNING:
            return record.getMessage()
        ticket = getattr(record, "ticket", None)
        about = f", ticket {ticket}" if ticket else ""
        return f"{getattr(record, 'role', '')}{about}: {record.getMessage()}"


class _Stdout(logging.Handler):
    """Writes to what is standard output at that moment, which a live display or a test may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


class _Origin(logging.Filter):
    def __init__(self, run_id: str, role: str) -> None:
        super().__init__()
        self._run_id, self._role = run_id, role

    def filter(self, record: logging.LogRecord) -> bool:
        record.run = self._run_id
        record.role = getattr(record, "role", self._role)
        return True
