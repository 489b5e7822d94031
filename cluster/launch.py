"""Launching: plain classes become Ray actors, placed as the recipe says."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.nodes import Strategy, demand, roles
from cluster.processes import Endpoint, LearnerProcess, RewardProcess, RolloutProcess, device_of
from cluster.pulse import HEALTH
from cluster.ray_head import check_head, head_address
from cluster.scoring import RewardPool
from cluster.weight_store import WeightStore
from protocol import log
from protocol.errors import TrainingError
from protocol.recipe import Recipe
from protocol.roles import Learner, Placement, Reward
from sfumato import WORKING_DIR

ROLE_RESTARTS = 10
"""How often Ray restarts a weight store: it holds nothing that cannot be had again."""

MORE_ACTORS = 16
"""How many actors of a rollout's size a laptop's run may be scaled up by."""


def connect_ray(recipe: Recipe, *, debug: bool) -> None:
    """Joins the cluster that RAY_ADDRESS names, or starts a local Ray of our own. Raises TrainingError."""
    check_head()
    address = head_address()
    options: dict[str, Any] = {"address": address} if address else local_options(recipe)
    try:
        ray.init(
            **options,
            log_to_driver=debug,
            logging_level="INFO" if debug else "ERROR",
            runtime_env={
                "worker_process_setup_hook": "sfumato.set_up_ray_worker",
                "env_vars": {WORKING_DIR: os.getcwd()},
            },
        )
    except Exception as error:  # Of no kind of its own where a node does not start in the 30 s that Ray gives it.
        if address:
            raise TrainingError(
                f"this process cannot join the Ray cluster at {address}: {error}",
                do="run it on a node of the cluster, as `ray job submit` does, with the cluster's version of Ray",
            ) from error
        raise TrainingError(
            f"Ray could not be started on this machine: {error}",
            do="run again when the machine is less busy; --debug, and /tmp/ray/session_latest/logs, say more",
        ) from error


def local_options(recipe: Recipe) -> dict[str, Any]:
    """A laptop's Ray has as many CPUs as the roles ask for: they share what cores there are."""
    wanted = sum(placement.num_cpus * num for _, placement, num in roles(recipe))
    more = recipe.rollouts.max - recipe.rollouts.min + MORE_ACTORS
    wanted += more * recipe.rollout_worker.num_cpus
    return {"address": "local", "num_cpus": max(int(wanted + 1), os.cpu_count() or 1), "include_dashboard": False}


def start_store(recipe: Recipe) -> Any:
    """Starts the weight store beside the driver, on the one node that no run can do without. It holds one version more
    than may be asked for, since the next comes before it is due."""
    remote = ray.remote(concurrency_groups={HEALTH: 1})(WeightStore)
    # Softly, Ray would leave an actor that asks for nothing wherever it happens to be put first.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": ROLE_RESTARTS, "max_task_retries": -1, "scheduling_strategy": here}
    return remote.options(**options).remote(recipe.lag + 2)


def start_rewards(recipe: Recipe, environments: Mapping[str, Mapping[str, Any]]) -> list[RewardPool]:
    """Starts every reward's pool, each in its environment, by label; those without one run in the main one."""
    return [start_pool(reward, environments, held_out=reward not in recipe.rewards) for reward in recipe.scored_rewards]


def start_pool(reward: Reward, environments: Mapping[str, Mapping[str, Any]], *, held_out: bool = False) -> RewardPool:
    """Starts one reward's actors."""
    return RewardPool(reward, tuple(start_reward(reward, environments) for _ in range(reward.replicas)), held_out)


def start_reward(reward: Reward, environments: Mapping[str, Mapping[str, Any]]) -> Any:
    """Starts one actor of a reward's pool."""
    options = _options(reward)
    options["runtime_env"] = {**options["runtime_env"], **environments.get(reward.label, {})}
    # Restarted without end: what kills a reward fails its tickets, by max_attempts.
    remote = ray.remote(concurrency_groups={HEALTH: 1})(RewardProcess).options(**options, max_restarts=-1)
    return remote.remote(reward)


def start_rollout(
    name: str, recipe: Recipe, run_dir: Path, endpoint: Endpoint, store: Any, pools: Sequence[RewardPool]
) -> Any:
    """Starts one rollout actor, on the node with the fewest of what its resources allow."""
    options = _options(recipe.rollout_worker)
    remote = ray.remote(RolloutProcess).options(**options, max_concurrency=2, scheduling_strategy="SPREAD")
    return remote.remote(name, recipe, str(run_dir), endpoint, store, pools)


def start_learners(learner: Learner, strategy: Strategy, timeout_s: float) -> tuple[list[Any], PlacementGroup]:
    """Starts a gang's processes in a placement group, having waited for its place."""
    group = placement_group([demand(learner)] * learner.world_size, strategy=strategy)
    if not group.wait(ceil(timeout_s)):
        raise TrainingError(
            f"the {learner.world_size} ranks of a learner found no place in {timeout_s:g} s",
            value=f"{demand(learner)} for each rank, {strategy}",
            do="look at `ray status`: other jobs may use the nodes; or raise supervision.start_timeout_s",
        )
    remote = ray.remote(concurrency_groups={HEALTH: 1})(LearnerProcess)
    ranks = [
        remote.options(
            # DeepSpeed chooses once, when it is first imported.
            **_options(learner, DS_ACCELERATOR=device_of(learner)),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote()
        for rank in range(learner.world_size)
    ]
    return ranks, group


def stop_actors(actors: Sequence[Any], groups: Sequence[PlacementGroup]) -> None:
    """Kills actors and frees their places."""
    for actor in actors:
        ray.kill(actor)
    for group in groups:
        remove_placement_group(group)


def _options(placement: Placement, **env_vars: str) -> dict[str, Any]:
    return {
        "num_cpus": placement.num_cpus,
        "num_gpus": placement.num_gpus,
        "resources": placement.resources,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(placement.threads), **log.environment(), **env_vars}},
    }
