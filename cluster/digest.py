"""Which digest a version of a run has, by its ledger."""

from __future__ import annotations

from pathlib import Path

from cluster.run_dir import read_recipe
from cluster.verify import VersionsLine, digests_of, read_lines, refuse
from protocol.errors import RunDirError


def digest_of(run_dir: Path, version: int | None) -> tuple[int, str]:
    """Returns (version, digest) of a version, or of the newest. Raises RunDirError if the run has none such, and
    VerifyError naming the lines of its ledger that cannot be read."""
    read_recipe(run_dir)
    lines, unreadable = read_lines(run_dir / "ledger.jsonl", VersionsLine)
    refuse(f"the ledger of the run {run_dir} cannot be read", unreadable)
    digests = digests_of(lines)
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
