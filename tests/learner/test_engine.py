"""The ZeRO matrix on real DeepSpeed: every stage, precision and form, on one rank and on two, is torch's AdamW.

`gap` is the distance of two end points after 4 steps, as a share of the way from the start.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from cluster.redis_server import free_port
from protocol.paths import ROOT
from tests.learner.engine_cells import FEW, Cell, cells

FP32_GAP = 2e-5
"""Sums over ranks and partitions in another order."""
BF16_GAP = 0.08
"""One more rounding of every gradient to bf16; in the first steps AdamW, dividing by its size, makes it larger."""
BF16_STAGE3_GAP = 0.2
"""Stage 3 computes linear layers by itself, so as not to keep whole weights, and rounds once more before their bias."""
BF16_NORM_GAP = 0.02
FP16_GAP = 0.01
"""Three more bits than bf16; gradients below its range, which the scale does not lift, are lost."""
FP16_STAGE3_GAP = 0.05
FP16_NORM_GAP = 0.003

CELLS = [pytest.param(cell, id=cell.name, marks=() if cell in FEW else pytest.mark.slow) for cell in cells()]
MATRIX = pytest.mark.parametrize("cell", CELLS)
RANKS = pytest.mark.parametrize("world_size", [1, 2])


def has_other_stage(cell: Cell) -> bool:
    """Whether the gang that trains a cell also trains the one whose file it takes up."""
    return not cell.offload and (cell in FEW) == (cell.with_other_stage() in FEW)


def allowed_gap(cell: Cell) -> float:
    """How far two end points of a cell may be apart."""
    if cell.precision == "fp32":
        return FP32_GAP
    if cell.precision == "fp16":
        return FP16_STAGE3_GAP if cell.stage == 3 else FP16_GAP
    return BF16_STAGE3_GAP if cell.stage == 3 else BF16_GAP


Found = Callable[[Cell, int], dict[str, Any]]


@pytest.fixture(scope="module")
def found(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each gang wrote of a cell: one rank first, since the two ranks also take up its files."""

    @cache
    def results(which: str) -> dict[int, dict[str, dict[str, Any]]]:
        folder = tmp_path_factory.mktemp(which)
        return {world_size: run_gang(world_size, tiny_model, folder, which) for world_size in (1, 2)}

    return lambda cell, world_size: results("few" if cell in FEW else "rest")[world_size][cell.name]


def run_gang(world_size: int, model: str, folder: Path, which: str) -> dict[str, dict[str, Any]]:
    port = str(free_port("127.0.0.1"))
    logs = [folder / f"{world_size}-{rank}.log" for rank in range(world_size)]
    ranks = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", "tests.learner.engine_cells", str(rank), str(world_size), port, model]
        with log.open("w") as output:
            arguments = [*command, str(folder), which]
            ranks.append(subprocess.Popen(arguments, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
    for process, log in zip(ranks, logs, strict=True):
        assert process.wait(timeout=900) == 0, log.read_text()[-3000:]
    results: dict[str, dict[str, Any]] = json.loads((folder / f"{world_size}.json").read_text())
    return results


@RANKS
@MATRIX
def test_every_cell_ends_where_adamw_ends(found: Found, cell: Cell, world_size: int) -> None:
    cell_found = found(cell, world_size)
    assert cell_found["moved"]
    assert cell_found["gap_to_adamw"] < allowed_gap(cell)
    assert cell_found["norm_gap"] < {"fp32": 1e-5, "bf16": BF16_NORM_GAP, "fp16": FP16_NORM_GAP}[cell.precision]


@RANKS
@MATRIX
def test_every_cell_repeats_and_resumes_bit_for_bit(found: Found, cell: Cell, world_size: int) -> None:
    assert found(cell, world_size)["repeats"]
    assert found(cell, world_size)["resumes"]


@RANKS
@MATRIX
def test_consolidated_state_carries_masters_moments_and_weights(found: Found, cell: Cell, world_size: int) -> None:
    assert found(cell, world_size)["consolidated_carries_the_weights"]
    assert found(cell, world_size)["consolidated_gap"] < FP32_GAP


@RANKS
@MATRIX
def test_the_average_is_that_of_the_masters_bit_for_bit(found: Found, cell: Cell, world_size: int) -> None:
    cell_found = found(cell, world_size)
    assert cell_found["average_starts_as_the_masters"]
    assert cell_found["average_is_its_formula"]
    assert cell_found["average_leaves_masters"]
    assert cell_found["average_resumes"]


@pytest.mark.parametrize("cell", [param for param in CELLS if has_other_stage(param.values[0])])
def test_two_ranks_go_on_from_one_rank_of_another_stage(found: Found, cell: Cell) -> None:
    origin = f"{cell.with_other_stage().name}-1"
    gap = found(cell, 2)[f"gap_from_{origin}"]
    assert found(cell, 2)[f"average_from_{origin}"], "the average has no bits that depend on a layout"
    assert gap < max(allowed_gap(cell), allowed_gap(cell.with_other_stage()))
