"""One rank of a gang on CPUs that counts what DeepSpeed holds of a linear network, in bytes a trained parameter.

Run as `python -m tests.learner.memory_cells RANK WORLD_SIZE PORT FILE`. Rank 0 writes {"<precision>-<stage>-<offload>":
[between steps, at most]} to FILE, weights and gradients included, without the bucket of gradients, most of which is
never written to.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from learner.engine import Engine
from protocol.memory import BUCKET_ENTRIES
from protocol.roles import Learner

WIDTH, NUM_LAYERS = 320, 32
"""Layers that ZeRO-3 shards: below 100,000 parameters it keeps them whole."""


def settings_of(precision: str, stage: int, offload: bool, world_size: int) -> Learner:
    return Learner.model_validate(
        {"precision": precision, "zero_stage": stage, "offload_optimizer": offload, "world_size": world_size}
    )


def is_bucket(size_bytes: int) -> bool:
    return abs(size_bytes) >= 2 * BUCKET_ENTRIES


def held() -> dict[Tensor, int]:
    """Returns a tensor of every storage there is, with the storage's size."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter)]
    one_each = {each.untyped_storage().data_ptr(): each for each in tensors}
    sizes = {each: each.untyped_storage().nbytes() for each in one_each.values()}
    return {each: size for each, size in sizes.items() if not is_bucket(size)}


def count(settings: Learner) -> tuple[float, float]:
    """Returns (between steps, at most) after two steps that have made everything."""
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    # Held on to, so that nothing of an earlier cell is freed, and then missed, while this one is counted.
    before = held()
    network = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS)]).to(dtype)
    num_parameters = NUM_LAYERS * WIDTH**2
    engine, inputs = Engine(network, settings, torch.device("cpu")), torch.zeros(4, WIDTH, dtype=dtype)

    def loss() -> Tensor:
        return engine.denoiser(inputs).float().square().mean()

    for _ in range(2):
        engine.apply([loss, loss])
    between = sum(held().values()) - sum(before.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        engine.apply([loss, loss])
    now = most = 0
    for event in watched.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]" and not is_bucket(event.nbytes()):
            now += event.nbytes()
            most = max(most, now)
    return between / num_parameters, (between + most) / num_parameters


def main(rank: int, world_size: int, port: str, file: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_PORT=port)
    os.environ.update(MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    cells = {}
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2, 3):
            for offload in (False, True) if stage else (False,):
                settings = settings_of(precision, stage, offload, world_size)
                cells[f"{precision}-{stage}-{offload}"] = count(settings)
    if rank == 0:
        file.write_text(json.dumps(cells))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
