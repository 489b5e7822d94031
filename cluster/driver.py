"""The driver: starts a run's roles, watches them, restarts what dies, and ends the run cleanly.

attempt:  Redis keys + weight store + reward actors + rollout actors + the learner gang
    a rollout actor dies       it alone is started again
    a reward actor or the      Ray starts it again; whoever waited asks again
    weight store dies
    a learner rank dies, or    everything is stopped, and the next attempt goes on from the newest checkpoint
    stalls
    an error of ours           the run stops with it: starting again would meet it again
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster import launch
from cluster.grids import save_grid, side_by_side
from cluster.launch import Endpoint
from cluster.redis_server import RedisServer
from cluster.run_dir import RunDir
from learner.checkpoint import latest_checkpoint
from protocol.derived import MIN_REDIS_BYTES, in_flight_bytes, latent_shape, redis_bytes
from protocol.errors import RedisError, SfumatoError, TrainingError
from protocol.paths import model_source, read_prompts
from protocol.recipe import Recipe
from protocol.stream import Streams, connect
from protocol.tickets import TicketPlan

POLL_S = 0.5


@dataclass
class Status:
    """What the display shows: `phase` in words, and what Redis knows of the roles."""

    phase: str = "starting"
    attempt: int = 0
    restarts: int = 0
    queue: str = ""
    progress: dict[str, dict[str, Any]] = field(default_factory=dict)


Show = Callable[[Status], None]


class LearnerLostError(Exception):
    """The gang died or stalled: not an error of ours, so the next attempt may do better."""


class Driver:
    """One `sfumato train`."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, show: Show, *, debug: bool = False) -> None:
        self._recipe, self._run_dir, self._show, self._debug = recipe, run_dir, show, debug
        prompts = tuple(read_prompts(str(run_dir.prompts_file)))
        batch = recipe.batch
        self._plan = TicketPlan(recipe.seed, prompts, batch.num_groups, batch.group_size, recipe.lag)
        self._status = Status(attempt=run_dir.attempt)

    def run(self) -> None:
        """Runs attempts until the rounds are done. Raises the run's last error when restarts are used up."""
        with ExitStack() as stack:
            url = self._redis_url(stack)
            launch.connect_ray(self._recipe, debug=self._debug)
            stack.callback(ray.shutdown)
            launch.check_cluster(self._recipe)
            while True:
                try:
                    Attempt(self._recipe, self._run_dir, self._plan, url, self._status, self._show).run()
                    return
                except LearnerLostError as error:
                    self._count_restart(error)

    def _count_restart(self, error: LearnerLostError) -> None:
        if self._status.restarts >= self._recipe.supervision.max_restarts:
            raise TrainingError(
                f"the learner was lost {self._status.restarts + 1} times; the last error: {error}",
                do=f"look at the error, then go on with --resume --run-dir {self._run_dir.path}",
            ) from error
        self._status.restarts += 1
        self._status.attempt = self._run_dir.next_attempt()
        self._status.phase = f"restarting the learner ({error})"
        self._show(self._status)

    def _redis_url(self, stack: ExitStack) -> str:
        """Returns the URL of the recipe's server, checked, or that of an embedded one that lives as long as we."""
        redis, shape_CHW = self._recipe.redis, latent_shape(model_source(self._recipe.model.path))
        if redis.url is None:
            maxmemory = redis_bytes(self._recipe, shape_CHW) if shape_CHW else redis.maxmemory_bytes
            server = RedisServer(log_dir=self._run_dir.path, maxmemory_bytes=maxmemory)
            return stack.enter_context(server).url
        check_redis(self._recipe)
        return redis.url


def check_redis(recipe: Recipe) -> None:
    """Raises RedisError unless the recipe's own server answers and can hold what may be in flight."""
    if recipe.redis.url is None:
        return
    info: Any = connect(recipe.redis.url, timeout_s=recipe.redis.timeout_s).info("memory")
    shape_CHW = latent_shape(model_source(recipe.model.path))
    needed = in_flight_bytes(recipe, shape_CHW) + MIN_REDIS_BYTES // 4 if shape_CHW else 0
    if 0 < info["maxmemory"] < needed:
        raise RedisError(
            "the Redis server is too small for what may be in flight",
            value=f"maxmemory {info['maxmemory']}",
            expected=f"at least {needed} bytes: lag + 1 rounds and the server's own needs",
            do="raise its maxmemory, or lower lag, batch or sampler.num_steps",
        )


class Attempt:
    """One start of all roles, on Redis keys of its own."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, plan: TicketPlan, url: str, status: Status, show: Show) -> None:
        self._recipe, self._run_dir, self._plan = recipe, run_dir, plan
        self._status, self._show = status, show
        self._endpoint = Endpoint(url, run_dir.run_id, run_dir.attempt, recipe.num_shards, recipe.redis.timeout_s)
        self._streams: Streams = self._endpoint.open()
        self._rollouts: dict[str, Any] = {}
        self._runs: dict[Any, str] = {}
        self._actors: list[Any] = []
        self._group: Any = None
        self._learner_seen: dict[str, Any] = {}
        self._learner_moved_at = time.monotonic()

    def run(self) -> None:
        """Starts everything, watches until the learner is done, and stops everything."""
        self._streams.delete_older_attempts()
        self._streams.open()
        try:
            training = self._start()
            self._watch(training)
            self._stop_rollouts()
            self._draw_grid(self._recipe.rounds)
        finally:
            launch.stop_actors([*self._actors, *self._rollouts.values()], self._group)
            self._streams.delete_attempt()

    def _start(self) -> list[Any]:
        """Starts all roles at once, since each takes seconds to import; returns the ranks' training calls."""
        recipe = self._recipe
        self._tell("starting actors")
        self._store = launch.start_store(recipe)
        self._pools = launch.start_rewards(recipe)
        ranks, self._group = launch.start_learners(recipe)
        self._actors = [self._store, *ranks, *(actor for pool in self._pools for actor in pool.actors)]
        for number in range(recipe.rollouts):
            self._start_rollout(str(number))
        self._wait_until_built(self._join(ranks))
        if not (self._run_dir.path / "samples" / "round-000000.png").exists():
            self._draw_grid(0)
        for name in self._rollouts:
            self._run_rollout(name)
        self._tell("training")
        return [rank.train.remote() for rank in ranks]

    def _join(self, ranks: list[Any]) -> list[Any]:
        meeting = self._first(ranks[0].address.remote())
        return [
            actor.join.remote(
                rank, meeting, self._recipe, self._plan, str(self._run_dir.path), self._endpoint, self._store
            )
            for rank, actor in enumerate(ranks)
        ]

    def _wait_until_built(self, joined: list[Any]) -> None:
        """Also tries every reward once: one that cannot score is refused before anything is sampled."""
        shape_CHW = latent_shape(model_source(self._recipe.model.path))
        size = 8 * shape_CHW[1] if shape_CHW else 512
        probes = [actor.probe.remote(self._plan.prompts[:1], size) for pool in self._pools for actor in pool.actors]
        built = [actor.ready.remote() for actor in self._rollouts.values()]
        for ref in [*probes, *built, *joined]:
            self._first(ref)

    def _first(self, ref: Any) -> Any:
        """Waits for an answer during start-up, where any failure ends the run: it would only fail again."""
        try:
            return ray.get(ref, timeout=self._recipe.supervision.start_timeout_s)
        except RayError as error:
            raise start_error(error) from error

    def _start_rollout(self, name: str) -> None:
        self._rollouts[name] = launch.start_rollout(name, self._recipe, self._endpoint, self._store, self._pools)

    def _run_rollout(self, name: str) -> None:
        self._runs[self._rollouts[name].run.remote()] = name

    def _watch(self, training: list[Any]) -> None:
        """Returns when every rank is done. Raises an error of ours, or LearnerLostError."""
        waiting = list(training)
        while waiting:
            done, _ = ray.wait([*waiting, *self._runs], num_returns=1, timeout=POLL_S)
            for ref in done:
                if ref in self._runs:
                    self._restart_rollout(ref)
                else:
                    self._check_rank(ref)
                    waiting.remove(ref)
            self._look()

    def _check_rank(self, ref: Any) -> None:
        try:
            ray.get(ref)
        except RayError as error:
            raise own_error(error) or LearnerLostError(first_line(error)) from error

    def _restart_rollout(self, ref: Any) -> None:
        name = self._runs.pop(ref)
        try:
            ray.get(ref)
            return
        except RayError as error:
            if ours := own_error(error):
                raise ours from error
            lost = error
        if self._status.restarts >= self._recipe.supervision.max_restarts * self._recipe.rollouts:
            raise TrainingError(f"rollout actor {name} was lost too often; the last error: {first_line(lost)}")
        self._status.restarts += 1
        self._start_rollout(name)
        self._run_rollout(name)

    def _look(self) -> None:
        """Reads what the roles say of themselves, shows it, and notices a learner that stands still."""
        try:
            self._status.progress = self._streams.progress()
            depth = self._streams.queue_depth()
        except RedisError:
            return
        self._status.queue = f"{depth.waiting} waiting, {depth.claimed} claimed"
        self._show(self._status)
        learner = {role: said for role, said in self._status.progress.items() if role.startswith("learner/")}
        if learner != self._learner_seen:
            self._learner_seen, self._learner_moved_at = learner, time.monotonic()
        stalled_s = time.monotonic() - self._learner_moved_at
        if stalled_s > self._recipe.supervision.stall_timeout_s:
            raise LearnerLostError(f"no progress for {stalled_s:.0f} s")

    def _stop_rollouts(self) -> None:
        """Lets workers finish what is in hand, so that one of them is free to draw."""
        self._tell("finishing")
        ray.get([actor.stop.remote() for actor in self._rollouts.values()])
        ray.wait(list(self._runs), num_returns=len(self._runs), timeout=30.0)

    def _draw_grid(self, round_: int) -> None:
        """Samples the same prompts and seeds before and after, for people to look at."""
        prompts_file = self._recipe.prompts.held_out or str(self._run_dir.prompts_file)
        found = latest_checkpoint(self._run_dir.path)
        data = found.version_bytes(round_) if round_ and found else None
        wanted = self._recipe.evaluation.grid_prompts
        prompts = read_prompts(prompts_file)
        prompts = prompts[:: max(1, len(prompts) // wanted)][:wanted]
        self._tell("drawing samples")
        rows = self._first(next(iter(self._rollouts.values())).draw_grid.remote(prompts, data))
        samples = self._run_dir.path / "samples"
        before, now = samples / "round-000000.png", samples / f"round-{round_:06d}.png"
        save_grid(rows, now)
        if now != before:
            side_by_side(before, now, samples / "before_after.png")

    def _tell(self, phase: str) -> None:
        self._status.phase = phase
        self._show(self._status)


def own_error(error: RayError) -> SfumatoError | None:
    """Returns the error of ours that a remote call ended with, if it did."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, SfumatoError) else None


def start_error(error: RayError) -> SfumatoError:
    """Returns what a failed start-up means to a person."""
    return own_error(error) or TrainingError(
        f"a process of the run could not start: {first_line(error)}",
        do="run again with --debug for the whole story; raise supervision.start_timeout_s if it is only slow",
    )


def first_line(error: BaseException) -> str:
    """Returns an error's essence: Ray's messages hold whole remote tracebacks."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).strip().splitlines() if line.strip()] or [""]
    return f"{type(cause).__name__}: {lines[-1] if isinstance(error, RayTaskError) else lines[0]}"


def default_run_dir(recipe_path: Path) -> Path:
    """Returns runs/<recipe>-<time> in the working directory."""
    return Path("runs") / f"{recipe_path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
