"""Where Ray puts what a recipe asks for, on real nodes of one machine. Their GPUs are only counted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.state import actors as actors_of
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from cluster import launch
from cluster.nodes import asked_and_there, check_cluster, nodes_held, strategies
from cluster.processes import Endpoint
from cluster.versions import own_versions
from protocol.errors import RecipeError
from protocol.recipe import Recipe
from protocol.recipe_file import parse_recipe
from protocol.roles import Learner

pytestmark = pytest.mark.slow

NODES = ({"num_cpus": 1}, {"num_cpus": 4, "num_gpus": 2}, {"num_cpus": 3, "num_gpus": 1}, {"num_cpus": 3})
TIMEOUT_S = 30.0


def make_recipe(*, learner: dict[str, Any], rollout_worker: dict[str, Any], rollouts: int = 2) -> Recipe:
    """One reward, which asks for nothing."""
    document = {
        "rounds": 1,
        "rollouts": rollouts,
        "prompts": {"train": "builtin:animals"},
        "batch": {"num_groups": 12, "group_size": 4},
        "rewards": [{"name": "jpeg_compressibility", "num_cpus": 0}],
        "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
        "learner": learner,
        "rollout_worker": rollout_worker,
        "redis": {"url": "env:SFUMATO_REDIS_URL"},
    }
    return parse_recipe(document, source="test")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Any]:
    """Four nodes: a head, one with two GPUs, one with one, one without."""
    os.environ.pop("RAY_ADDRESS", None)
    cluster = Cluster(initialize_head=True, head_node_args={**NODES[0], "include_dashboard": False})
    for node in NODES[1:]:
        cluster.add_node(wait=False, **node)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def nodes_of_ranks(learner: Learner, recipe: Recipe) -> list[str]:
    """Starts a gang as a run would, and returns the nodes of its ranks."""
    ranks, group = launch.start_learners(learner, strategies(recipe)[0], TIMEOUT_S)
    nodes = placement_group_table(group)["bundles_to_node_id"]
    launch.stop_actors(ranks, [group])
    return list(nodes.values())


def node_of(actor: Any) -> str:
    """Waits until an actor lives."""
    deadline = time.monotonic() + TIMEOUT_S
    while (state := actors_of(actor._actor_id.hex()))["State"] != "ALIVE":
        assert time.monotonic() < deadline, state
        time.sleep(0.05)
    return str(state["Address"]["NodeID"])


def test_ranks_are_on_one_node_where_one_has_room_for_all() -> None:
    recipe = make_recipe(learner={"world_size": 4, "num_gpus": 0.5}, rollout_worker={"num_gpus": 0.5})
    assert strategies(recipe) == ["STRICT_PACK"]
    assert len(set(nodes_of_ranks(recipe.learner, recipe))) == 1


def test_ranks_are_on_several_nodes_where_none_has_room_for_all() -> None:
    recipe = make_recipe(learner={"world_size": 3, "num_gpus": 1}, rollout_worker={"num_cpus": 1})
    assert strategies(recipe) == ["PACK"]
    assert len(set(nodes_of_ranks(recipe.learner, recipe))) == 2


def test_ranks_leave_a_node_to_those_who_can_be_nowhere_else() -> None:
    settings = {"learner": {"world_size": 2, "num_cpus": 2}, "rollouts": 1}
    assert strategies(make_recipe(**settings, rollout_worker={"num_cpus": 3})) == ["STRICT_PACK"]
    assert strategies(make_recipe(**settings, rollout_worker={"num_cpus": 4})) == ["PACK"]


def test_rollouts_are_spread_over_the_nodes_that_can_hold_them(tmp_path: Path) -> None:
    recipe = make_recipe(learner={}, rollout_worker={"num_cpus": 1}, rollouts=3)
    endpoint = Endpoint("redis://127.0.0.1:1/0", "run", 0, 1, 1.0, own_versions())
    actors = [launch.start_rollout(str(n), recipe, tmp_path, endpoint, None, []) for n in range(3)]
    nodes = [node_of(actor) for actor in actors]
    launch.stop_actors(actors, [])
    assert len(set(nodes)) == 3


def test_two_rollouts_share_a_gpu(tmp_path: Path) -> None:
    recipe = make_recipe(learner={}, rollout_worker={"num_cpus": 0, "num_gpus": 0.5}, rollouts=6)
    endpoint = Endpoint("redis://127.0.0.1:1/0", "run", 0, 1, 1.0, own_versions())
    check_cluster(recipe)
    actors = [launch.start_rollout(str(n), recipe, tmp_path, endpoint, None, []) for n in range(6)]
    nodes = [node_of(actor) for actor in actors]
    launch.stop_actors(actors, [])
    assert sorted(nodes.count(node) for node in set(nodes)) == [2, 4]


def test_a_recipe_that_no_placement_can_satisfy_is_refused_at_once_with_what_is_asked_and_what_is_there() -> None:
    recipe = make_recipe(learner={"world_size": 2}, rollout_worker={"num_cpus": 3, "num_gpus": 1}, rollouts=3)
    begun = time.monotonic()
    told = "no node has what the processes on it would take together"
    with pytest.raises(RecipeError, match=told) as refused, nodes_held(recipe, lambda said: None):
        pass
    assert time.monotonic() - begun < 5
    assert asked_and_there(recipe) in str(refused.value)


def test_the_table_has_a_line_for_every_role_and_every_node() -> None:
    recipe = make_recipe(learner={"world_size": 2}, rollout_worker={"num_cpus": 0, "resources": {"spot": 1}})
    lines = [line.split() for line in asked_and_there(recipe).splitlines()]
    assert lines[:5] == [
        ["asked,", "by", "each", "CPU", "GPU", "spot"],
        ["2", "x", "learner", "1", "-", "-"],
        ["2", "x", "rollout", "-", "-", "1"],
        ["1", "x", "reward", "jpeg_compressibility", "-", "-", "-"],
        ["there,", "on", "each", "node"],
    ]
    assert sorted(line[1:] for line in lines[5:]) == [
        ["1", "-", "-"],
        ["3", "-", "-"],
        ["3", "1", "-"],
        ["4", "2", "-"],
    ]
