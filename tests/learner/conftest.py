"""What the tests of the learner share: a small random model on disk, and a process that is a rank by itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cluster.redis_server import free_port
from learner.engine import Engine
from tests.models import make_tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny Stable Diffusion pipeline that predicts noise."""
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="session")
def process_group() -> Iterator[str]:
    """The port of this process's group of ranks. DeepSpeed joins one once in a process's life."""
    yield str(free_port("127.0.0.1"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def gang_of_one(process_group: str) -> Iterator[None]:
    """The environment of a rank that is alone, whose engines leave the process group to the next module."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**alone, "MASTER_PORT": process_group}.items():
            patch.setenv(name, value)
        patch.setattr(Engine, "close", lambda self: None)
        yield
