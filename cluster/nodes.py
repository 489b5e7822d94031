"""What a run asks of the cluster's nodes, and waiting for those that an autoscaler starts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import ray
from ray.autoscaler.sdk import request_resources

from protocol.errors import RecipeError
from protocol.recipe import Recipe
from protocol.roles import Placement

POLL_S = 2.0


def roles(recipe: Recipe) -> list[tuple[Placement, int]]:
    """Returns each role's placement and how many processes it has."""
    return [
        *((learner, learner.world_size) for learner in recipe.learners),
        (recipe.rollout_worker, recipe.rollouts),
        *((reward, reward.replicas) for reward in recipe.scored_rewards),
    ]


def demand(placement: Placement) -> dict[str, float]:
    """Returns what one process reserves, by Ray's names."""
    parts = {"CPU": placement.num_cpus, "GPU": placement.num_gpus, **placement.resources}
    return {name: amount for name, amount in parts.items() if amount}


def missing_resources(recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Returns name -> (what the cluster has now, what the roles ask for) of every resource that is short."""
    wanted: defaultdict[str, float] = defaultdict(float)
    for placement, count in roles(recipe):
        for name, amount in demand(placement).items():
            wanted[name] += amount * count
    have = ray.cluster_resources()
    return {name: (have.get(name, 0.0), need) for name, need in wanted.items() if need > have.get(name, 0.0)}


def wait_for_nodes(recipe: Recipe, tell: Callable[[str], None]) -> None:
    """Asks the cluster's autoscaler for what the roles need, and returns once all of it is there. Raises RecipeError
    where it is not, and `supervision.node_timeout_s` has passed."""
    deadline = time.monotonic() + recipe.supervision.node_timeout_s
    if recipe.supervision.node_timeout_s and missing_resources(recipe):
        bundles = [demand(placement) for placement, count in roles(recipe) for _ in range(count) if demand(placement)]
        request_resources(bundles=bundles)
        try:
            while (short := missing_resources(recipe)) and time.monotonic() < deadline:
                told = (f"{name} {have:g} of {need:g}" for name, (have, need) in short.items())
                tell(f"waiting for nodes: {', '.join(told)}")
                time.sleep(POLL_S)
        finally:
            request_resources(bundles=[])  # From here on the actors themselves are the demand.
    check_cluster(recipe)


def check_cluster(recipe: Recipe) -> None:
    """Raises RecipeError if the cluster, as it is now, cannot hold the run."""
    num_nodes = len([node for node in ray.nodes() if node["Alive"]])
    if num_nodes > 1 and recipe.redis.url is None:
        raise RecipeError(
            "the embedded Redis listens on this machine only, but the cluster has other nodes",
            value=f"{num_nodes} nodes",
            expected="a Redis server that every node reaches",
            do="set redis.url=rediss://:password@host:port/0, or redis.url=env:NAME",
        )
    if short := missing_resources(recipe):
        asked = {name: need for name, (_, need) in short.items()}
        there = {name: have for name, (have, _) in short.items()}
        raise RecipeError(
            f"the roles of this recipe ask for {asked} but the cluster has {there}",
            expected="enough of every resource",
            do="lower rollouts, learner.world_size or num_gpus, start more nodes, or raise supervision.node_timeout_s "
            "where an autoscaler starts them",
        )
