"""Which digest a version of a run has, by its ledger."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.run_dir import read_recipe
from protocol.errors import RunDirError


def digest_of(run_dir: Path, version: int | None) -> tuple[int, str]:
    """Returns (version, digest) of a version, or of the newest. Raises RunDirError if the run has none such."""
    read_recipe(run_dir)
    digests = _digests(run_dir / "ledger.jsonl")
    if not digests:
        raise RunDirError(f"the run {run_dir} has not published a version yet", do="wait for its first round")
    wanted = max(digests) if version is None else version
    if wanted not in digests:
        raise RunDirError(
            f"the run {run_dir} has no such version",
            value=wanted,
            expected=f"a number from {min(digests)} to {max(digests)}",
        )
    return wanted, digests[wanted]


def _digests(ledger: Path) -> dict[int, str]:
    digests: dict[int, str] = {}
    for line in ledger.read_text().splitlines(keepends=True) if ledger.exists() else []:
        if not line.endswith("\n"):
            break  # A run in progress is just writing it, or a crash cut it short.
        row = json.loads(line)
        digests[row["version"]] = row["digest"]
        digests[row["published_version"]] = row["published_digest"]
    return digests
