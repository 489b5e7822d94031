"""What a run has written verifies, and its groups come out again in a process that had no part in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.runs import Run, sfumato_here


@pytest.fixture(scope="session")
def run(train: Callable[..., Run]) -> Run:
    return train("lag=0")


def test_a_run_verifies_and_its_groups_come_out_again(run: Run, workshop: Path) -> None:
    done = sfumato_here("verify", run.folder, "--replay", "3", cwd=workshop)
    assert done.returncode == 0, done.stderr
    told = dict(line.strip().split("  ", 1) for line in done.stdout.splitlines())
    assert told["rounds"].strip().startswith("3 of 3")
    assert told["tickets"].strip().startswith("12,")
    # Version 0 is what recipe and seed make; of the others the checkpoints of rounds 2 and 3 hold one each.
    assert told["can be replayed"].strip().startswith("2 of 3 rounds")
    assert told["replayed"].strip() == "3 of 3 groups drawn, all bit-identical"


def test_a_flipped_digit_in_a_ledger_is_found_with_the_worker_that_is_blamed(
    run: Run, workshop: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(run.folder, tmp_path / "copy")
    rows = run.ledger
    checksum, worker = rows[2]["checksums"][1], rows[2]["workers"][1]
    rows[2]["checksums"][1] = checksum[:-1] + f"{int(checksum[-1], 16) ^ 1:x}"
    (copy / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = sfumato_here("verify", copy, "--replay", "100", cwd=workshop)
    assert done.returncode == 2
    name, _, host = worker.partition("@")
    assert f"ticket 000002-0001: checksum of the group that worker {name} on host {host} made" in done.stderr
    assert "violations: 1\n" in done.stderr
    assert f"Expected: {checksum}" in done.stderr
