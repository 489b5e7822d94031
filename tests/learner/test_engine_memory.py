"""The estimate of weights, AdamW's state and gradients against what DeepSpeed really holds, in every cell of ZeRO."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.redis_server import free_port
from protocol.activations import MARGIN
from protocol.memory import optimizer_items, step_bytes
from protocol.paths import ROOT
from tests.learner.memory_cells import settings_of

LARGE = 10**6


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_deepspeed_holds_is_what_is_estimated(world_size: int, tmp_path: Path) -> None:
    file, port = tmp_path / "cells.json", str(free_port("127.0.0.1"))
    command = [sys.executable, "-m", "tests.learner.memory_cells"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world_size), port, str(file)], cwd=ROOT)
        for rank in range(world_size)
    ]
    assert [rank.wait(timeout=500) for rank in ranks] == [0] * world_size
    wrong = {}
    for name, (_, most) in json.loads(file.read_text()).items():
        precision, stage, offload = name.split("-")
        learner = settings_of(precision, int(stage), offload == "True", world_size)
        weights = 2 if precision == "bf16" else 4
        items = sum(item.size_bytes for item in optimizer_items(learner, LARGE))
        estimated = weights + (items + step_bytes(learner, LARGE)) / LARGE
        if estimated != pytest.approx(most, rel=MARGIN):
            wrong[name] = (estimated, most)
    assert not wrong
