"""A Ray cluster of several nodes on this machine, a Redis server that they reach over TCP, and a network to cut."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from ray.cluster_utils import Cluster

from tests.tls_proxy import copy_bytes

START_TIMEOUT_S = 10.0


class Nodes:
    """A head without CPUs and nodes by name. Every driver that gets `env` joins them."""

    def __init__(self) -> None:
        os.environ.pop("RAY_ADDRESS", None)
        head = {"num_cpus": 0, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}

    @property
    def env(self) -> dict[str, str]:
        """What tells a driver where the head is."""
        return {"RAY_ADDRESS": str(self._cluster.address)}

    def add(self, name: str, resources: Mapping[str, float], **options: Any) -> None:
        """Starts a node."""
        self._nodes[name] = self._cluster.add_node(num_cpus=4, resources=dict(resources), **options)

    def remove(self, name: str) -> None:
        """Kills all processes of a node, as if its machine were lost."""
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()


class Wire:
    """Hands TCP connections on, on `host`, until it is cut: then it drops all and refuses new ones until healed."""

    def __init__(self, host: str, target_port: int) -> None:
        self._host, self._target_port = host, target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port, self.num_cut = 0, 0

    def cut(self) -> None:
        """Drops all connections and refuses new ones."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(START_TIMEOUT_S)

    def heal(self) -> None:
        """Listens, on the same port."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(START_TIMEOUT_S)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._forward, self._host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _cut(self) -> None:
        assert self._server is not None
        self._server.close()
        self.num_cut += len(self._writers)
        for writer in self._writers:
            writer.transport.abort()
        while self._writers:
            await asyncio.sleep(0.01)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(self._host, self._target_port)
        ends = {writer, inner_writer}
        self._writers |= ends
        try:
            await asyncio.gather(copy_bytes(reader, inner_writer), copy_bytes(inner_reader, writer))
        finally:
            self._writers -= ends

    def __enter__(self) -> Self:
        self._thread.start()
        self.heal()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
