"""Several Ray nodes, a learner gang over two of them, Redis over TCP: the weights are those of one machine, whatever
nodes and networks do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.util import get_node_ip_address

from cluster.redis_server import RedisServer
from tests.end_to_end.runs import Driver, Run, finished, sfumato
from tests.end_to_end.several_nodes import Nodes, Wire

pytestmark = pytest.mark.slow

TWO_RANKS = ("rounds=5", "lag=1", "learner.world_size=2")
ON_NODES = ("learner.resources={learner: 1}", "rollout_worker.resources={rollout: 1}", "rollouts=2")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head, two nodes for a rank each, and one for two rollout actors."""
    with Nodes() as nodes:
        for name in ("learner-0", "learner-1"):
            nodes.add(name, {"learner": 1}, wait=False)
        nodes.add("rollout-0", {"rollout": 2})
        yield nodes


@pytest.fixture(scope="module")
def redis_over_tcp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server with a password on this machine's own address, which is not loopback."""
    host = get_node_ip_address()
    assert not host.startswith("127.")
    with RedisServer(tmp_path_factory.mktemp("redis"), host=host) as server:
        yield server


@pytest.fixture
def settings(nodes: Nodes, redis_over_tcp: RedisServer) -> dict[str, Any]:
    """What a driver is given besides its run."""
    return {"env": {**nodes.env, "SFUMATO_REDIS_URL": redis_over_tcp.url}}


LONGER = "rounds=12"
"""Of runs that must not be over before something happens to them: their first versions are compared."""

ARGUMENTS = ("recipe.yaml", *TWO_RANKS, *ON_NODES, "redis.url=env:SFUMATO_REDIS_URL")


def test_a_gang_over_two_nodes_ends_with_the_digests_of_one_machine(
    train: Callable[..., Run], workshop: Path, settings: dict[str, Any]
) -> None:
    folder = workshop / "two-nodes"
    run = finished(sfumato("train", *ARGUMENTS, "--run-dir", folder, cwd=workshop, **settings), folder)
    assert "placing the 2 ranks of learner on several nodes: none has room for all" in run.output
    assert run.digests == train(*TWO_RANKS).digests


def test_a_rollout_node_that_is_lost_in_mid_round_changes_nothing(
    train: Callable[..., Run], workshop: Path, nodes: Nodes, settings: dict[str, Any]
) -> None:
    nodes.add("rollout-1", {"rollout": 2})
    with Driver(workshop / "lost-node", [*ARGUMENTS, LONGER], cwd=workshop, **settings) as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 1)
        nodes.remove("rollout-1")
        assert driver.rounds_done() < 12, "the run was over before its node was lost"
        run = driver.finish()
    assert run.digests.items() >= train(*TWO_RANKS).digests.items()


def test_a_network_that_is_cut_between_all_roles_and_redis_heals(
    train: Callable[..., Run], workshop: Path, nodes: Nodes, redis_over_tcp: RedisServer
) -> None:
    host = get_node_ip_address()
    with Wire(host, redis_over_tcp.port) as wire:
        url = redis_over_tcp.url.replace(f":{redis_over_tcp.port}/", f":{wire.port}/")
        env = {**nodes.env, "SFUMATO_REDIS_URL": url}
        with Driver(workshop / "cut-network", [*ARGUMENTS, LONGER], cwd=workshop, env=env) as driver:
            driver.wait_for(lambda: driver.rounds_done() >= 1)
            wire.cut()
            at_the_cut = driver.rounds_done()
            time.sleep(30)
            assert wire.num_cut > 0
            assert driver.rounds_done() <= at_the_cut + 2 < 12, "the run went on without Redis"
            wire.heal()
            run = driver.finish()
    assert run.digests.items() >= train(*TWO_RANKS).digests.items()


def test_a_node_with_another_version_of_diffusers_is_refused_with_a_table(
    workshop: Path, tmp_path: Path, nodes: Nodes, settings: dict[str, Any]
) -> None:
    other = tmp_path / "diffusers-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.0.1\n")
    nodes.add("old", {"old": 1}, env_vars={"PYTHONPATH": str(tmp_path)})
    arguments = (*ARGUMENTS, "rollout_worker.resources={old: 1}", "rollouts=1")
    refused = sfumato("train", *arguments, "--run-dir", workshop / "other-version", cwd=workshop, **settings)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "the rollout actor 0 on node" in refused.stderr
    assert "diffusers  0.0.1  " in refused.stderr
    nodes.remove("old")
