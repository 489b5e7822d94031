"""A Ray cluster of several nodes: each must reach the Redis, and a version's weights cross to each once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.nodes import check_cluster
from cluster.pulse import HEALTH
from cluster.weight_store import StoreClient, WeightStore
from protocol.errors import RecipeError
from protocol.recipe_file import load_recipe

SIZE_BYTES = 20 * 2**20


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    cluster.add_node(num_cpus=8)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("two_nodes")
def test_an_embedded_redis_is_refused_where_other_nodes_could_not_reach_it() -> None:
    with pytest.raises(RecipeError, match=r"2 nodes.*redis\.url=rediss://"):
        check_cluster(load_recipe("recipes/tiny_prdp.yaml"))
    check_cluster(load_recipe("recipes/tiny_prdp.yaml", ["redis.url=rediss://:x@head:6390"]))


def received_bytes(node_id: str) -> int:
    """Returns the bytes of all objects that a node's object store has ever made room for."""
    (node,) = (node for node in ray.nodes() if node["NodeID"] == node_id)
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"])
    return int(stats.store_stats.cumulative_created_bytes)


@pytest.mark.slow
def test_a_versions_bytes_cross_to_a_node_once_however_many_actors_there_fetch_it(two_nodes: Cluster) -> None:
    class Fetcher:
        """Gets versions as a rollout actor does. Within the test, since workers cannot import its module."""

        def __init__(self, store: Any) -> None:
            self._client = StoreClient(store)

        def fetch(self, digest: str) -> int:
            """Returns how many bytes came."""
            return len(self._client.fetch(digest) or b"")

    def start(cls: type, node: Any, *arguments: Any, **options: Any) -> Any:
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        return ray.remote(num_cpus=0, scheduling_strategy=there, **options)(cls).remote(*arguments)

    (other,) = two_nodes.worker_nodes
    store = start(WeightStore, two_nodes.head_node, 2, concurrency_groups={HEALTH: 1})
    fetchers = [start(Fetcher, other, store) for _ in range(3)]
    assert ray.get([fetcher.fetch.remote("not there") for fetcher in fetchers]) == [0, 0, 0]
    for version in range(2):
        StoreClient(store).publish(version, str(version), np.random.default_rng(version).bytes(SIZE_BYTES))
        before = received_bytes(other.node_id)
        assert ray.get([fetcher.fetch.remote(str(version)) for fetcher in fetchers]) == [SIZE_BYTES] * 3
        assert SIZE_BYTES <= received_bytes(other.node_id) - before < 1.1 * SIZE_BYTES
