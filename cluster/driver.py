"""The driver: starts a run's roles, watches them, restarts what dies, and ends the run cleanly.

attempt:  Redis keys + weight store + reward actors + rollout actors + the learner gang
    a rollout actor            it alone is started again
    a reward actor or the      Ray starts it again; whoever waited asks again
    weight store
    a learner rank             everything is stopped, and the next attempt goes on from the newest checkpoint
    the embedded Redis         it is started again, empty; lost tickets are issued again

Each counts as lost when its process dies, and also when it lives but makes no progress (gives no answer) for as long
as the recipe's `supervision` says.
    an error of ours           the run stops with it: starting again would meet it again
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import Any

import ray

from cluster import launch
from cluster.attempt import Attempt, LearnerLostError, Show, Status
from cluster.environments import prepare
from cluster.memory import check_nodes
from cluster.nodes import nodes_held
from cluster.ray_head import head_address
from cluster.redis_server import ForeignRedis, RedisKeeper, RedisServer
from cluster.run_dir import RunDir
from cluster.signals import interrupt_on_sigterm
from cluster.sources import prepare_sources, read_plan
from learner.checkpoint import latest_checkpoint
from protocol.derived import MIN_REDIS_BYTES, in_flight_bytes, latent_shape, redis_bytes
from protocol.errors import RedisError, TrainingError
from protocol.recipe import Recipe
from protocol.stream import connect, server_facts, url_of


class Driver:
    """One `sfumato train`."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, show: Show, *, debug: bool = False) -> None:
        self._recipe, self._run_dir, self._show, self._debug = recipe, run_dir, show, debug
        self._status = Status(attempt=run_dir.attempt)
        prepare_sources(recipe, run_dir.path, self._tell)
        self._plan = read_plan(recipe, run_dir.path)
        self._num_lost, self._reached = 0, 0

    def run(self) -> None:
        """Runs attempts until the rounds are done. Raises the run's last error when restarts are used up."""
        with ExitStack() as stack:
            url, redis = self._redis(stack)
            launch.connect_ray(self._recipe, debug=self._debug)
            interrupt_on_sigterm()
            stack.callback(ray.shutdown)
            with nodes_held(self._recipe, self._tell):
                if head_address():
                    check_nodes(self._recipe, self._tell)
                environments = self._environments()
            while True:
                try:
                    attempt = Attempt(
                        self._recipe, self._run_dir, self._plan, url, environments, self._status, self._show
                    )
                    attempt.run(redis)
                    return
                except LearnerLostError as error:
                    self._count_restart(error)
                    environments = self._environments()  # For nodes that have joined meanwhile.

    def _environments(self) -> dict[str, dict[str, Any]]:
        return prepare(self._recipe.scored_rewards, self._tell, debug=self._debug)

    def _count_restart(self, error: LearnerLostError) -> None:
        """Goes on with a new attempt, or ends a run that is lost again and again at the same checkpoint."""
        found = latest_checkpoint(self._run_dir.path)
        reached = found.meta.round if found else 0
        self._num_lost = self._num_lost + 1 if reached == self._reached else 1
        self._reached = reached
        if self._num_lost > self._recipe.supervision.max_restarts:
            raise TrainingError(
                f"the learner was lost {self._num_lost} times without a new checkpoint; the last error: {error}",
                do=f"look at the error, then go on with --resume --run-dir {self._run_dir.path}",
            ) from error
        self._status.restarts += 1
        self._status.attempt = self._run_dir.next_attempt()
        self._tell(f"restarting the learner ({error})")

    def _tell(self, phase: str) -> None:
        self._status.phase = phase
        self._show(self._status)

    def _redis(self, stack: ExitStack) -> tuple[str, RedisKeeper]:
        """Returns the URL of the recipe's server, checked, or that of an embedded one that lives as long as we,
        and what starts that again should it die or hang: it comes back empty, and what it held is made again."""
        redis, shape_CHW = self._recipe.redis, latent_shape(self._recipe)
        if redis.url is None:
            maxmemory = redis_bytes(self._recipe, shape_CHW) if shape_CHW else redis.maxmemory_bytes
            server = stack.enter_context(RedisServer(log_dir=self._run_dir.path, maxmemory_bytes=maxmemory))
            return server.url, server
        check_redis(self._recipe)
        return url_of(redis.url), ForeignRedis()


def check_redis(recipe: Recipe) -> None:
    """Raises RedisError unless the recipe's own server or cluster answers and can hold what may be in flight."""
    if recipe.redis.url is None:
        return
    with connect(url_of(recipe.redis.url), timeout_s=recipe.redis.timeout_s) as client:
        servers = server_facts(client)
    limits = [limit for facts in servers if (limit := facts["maxmemory"])]
    shape_CHW = latent_shape(recipe)
    if not limits or not shape_CHW:
        return
    # Each server holds its shards, and shards are dealt evenly.
    share = ceil(recipe.num_shards / len(servers)) / recipe.num_shards
    needed = ceil(in_flight_bytes(recipe, shape_CHW) * share) + MIN_REDIS_BYTES // 4
    if min(limits) < needed:
        raise RedisError(
            "the Redis server is too small for what may be in flight",
            value=f"maxmemory {min(limits)}",
            expected=f"at least {needed} bytes: its share of lag + 1 rounds and the server's own needs",
            do="raise its maxmemory, lower lag, batch or sampler.num_steps, or add servers and redis.num_shards",
        )


def default_run_dir(recipe_path: Path) -> Path:
    """Returns <recipe>-<time> in $SFUMATO_RUNS, or in runs/ in the working directory."""
    return Path(os.environ.get("SFUMATO_RUNS") or "runs") / f"{recipe_path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
