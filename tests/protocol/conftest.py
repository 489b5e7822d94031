"""What holds for streams holds on one Redis server and on a Redis Cluster."""

from __future__ import annotations

import pytest

BOTH = ("test_stream_groups", "test_stream_losses", "test_stream_tickets")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs every test of streams on both."""
    if metafunc.module.__name__.rpartition(".")[2] in BOTH:
        for name in ("redis_server", "own_redis_server"):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, ["server", "cluster"], indirect=True)
