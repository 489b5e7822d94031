"""A Ray cluster of several nodes needs a Redis that all of them reach."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster import launch
from protocol.errors import RecipeError
from protocol.recipe_file import load_recipe


@pytest.fixture
def two_nodes() -> Iterator[None]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False})
    cluster.add_node(num_cpus=8)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("two_nodes")
def test_an_embedded_redis_is_refused_where_other_nodes_could_not_reach_it() -> None:
    with pytest.raises(RecipeError, match=r"2 nodes.*redis\.url=rediss://"):
        launch.check_cluster(load_recipe("recipes/tiny_prdp.yaml"))
    launch.check_cluster(load_recipe("recipes/tiny_prdp.yaml", ["redis.url=rediss://:x@head:6390"]))
