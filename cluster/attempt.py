"""One attempt of a run: all roles started, watched until the learner is done, and stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster import launch
from cluster.grids import save_grid, side_by_side
from cluster.launch import Endpoint
from cluster.run_dir import RunDir
from learner.checkpoint import latest_checkpoint
from protocol.derived import image_size
from protocol.errors import RedisError, SfumatoError, TrainingError
from protocol.paths import model_source, read_prompts
from protocol.recipe import Recipe
from protocol.stream import Streams
from protocol.tickets import TicketPlan

POLL_S = 0.5
USUAL_IMAGE_SIZE = 512
"""Of images that try a reward, where the model is not on disk yet."""


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

    def run(self, revive_redis: Callable[[], None]) -> None:
        """Starts everything, watches until the learner is done, and stops everything."""
        self._streams.delete_older_attempts()
        self._streams.open()
        try:
            training = self._start()
            self._watch(training, revive_redis)
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
        self._runs = {actor.run.remote(): name for name, actor in self._rollouts.items()}
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
        size = image_size(model_source(self._recipe.model.path)) or USUAL_IMAGE_SIZE
        probes = [actor.probe.remote(self._plan.prompts[:1], size) for pool in self._pools for actor in pool.actors]
        built = [actor.build.remote() for actor in self._rollouts.values()]
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

    def _watch(self, training: list[Any], revive_redis: Callable[[], None]) -> None:
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
            revive_redis()
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
        self._runs[self._rollouts[name].build_and_run.remote()] = name

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
    reason_is_last = isinstance(error, RayTaskError) or "creation task" in lines[0]
    return f"{type(cause).__name__}: {lines[-1 if reason_is_last else 0].strip()}"
