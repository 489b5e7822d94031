"""A finding: what `sfumato doctor` says of one thing that it looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One row of a diagnosis.

    A worked example: Finding("batch size", "warning", "log-probabilities move by 3e-5 ...", do="raise ...",
    number=3e-5, limit=1e-5). `number` was measured and `limit` is what it was held against; both None where nothing
    is measured.
    """

    name: str
    verdict: Verdict
    found: str
    do: str = ""
    number: float | None = None
    limit: float | None = None


def guarded(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yields a check's findings. A check that raises is itself a finding, and the others are still made."""
    try:
        yield from check()
    except Exception as error:  # a broken machine may raise anything
        first_line = (str(error).strip() or "no message").splitlines()[0]
        yield Finding(name, "error", f"{type(error).__name__}: {first_line}", do="mend this first: it stops the check")
