"""What all tests share: a real Redis server, a Redis Cluster, streams of a run of their own, tickets and groups."""

from __future__ import annotations

import gc
import secrets
from collections.abc import Callable, Generator, Iterator

import numpy as np
import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from cluster.redis_server import RedisServer
from protocol.groups import Group
from protocol.stream import Streams, connect
from protocol.tickets import Source, Ticket, TicketPlan
from tests.redis_cluster import RedisCluster

# A shared machine may stall any single example; the tests bound the work, not the clock.
settings.register_profile("sfumato", deadline=None)
settings.load_profile("sfumato")

PROMPTS = Source.of_prompts(("a red seven", "a blue one", "a green four"))
PLAN = TicketPlan(run_seed=7, sources=(PROMPTS,), num_groups=8, group_size=4, lag=1)
DIGEST = "9f86d081" * 8


class ByFile(LoadFileScheduling):
    """A file's tests run in one process, which makes once what they share. Those of whole runs are as one file: they
    look at the same runs, and each starts as many processes as a machine has."""

    def _split_scope(self, nodeid: str) -> str:
        return "end_to_end" if "/end_to_end/" in nodeid else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs come first: what takes longest and cannot be parted must not be what is left at the end."""
    items.sort(key=lambda item: "/end_to_end/" not in item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The garbage collector leaves alone what was imported: walking through it again and again is a sixth of all
    time."""
    gc.disable()
    collected = yield
    gc.freeze()
    gc.enable()
    return collected


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """One cluster for all tests, each of which may do anything to it but finds it whole and leaves it so."""
    with RedisCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def redis_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer | RedisCluster]:
    """One server for all tests that do not empty, stop or fill it."""
    if getattr(request, "param", None) == "cluster":
        yield request.getfixturevalue("redis_cluster")
        return
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_redis_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer | RedisCluster]:
    """A server for one test, which may do anything to it."""
    if getattr(request, "param", None) == "cluster":
        cluster = request.getfixturevalue("redis_cluster")
        yield cluster
        cluster.empty()
        return
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def open_streams() -> Iterator[Callable[..., Streams]]:
    """Opens the streams of a run, as a process does: `open_streams(server, run_id="a", attempt=2)`."""
    clients = []

    def open_(
        server: RedisServer | RedisCluster, *, run_id: str = "", attempt: int = 1, num_shards: int = 2
    ) -> Streams:
        clients.append(connect(server.url, timeout_s=5.0))
        run_id = run_id or f"test-{secrets.token_hex(6)}"
        streams = Streams(clients[-1], run_id=run_id, attempt=attempt, num_shards=num_shards)
        streams.open()
        return streams

    yield open_
    for client in clients:
        client.close()


@pytest.fixture
def streams(redis_server: RedisServer, open_streams: Callable[..., Streams]) -> Iterator[Streams]:
    """The streams of a fresh run."""
    opened = open_streams(redis_server)
    yield opened
    opened.delete_attempt()


@pytest.fixture(scope="session")
def make_ticket() -> Callable[..., Ticket]:
    """Makes ticket `index` of a round: `make_ticket(index=3, round_=1)`."""

    def make(index: int = 0, round_: int = 0) -> Ticket:
        return PLAN.ticket(round_, index, DIGEST)

    return make


@pytest.fixture(scope="session")
def make_group() -> Callable[..., Group]:
    """Makes a group that answers ticket `index` of a round."""

    def make(index: int = 0, round_: int = 0) -> Group:
        rng = np.random.default_rng(1000 * round_ + index)
        ticket = PLAN.ticket(round_, index, DIGEST)
        return Group(
            ticket_id=ticket.ticket_id,
            round=ticket.round,
            index=ticket.index,
            prompt=ticket.prompt,
            version=ticket.version,
            weights_digest=ticket.weights_digest,
            sampler='{"eta":1.0}',
            fingerprint='{"device":"cpu"}',
            worker="rollout-0@host",
            rollout_s=0.41,
            reward_s=1e-17,
            num_images=4,
            num_evaluations=40,
            arrays={
                "latents_GSCHW": rng.standard_normal((4, 6, 4, 8, 8)).astype(np.float32),
                "log_prob_GT": rng.standard_normal((4, 5)),
                "scored_T": np.array([True, True, False, True, True]),
                "reward_G": rng.standard_normal(4).astype(np.float32),
            },
        )

    return make
