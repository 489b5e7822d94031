"""A run starts when the nodes that it needs are there, and says what it waits for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster.launch import start_store
from cluster.memory import check_nodes
from cluster.nodes import check_cluster, demand, missing_resources, nodes_held
from protocol.errors import RecipeError
from protocol.recipe import Recipe
from protocol.recipe_file import load_recipe, parse_recipe
from protocol.roles import Placement


def make_recipe(*, node_timeout_s: float, url: str | None = "env:SFUMATO_REDIS_URL") -> Recipe:
    """One learner, one reward, and two rollout actors that want to be on rollout nodes."""
    document = {
        "rounds": 1,
        "rollouts": 2,
        "prompts": {"train": "builtin:animals"},
        "batch": {"num_groups": 4, "group_size": 4},
        "rewards": [{"name": "jpeg_compressibility", "num_cpus": 0}],
        "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
        "learner": {"num_cpus": 1},
        "rollout_worker": {"num_cpus": 0, "resources": {"rollout": 1}},
        "redis": {"url": url},
        "supervision": {"node_timeout_s": node_timeout_s},
    }
    return parse_recipe(document, source="test")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with one CPU. No autoscaler looks after it."""
    os.environ.pop("RAY_ADDRESS", None)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def asked_for() -> list[str]:
    """Returns the states of what was asked for and not withdrawn, which an autoscaler would start nodes for."""
    states = [str(group["state"]) for group in placement_group_table().values()]
    return [state for state in states if state != "REMOVED"]


def enter(recipe: Recipe, said: list[str]) -> list[str]:
    """Waits for the nodes; returns what is asked for while they are held."""
    with nodes_held(recipe, said.append):
        while "PENDING" in asked_for():
            time.sleep(0.01)
        return asked_for()


def test_one_process_reserves_what_its_placement_names_and_nothing_of_which_it_wants_none() -> None:
    placement = Placement(num_cpus=0, num_gpus=1, resources={"rollout": 1, "spot": 0})
    assert demand(placement) == {"GPU": 1, "rollout": 1}


def test_the_weight_store_is_beside_the_driver_however_many_nodes_there_are(cluster: Any) -> None:
    others = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    # Each by itself would be there by chance once in three times.
    stores = [start_store(load_recipe("recipes/tiny_prdp.yaml")) for _ in range(4)]
    on = ray.get([store.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for store in stores])
    for store in stores:
        ray.kill(store)
    for node in others:
        cluster.remove_node(node)
    assert on == [ray.get_runtime_context().get_node_id()] * 4


@pytest.mark.usefixtures("cluster")
def test_every_node_is_asked_for_its_memory() -> None:
    said: list[str] = []
    check_nodes(load_recipe("recipes/tiny_prdp.yaml"), said.append)
    assert said == []
    too_large = ["learner.micro_batch_size=1000000", "batch.num_groups=240000"]
    with pytest.raises(RecipeError, match="more main memory than"):
        check_nodes(load_recipe("recipes/tiny_prdp.yaml", too_large), said.append)


def test_a_cluster_without_the_nodes_is_refused_at_once_where_nobody_is_to_wait(cluster: Any) -> None:
    said: list[str] = []
    with pytest.raises(RecipeError, match="cannot hold this recipe: rollout 0 of 2"):
        enter(make_recipe(node_timeout_s=0), said)
    assert said == []


def test_nodes_that_do_not_come_in_time_are_named(cluster: Any) -> None:
    said: list[str] = []
    with pytest.raises(RecipeError, match=r"(?s)rollout 0 of 2.*supervision.node_timeout_s"):
        enter(make_recipe(node_timeout_s=1), said)
    assert said == ["waiting for nodes: rollout 0 of 2"]
    assert asked_for() == []


def test_a_run_waits_for_the_nodes_that_it_asks_for(cluster: Any) -> None:
    said: list[str] = []
    with ThreadPoolExecutor(1) as driver:
        waiting = driver.submit(enter, make_recipe(node_timeout_s=60), said)
        while not said:
            time.sleep(0.01)
        assert asked_for() == ["PENDING"]
        cluster.add_node(num_cpus=1, resources={"rollout": 2})
        assert waiting.result() == ["CREATED"]
    assert asked_for() == []
    check_nodes(make_recipe(node_timeout_s=0), said.append)
    assert said[0] == "waiting for nodes: rollout 0 of 2"
    assert missing_resources(make_recipe(node_timeout_s=0)) == {}
    with pytest.raises(RecipeError, match="the embedded Redis listens on this machine only"):
        check_cluster(make_recipe(node_timeout_s=0, url=None))
