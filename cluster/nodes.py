"""What a run asks of the cluster's nodes, where it goes, and waiting for those that an autoscaler starts."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from cluster.packing import Room, Unit, fits
from protocol.errors import RecipeError
from protocol.recipe import Recipe
from protocol.roles import Placement

POLL_S = 2.0
OTHERS = ("memory", "object_store_memory", "node:", "accelerator_type:")
"""Resources of nodes that roles do not ask for."""

Strategy = Literal["STRICT_PACK", "PACK"]


class Role(NamedTuple):
    """Processes of one kind: `Role("rollout", placement, 8)`."""

    name: str
    placement: Placement
    num: int


def roles(recipe: Recipe) -> list[Role]:
    """Returns every role, gangs of learners first."""
    names = ["learner", *(f"learner {follower.name}" for follower in recipe.followers)]
    return [
        *(Role(name, learner, learner.world_size) for name, learner in zip(names, recipe.learners, strict=True)),
        Role("rollout", recipe.rollout_worker, recipe.rollouts.min),
        *(Role(f"reward {reward.label}", reward, reward.replicas) for reward in recipe.scored_rewards),
    ]


def demand(placement: Placement) -> dict[str, float]:
    """Returns what one process reserves, by Ray's names."""
    parts = {"CPU": placement.num_cpus, "GPU": placement.num_gpus, **placement.resources}
    return {name: amount for name, amount in parts.items() if amount}


def missing_resources(recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Returns name -> (what the cluster has now, what the roles ask for) of every resource that is short."""
    wanted: defaultdict[str, float] = defaultdict(float)
    for _, placement, num in roles(recipe):
        for name, amount in demand(placement).items():
            wanted[name] += amount * num
    have = ray.cluster_resources()
    return {name: (have.get(name, 0.0), need) for name, need in wanted.items() if need > have.get(name, 0.0)}


def strategies(recipe: Recipe) -> list[Strategy]:
    """Returns how the ranks of each gang are placed: all on one node where that leaves a place for everybody else, and
    otherwise on as few as Ray finds."""
    rooms, together = _rooms(), list[int]()
    for gang in range(len(recipe.learners)):
        if fits(rooms, _units(recipe, {*together, gang})):
            together.append(gang)
    return ["STRICT_PACK" if gang in together else "PACK" for gang in range(len(recipe.learners))]


@contextmanager
def nodes_held(recipe: Recipe, tell: Callable[[str], None]) -> Iterator[None]:
    """Waits until the cluster's autoscaler has started what the roles need, and keeps it from letting nodes go until
    the block is left. Raises RecipeError where `supervision.node_timeout_s` has passed before all of it is there."""
    deadline = time.monotonic() + recipe.supervision.node_timeout_s
    # A place for all at once is what the autoscaler counts as asked for, and it ends with us however we end.
    bundles = [dict(process) for unit in _units(recipe) for process in unit if process]
    group = placement_group(bundles, strategy="PACK") if recipe.supervision.node_timeout_s else None
    try:
        while not _has_place(recipe) and time.monotonic() < deadline:
            tell(f"waiting for nodes: {_shortage(recipe)}")
            time.sleep(POLL_S)
        check_cluster(recipe)
        yield
    finally:
        if group:
            remove_placement_group(group)  # From here on the actors themselves are the demand.


def check_cluster(recipe: Recipe) -> None:
    """Raises RecipeError if the cluster, as it is now, cannot hold the run."""
    num_nodes = len(_nodes())
    if num_nodes > 1 and recipe.redis.url is None:
        raise RecipeError(
            "the embedded Redis listens on this machine only, but the cluster has other nodes",
            value=f"{num_nodes} nodes",
            expected="a Redis server that every node reaches",
            do="set redis.url=rediss://:password@host:port/0, or redis.url=env:NAME",
        )
    if not _has_place(recipe):
        raise RecipeError(
            f"the cluster cannot hold this recipe: {_shortage(recipe)}\n{asked_and_there(recipe)}\n",
            do="lower rollouts, learner.world_size or num_gpus, start more nodes, or raise supervision.node_timeout_s "
            "where an autoscaler starts them",
        )


def asked_and_there(recipe: Recipe) -> str:
    """Returns a table of what each process of each role asks for, and of what each node has."""
    asked = [(f"{role.num} x {role.name}", demand(role.placement)) for role in roles(recipe)]
    there = [(str(node["NodeManagerAddress"]), _amounts(node)) for node in _nodes()]
    names = list(dict.fromkeys(["CPU", "GPU", *(name for _, has in (*asked, *there) for name in has)]))
    lines = [["asked, by each", *names], *([who, *_cells(has, names)] for who, has in asked)]
    lines += [["there, on each node", *[""] * len(names)], *([who, *_cells(has, names)] for who, has in there)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(
        f"    {line[0].ljust(widths[0])}  {'  '.join(cells[1:])}".rstrip()
        for line, cells in zip(lines, padded, strict=True)
    )


def _cells(has: dict[str, float], names: Sequence[str]) -> list[str]:
    return [f"{has[name]:g}" if name in has else "-" for name in names]


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _amounts(node: dict[str, Any]) -> dict[str, float]:
    return {name: amount for name, amount in sorted(node["Resources"].items()) if not name.startswith(OTHERS)}


def _rooms() -> list[Room]:
    return [Room.of(_amounts(node)) for node in _nodes()]


def _units(recipe: Recipe, together: Collection[int] = ()) -> list[Unit]:
    """Returns what is to be placed, where the gangs with these numbers are each on one node."""
    units: list[Unit] = []
    for number, (_, placement, num) in enumerate(roles(recipe)):
        processes = [demand(placement)] * num
        units += [tuple(processes)] if number in together else [(process,) for process in processes]
    return units


def _has_place(recipe: Recipe) -> bool:
    """A search that is given up is no reason to refuse: Ray may find what we do not."""
    return not missing_resources(recipe) and fits(_rooms(), _units(recipe)) is not False


def _shortage(recipe: Recipe) -> str:
    short = missing_resources(recipe).items()
    told = [f"{name} {have:g} of {need:g}" for name, (have, need) in short]
    return ", ".join(told) or "enough in all, but no node has what the processes on it would take together"
