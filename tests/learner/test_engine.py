"""The ZeRO matrix on real DeepSpeed: every stage, precision and form, on one rank and on two, is torch's AdamW.

`gap` is the distance of two end points after 4 steps, as a share of the way from the start.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.redis_server import free_port
from protocol.paths import ROOT
from tests.learner.engine_cells import Cell, cells

FP32_GAP = 2e-5
"""Sums over ranks and partitions in another order."""
BF16_GAP = 0.08
"""One more rounding of every gradient to bf16; in the first steps AdamW, dividing by its size, makes it larger."""
BF16_NORM_GAP = 0.02

MATRIX = pytest.mark.parametrize("cell", cells(), ids=lambda cell: cell.name)
RANKS = pytest.mark.parametrize("world_size", [1, 2])
Results = dict[int, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each gang wrote: one rank first, since the two ranks also take up its files."""
    folder = tmp_path_factory.mktemp("cells")
    return {world_size: run_gang(world_size, tiny_model, folder) for world_size in (1, 2)}


def run_gang(world_size: int, model: str, folder: Path) -> dict[str, dict[str, Any]]:
    port = str(free_port("127.0.0.1"))
    logs = [folder / f"{world_size}-{rank}.log" for rank in range(world_size)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", "tests.learner.engine_cells", str(rank), str(world_size), port, model]
        with log.open("w") as output:
            ranks.append(subprocess.Popen([*command, str(folder)], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
    for process, log in zip(ranks, logs, strict=True):
        assert process.wait(timeout=900) == 0, log.read_text()[-3000:]
    found: dict[str, dict[str, Any]] = json.loads((folder / f"{world_size}.json").read_text())
    return found


@RANKS
@MATRIX
def test_every_cell_ends_where_adamw_ends(results: Results, cell: Cell, world_size: int) -> None:
    found = results[world_size][cell.name]
    assert found["moved"]
    assert found["gap_to_adamw"] < (BF16_GAP if cell.precision == "bf16" else FP32_GAP)
    assert found["norm_gap"] < (BF16_NORM_GAP if cell.precision == "bf16" else 1e-5)


@RANKS
@MATRIX
def test_every_cell_repeats_and_resumes_bit_for_bit(results: Results, cell: Cell, world_size: int) -> None:
    found = results[world_size][cell.name]
    assert found["repeats"]
    assert found["resumes"]


@RANKS
@MATRIX
def test_consolidated_state_carries_masters_moments_and_weights(results: Results, cell: Cell, world_size: int) -> None:
    found = results[world_size][cell.name]
    assert found["consolidated_carries_the_weights"]
    assert found["consolidated_gap"] < FP32_GAP


@pytest.mark.parametrize("cell", [cell for cell in cells() if not cell.offload], ids=lambda cell: cell.name)
def test_two_ranks_go_on_from_one_rank_of_another_stage(results: Results, cell: Cell) -> None:
    gap = results[2][cell.name][f"gap_from_{cell.with_other_stage().name}-1"]
    assert gap < (BF16_GAP if cell.precision == "bf16" else FP32_GAP)
