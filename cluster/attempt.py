"""One attempt of a run: all roles started, watched until the learner is done, and stopped."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster import launch
from cluster.crew import Crew
from cluster.grids import save_grid, side_by_side
from cluster.metrics import Metrics
from cluster.nodes import Strategy, strategies
from cluster.processes import Endpoint, colocated_name
from cluster.pulse import Pulse, Services
from cluster.redis_server import RedisKeeper
from cluster.reward_pools import Pools
from cluster.run_dir import RunDir, follower_dir
from cluster.scaling import Scaling
from cluster.scoring import RewardPool, explain
from cluster.sources import held_out_prompts
from cluster.versions import own_versions
from learner.checkpoint import drop_newer, latest_checkpoint, newest_common
from learner.company import Company, role_name, role_of
from protocol.derived import facts_of
from protocol.errors import RedisError, SfumatoError, TrainingError
from protocol.log import LOG
from protocol.paths import spread
from protocol.recipe import Recipe
from protocol.roles import Reward
from protocol.stream import QueueDepth, Streams
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
    scaling: str = ""
    progress: dict[str, dict[str, Any]] = field(default_factory=dict)


Show = Callable[[Status], None]


@dataclass(frozen=True)
class Gang:
    """One learner's ranks: its name, None for the first, its own recipe, and where its files are."""

    name: str | None
    recipe: Recipe
    run_dir: Path


class LearnerLostError(Exception):
    """The gang died or stalled: not an error of ours, so the next attempt may do better."""


class Attempt:
    """One start of all roles, on Redis keys of its own."""

    def __init__(
        self,
        recipe: Recipe,
        run_dir: RunDir,
        plan: TicketPlan,
        url: str,
        environments: Mapping[str, Mapping[str, Any]],
        status: Status,
        show: Show,
    ) -> None:
        """`environments` are those of rewards, by label, as Ray is told of them."""
        self._environments = environments
        self._recipe, self._run_dir, self._plan = recipe, run_dir, plan
        self._status, self._show = status, show
        self._endpoint = Endpoint(
            url, run_dir.run_id, run_dir.attempt, recipe.num_shards, recipe.redis.timeout_s, own_versions()
        )
        self._streams: Streams = self._endpoint.open()
        self._crew = Crew(self._start_rollout)
        self._num_lost: Counter[str] = Counter()
        self._services = Services({})
        self._pools = Pools(
            self._services,
            start=lambda reward: launch.start_reward(reward, environments),
            probe=lambda actor: actor.probe.remote(*self._probe),
            tell=self._tell_pools,
        )
        self._actors: list[Any] = []
        self._colocated: dict[str, Any] = {}
        self._groups: list[Any] = []
        self._pulse = Pulse()
        self._metrics = Metrics(run_dir.run_id, {role_name(gang.name): gang.run_dir for gang in self._gangs()})

    def run(self, redis: RedisKeeper) -> None:
        """Starts everything, watches until the learner is done, and stops everything."""
        self._streams.delete_older_attempts()
        self._streams.open()
        try:
            training = self._start()
            try:
                self._watch(training, redis)
            except KeyboardInterrupt:
                self._stop_learners(training, "asked to stop")
                raise
            self._tell("finishing")
            self._draw_grid(self._recipe.rounds, self._crew.stop() or list(self._colocated.values()))
        finally:
            launch.stop_actors([*self._actors, *self._pools.actors, *self._crew.actors], self._groups)
            with suppress(RedisError):  # Left behind, the keys are deleted by the next attempt.
                self._streams.delete_attempt()

    def _start(self) -> list[Any]:
        """Starts all roles at once, since each takes seconds to import; returns the ranks' training calls."""
        recipe = self._recipe
        self._tell("starting actors")
        self._store = launch.start_store(recipe)
        self._services.add("weight store", self._store)
        # Before the rewards, one of which might take a place that only a rank can use.
        gangs = [self._hire(gang, strategy) for gang, strategy in zip(self._gangs(), strategies(recipe), strict=True)]
        self._pools.open(launch.start_rewards(recipe, self._environments))
        ranks = [rank for _, gang in gangs for rank in gang]
        self._ranks = [role_of(gang.name, number) for gang, ranks_ in gangs for number in range(len(ranks_))]
        self._actors = [self._store, *ranks]
        if recipe.is_colocated:
            self._colocated = {f"rollout/{colocated_name(rank)}": actor for rank, actor in enumerate(gangs[0][1])}
        built = self._crew.hire(recipe.rollouts.min)
        resume_round = self._resume_round()
        joined = [ref for gang, own in gangs for ref in self._join(gang, own, resume_round)]
        self._wait_until_built([*built, *joined])
        if not (self._run_dir.path / "samples" / "round-000000.png").exists():
            self._draw_grid(0, self._crew.actors or list(self._colocated.values()))
        self._crew.run()
        self._scaling = Scaling(recipe, self._run_dir.path, self._ranks[0], self._crew, self._pools)
        self._tell("training")
        return [rank.train.remote() for rank in ranks]

    def _gangs(self) -> list[Gang]:
        recipe, path = self._recipe, self._run_dir.path
        followers = [
            Gang(follower.name, recipe.of_follower(follower.name), follower_dir(path, follower.name))
            for follower in recipe.followers
        ]
        return [Gang(None, recipe, path), *followers]

    def _hire(self, gang: Gang, strategy: Strategy) -> tuple[Gang, list[Any]]:
        learner = gang.recipe.learner
        if learner.world_size > 1:
            where = "on one node" if strategy == "STRICT_PACK" else "on several nodes: none has room for all"
            self._tell(f"placing the {learner.world_size} ranks of {role_of(gang.name, 0).rpartition('/')[0]} {where}")
        ranks, group = launch.start_learners(learner, strategy, self._recipe.supervision.start_timeout_s)
        self._groups.append(group)
        return gang, ranks

    def _resume_round(self) -> int:
        """Returns the newest round that all learners can go on from, having deleted what is newer."""
        folders = [gang.run_dir for gang in self._gangs()]
        round_ = newest_common(folders)
        for folder in folders:
            drop_newer(folder, round_)
        return round_

    def _join(self, gang: Gang, ranks: list[Any], resume_round: int) -> list[Any]:
        meeting = self._first(ranks[0].address.remote())
        company = Company(gang.name, {f.name: f.learner.world_size for f in self._recipe.followers})
        return [
            actor.join.remote(
                rank,
                meeting,
                gang.recipe,
                self._plan,
                str(gang.run_dir),
                self._endpoint,
                self._store,
                company,
                resume_round,
                self._pools.now,
            )
            for rank, actor in enumerate(ranks)
        ]

    def _wait_until_built(self, refs: list[Any]) -> None:
        """Also tries every reward once: one that cannot score is refused before anything is sampled."""
        prompts, size = self._probe
        versions = self._endpoint.versions
        checks = [actor.refuse_others.remote(versions) for pool in self._pools.now for actor in pool.actors]
        probes = {
            actor.probe.remote(prompts, size): (pool.settings, actor)
            for pool in self._pools.now
            for actor in pool.actors
        }
        for ref in [*checks, *refs]:
            self._first(ref)
        for ref, (reward, actor) in probes.items():
            self._try(reward, functools.partial(actor.probe.remote, prompts, size), ref, prompts)

    @property
    def _probe(self) -> tuple[Sequence[str], int]:
        """What a reward actor scores first: prompts, and the size of images."""
        facts = facts_of(self._recipe)
        return self._plan.sources[0].prompts[:1], facts.image_side if facts else USUAL_IMAGE_SIZE

    def _try(self, reward: Reward, probe: Callable[[], Any], ref: Any, prompts: Sequence[str]) -> None:
        """Waits until a reward actor has scored; tells of one that takes long, and of an optional one that fails."""
        for attempt in range(1, reward.max_attempts + 1):
            try:
                for waited_s in count(step=10):
                    if ray.wait([ref], timeout=10)[0]:
                        break
                    self._tell(f"starting the reward {reward.label}: {waited_s + 10} s")
                ray.get(ref)
                return
            except RayError as error:
                told = explain(reward, prompts[0] if prompts else "", error)
                if attempt == reward.max_attempts and reward.required:
                    raise told from error
                ref = probe()
        self._tell(f"the optional reward {reward.label} does not work yet: {told}")

    def _first(self, ref: Any) -> Any:
        """Waits for an answer during start-up, where any failure ends the run: it would only fail again."""
        try:
            return ray.get(ref, timeout=self._recipe.supervision.start_timeout_s)
        except RayError as error:
            raise start_error(error) from error

    def _start_rollout(self, name: str) -> Any:
        pools = self._pools.now
        return launch.start_rollout(name, self._recipe, self._run_dir.path, self._endpoint, self._store, pools)

    def _tell_pools(self, pools: Sequence[RewardPool]) -> None:
        self._crew.tell(pools)
        for actor in self._colocated.values():
            actor.use_pools.remote(pools)

    def _watch(self, training: list[Any], redis: RedisKeeper) -> None:
        """Returns when every rank is done. Raises an error of ours, or LearnerLostError."""
        waiting = list(training)
        while waiting:
            done, _ = ray.wait([*waiting, *self._crew.runs], num_returns=1, timeout=POLL_S)
            for ref in done:
                if ref in waiting:
                    waiting.remove(ref)
                    self._check_rank(ref, waiting)
                else:
                    self._check_rollout(ref, waiting)
            if redis.keep_alive(self._recipe.supervision.answer_timeout_s):
                self._look()
            else:
                # What roles say comes through Redis: while it is away, nobody can be judged.
                self._pulse.forgive_all()
            self._scaling.turn()
            self._status.scaling = self._scaling.told

    def _check_rank(self, ref: Any, others: list[Any]) -> None:
        try:
            ray.get(ref)
        except RayError as error:
            with suppress(RedisError):
                # By a rank that cannot sample, so that all save what they learnt.
                if others and self._streams.is_stop_asked():
                    self._stop_learners(others, first_line(error))
            raise own_error(error) or LearnerLostError(first_line(error)) from error

    def _check_rollout(self, ref: Any, training: list[Any]) -> None:
        name, lost = self._crew.ended(ref)
        if lost is None:
            return
        if ours := own_error(lost):
            self._stop_learners(training, str(ours).splitlines()[0])
            raise ours from lost
        has_delivered = self._status.progress.get(f"rollout/{name}", {}).get("groups", 0) > 0
        self._num_lost[name] = 1 if has_delivered else self._num_lost[name] + 1
        if self._num_lost[name] > self._recipe.supervision.max_restarts:
            raise TrainingError(
                f"rollout actor {name} was lost {self._num_lost[name]} times in a row; the last error: "
                f"{first_line(lost)}"
            )
        ticket = self._status.progress.get(f"rollout/{name}", {}).get("ticket")
        LOG.warning(f"lost: {first_line(lost)}", extra={"role": f"rollout/{name}", "ticket": ticket})
        self._status.restarts += 1
        self._pulse.forgive(f"rollout/{name}")
        with suppress(RedisError):  # The new one has not delivered what the old one has.
            self._streams.report_progress(f"rollout/{name}", groups=0, busy_s=0.0, alive_s=0.0, ticket=None)
        self._crew.replace(name)

    def _stop_learners(self, training: list[Any], reason: str) -> None:
        """Lets the learners save what they have learnt, before a run ends that cannot or is not to go on."""
        self._tell(f"saving a checkpoint before stopping: {reason}")
        with suppress(RedisError):  # Then the newest checkpoint must do.
            self._streams.ask_to_stop()
            ray.wait(training, num_returns=len(training), timeout=self._recipe.supervision.stall_timeout_s)

    def _look(self) -> None:
        """Reads what the roles say of themselves, shows it, and restarts whoever stands still."""
        bounds = self._recipe.supervision
        try:
            said, depth = self._streams.progress(), self._streams.queue_depth()
        except RedisError:
            self._pulse.forgive_all()
            return
        self._pulse.hear(said)
        rollouts = {f"rollout/{name}": name for name in self._crew.names}
        waiting = set(rollouts.values()) - set(self._crew.placed)
        for name in waiting:  # For a node, for as long as that takes.
            self._pulse.forgive(f"rollout/{name}")
        services = self._services.words()
        with suppress(RedisError):  # For the metrics only.
            for role, words in services.items():
                self._streams.report_progress(role, **words)
        here = {*self._ranks, *self._colocated, *rollouts}
        shown = {role: words for role, words in said.items() if role in here}
        self._status.progress = {**shown, **services}
        self._scaling.look(said, depth)
        self._status.queue = f"{depth.waiting} waiting, {depth.claimed} claimed"
        self._show(self._status)
        self._tell_metrics(depth)
        at_work = [role for role in self._ranks if said.get(role, {}).get("state") != "done"]
        for role in self._pulse.still(at_work, bounds.stall_timeout_s):
            raise LearnerLostError(f"{role} made no progress for {self._pulse.silent_s(role):.0f} s")
        for role in self._pulse.still(rollouts, bounds.stall_timeout_s):
            self._pulse.forgive(role)
            self._crew.kill(rollouts[role])
        self._look_after_services(bounds.answer_timeout_s)

    def _tell_metrics(self, depth: QueueDepth) -> None:
        if self._metrics.is_due():
            with suppress(RedisError):  # Told the next time.
                num_groups = self._streams.num_groups()
                self._metrics.tell(self._status.progress, depth, num_groups, self._status.restarts)

    def _look_after_services(self, answer_timeout_s: float) -> None:
        answers = self._services.answers()
        self._pulse.hear(answers)
        still = self._pulse.still(answers, answer_timeout_s)
        self._services.restart(still)
        for name in still:
            LOG.warning(f"gave no answer for {answer_timeout_s:g} s", extra={"role": name})
            self._pulse.forgive(name)
        self._status.restarts += len(still)

    def _draw_grid(self, round_: int, rollouts: Sequence[Any]) -> None:
        """Samples the same prompts and seeds before and after, for people to look at; with one of these actors."""
        if not rollouts:
            self._tell("no rollout actor is there to draw samples")
            return
        found = latest_checkpoint(self._run_dir.path)
        data = found.result_bytes() if round_ and found else None
        wanted = self._recipe.evaluation.grid_prompts
        prompts = spread(held_out_prompts(self._recipe, self._run_dir.path) or self._plan.sources[0].prompts, wanted)
        self._tell("drawing samples")
        rows = self._first(rollouts[0].draw_grid.remote(prompts, data))
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
