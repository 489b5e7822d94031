"""Launching: plain classes become Ray actors, placed as the recipe says."""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.nodes import demand, roles
from cluster.pulse import HEALTH
from cluster.scoring import Answer, MakingWayError, OutOfTimeError, RewardPool, Scorer
from cluster.weight_store import StoreClient, WeightStore
from learner.company import Company
from protocol.errors import RedisError, RewardError
from protocol.recipe import Recipe
from protocol.roles import Learner, Placement, Reward
from protocol.scores import plain_total
from protocol.stream import Streams, connect
from protocol.tickets import Ticket, TicketPlan

ROLE_RESTARTS = 10
"""How often Ray restarts a weight store: it holds nothing that cannot be had again."""

BUILD_TIMEOUT_S = 3600.0
"""How long a reward may take to be built: its first time on a machine may download gigabytes."""

MORE_ROLLOUTS = 16
"""How many rollout actors a laptop's run may be scaled up by."""

FETCH_EVERY_S = 0.2


@dataclass(frozen=True)
class Endpoint:
    """What a process needs to join an attempt's streams."""

    url: str
    run_id: str
    attempt: int
    num_shards: int
    timeout_s: float

    def open(self) -> Streams:
        """Connects. Raises RedisError."""
        client = connect(self.url, timeout_s=self.timeout_s)
        return Streams(client, run_id=self.run_id, attempt=self.attempt, num_shards=self.num_shards)


class RolloutProcess:
    """A rollout worker in a process of its own. `run` and `stop` are called concurrently.

    The constructor builds nothing: an error of ours raised there would reach the driver as a dead actor's.
    """

    def __init__(
        self, name: str, recipe: Recipe, run_dir: str, endpoint: Endpoint, store: Any, pools: Sequence[RewardPool]
    ) -> None:
        self._name, self._recipe, self._run_dir, self._endpoint = name, recipe, Path(run_dir), endpoint
        self._store, self._scorer = StoreClient(store), Scorer(pools, self._run_dir)
        self._stopping = threading.Event()

    def build(self) -> None:
        """Loads the model and connects."""
        import torch

        from actors.makers import GroupMaker
        from actors.real import open_real_images
        from actors.rollout import Rollout
        from actors.rollout_worker import RolloutWorker
        from diffusion.chain import Chain
        from diffusion.policy import Policy

        torch.set_num_threads(self._recipe.rollout_worker.threads)
        self._policy = Policy.from_recipe(self._recipe, device_of(self._recipe.rollout_worker))
        self._chain = Chain(self._policy, self._recipe.sampler)
        maker = GroupMaker(self._chain, self._recipe, open_real_images(self._recipe, self._run_dir, self._policy))
        rollout = Rollout(self._chain, maker, self._fetch, self._scorer, self._name)
        self._worker = RolloutWorker(self._name, rollout, self._endpoint.open(), self._recipe)

    def build_and_run(self) -> None:
        """What a replacement does."""
        self.build()
        self.run()

    def run(self) -> None:
        """Answers tickets until `stop`."""
        self._worker.run(self._stopping.is_set)

    def stop(self) -> None:
        """Lets `run` return after the ticket in hand."""
        self._stopping.set()

    def draw_grid(self, prompts: Sequence[str], data: bytes | None) -> list[tuple[str, Any, Any]]:
        """Returns (prompt, images, rewards) at the evaluation's fixed seeds, with weights or with the base's."""
        from actors.evaluator import draw_images
        from diffusion.weights import unpack

        if data is not None:
            self._policy.load_trainable_state(unpack(data))
        rows = []
        for prompt in prompts:
            images = draw_images(self._chain, prompt, self._recipe.evaluation.grid_images, self._recipe.evaluation.seed)
            rows.append((prompt, images, self._reward_of(images, prompt)))
        return rows

    def _reward_of(self, images: Any, prompt: str) -> Any:
        """Returns the weighted sum (N,) of scores as they are, or None where a reward gave none."""
        try:
            parts = self._scorer(images, prompt, "grid").result()
        except RewardError:  # Pictures are to look at; where scoring fails for good, the run will say so.
            return None
        rewards = self._recipe.rewards
        return plain_total(parts, rewards) if rewards and all(reward.label in parts for reward in rewards) else None

    def _fetch(self, ticket: Ticket) -> bytes:
        """Waits until the store has the ticket's weights: a restarted store is filled again by the learner."""
        while (data := self._store.fetch(ticket.weights_digest)) is None:
            if self._stopping.wait(FETCH_EVERY_S):
                raise RedisError(f"the run ends before version {ticket.version} came")
        return data


class LearnerProcess:
    """One learner rank in a process of its own."""

    def address(self) -> tuple[str, int]:
        """Returns this node's address and a free port, for the gang to meet at rank 0."""
        with closing(socket.socket()) as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def join(
        self,
        rank: int,
        meeting: tuple[str, int],
        recipe: Recipe,
        plan: TicketPlan,
        run_dir: str,
        endpoint: Endpoint,
        store: Any,
        company: Company,
        resume_round: int,
    ) -> None:
        """Builds the rank; returns when the whole gang is built."""
        address, port = meeting
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(recipe.learner.world_size))
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        import torch

        from learner.train import LearnerRank

        device = torch.device(device_of(recipe.learner))
        self._rank = LearnerRank(
            recipe, plan, Path(run_dir), endpoint.open(), StoreClient(store), device, company, resume_round
        )

    def train(self) -> None:
        """Runs the rounds that are left."""
        self._rank.train()


class RewardProcess:
    """A reward actor in a process of its own. It builds its reward when it is first asked, also after a restart."""

    def __init__(self, settings: Reward) -> None:
        self._settings, self._is_hung = settings, False
        self._busy_s, self._started_at = 0.0, time.monotonic()
        # One thread for all scores: some models are bound to the thread that built them.
        self._thread = ThreadPoolExecutor(1)

    def probe(self, prompts: Sequence[str], size: int) -> None:
        """Scores generated images, so that a reward that cannot work is refused before a run starts."""
        from rewards.contract import probe_images

        for prompt in prompts:
            self.score(probe_images(2, size), prompt, 1)

    def score(self, images: Any, prompt: str, num_states: int) -> Answer:
        """Returns (N,) fp32 scores. Raises OutOfTimeError, and then makes way for a new process; what was waiting here
        is told so."""
        if self._is_hung:
            raise MakingWayError
        actor = self._in_time(lambda: self._actor, BUILD_TIMEOUT_S)
        started = time.monotonic()
        scores = self._in_time(lambda: actor.score(images, prompt, num_states), self._settings.timeout_s)
        self._busy_s += time.monotonic() - started
        # A list, since arrays of another numpy than the driver's cross with warnings.
        return Answer(scores.tolist(), actor.is_pure)

    @ray.method(concurrency_group=HEALTH)
    def ping(self) -> dict[str, float]:
        """Answers also while a score is computed: how long it has been busy, of how long it has lived."""
        if self._is_hung:
            raise MakingWayError
        return {"busy_s": self._busy_s, "alive_s": time.monotonic() - self._started_at}

    def _in_time(self, work: Callable[[], Any], timeout_s: float) -> Any:
        working = self._thread.submit(work)
        wait([working], timeout=timeout_s)
        if not working.done():
            self._is_hung = True
            # Late enough for errors to arrive.
            threading.Timer(1.0, os._exit, (1,)).start()
            raise OutOfTimeError
        return working.result()

    @functools.cached_property
    def _actor(self) -> Any:
        from actors.reward_actor import RewardActor
        from rewards.contract import check_scores
        from rewards.loading import build

        settings = self._settings
        return RewardActor(settings.label, build(settings.name, settings.kwargs, device_of(settings)), check_scores)


def connect_ray(recipe: Recipe, *, debug: bool) -> None:
    """Joins the cluster that RAY_ADDRESS names (as in `ray job submit`), or starts a local Ray of our own."""
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address} if address else local_options(recipe)
    ray.init(
        **options,
        log_to_driver=debug,
        logging_level="INFO" if debug else "ERROR",
        runtime_env={"worker_process_setup_hook": "sfumato.set_up_ray_worker"},
    )


def local_options(recipe: Recipe) -> dict[str, Any]:
    """A laptop's Ray has as many CPUs as the roles ask for: they share what cores there are."""
    wanted = sum(placement.num_cpus * count for placement, count in roles(recipe))
    wanted += MORE_ROLLOUTS * recipe.rollout_worker.num_cpus
    return {"address": "local", "num_cpus": max(int(wanted + 1), os.cpu_count() or 1), "include_dashboard": False}


def device_of(placement: Placement) -> str:
    """Ray shows a process only its own GPUs, so the first visible one is its."""
    return "cuda" if placement.num_gpus > 0 else "cpu"


def start_store(recipe: Recipe) -> Any:
    """Starts the weight store beside the driver, on the one node that no run can do without. It holds one version more
    than may be asked for, since the next comes before it is due."""
    remote = ray.remote(concurrency_groups={HEALTH: 1})(WeightStore)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {"num_cpus": 0, "max_restarts": ROLE_RESTARTS, "max_task_retries": -1, "scheduling_strategy": here}
    return remote.options(**options).remote(recipe.lag + 2)


def start_rewards(recipe: Recipe, environments: Mapping[str, Mapping[str, Any]]) -> list[RewardPool]:
    """Starts every reward's pool, each in its environment, by label; those without one run in the main one."""
    return [start_pool(reward, environments, held_out=reward not in recipe.rewards) for reward in recipe.scored_rewards]


def start_pool(reward: Reward, environments: Mapping[str, Mapping[str, Any]], *, held_out: bool = False) -> RewardPool:
    """Starts one reward's actors."""
    options = _options(reward)
    options["runtime_env"] = {**options["runtime_env"], **environments.get(reward.label, {})}
    # Restarted without end: what kills a reward fails its tickets, by max_attempts.
    remote = ray.remote(concurrency_groups={HEALTH: 1})(RewardProcess).options(**options, max_restarts=-1)
    return RewardPool(reward, tuple(remote.remote(reward) for _ in range(reward.replicas)), held_out)


def start_rollout(
    name: str, recipe: Recipe, run_dir: Path, endpoint: Endpoint, store: Any, pools: Sequence[RewardPool]
) -> Any:
    """Starts one rollout actor."""
    options = _options(recipe.rollout_worker)
    remote = ray.remote(RolloutProcess).options(**options, max_concurrency=2)
    return remote.remote(name, recipe, str(run_dir), endpoint, store, pools)


def start_learners(learner: Learner) -> tuple[list[Any], PlacementGroup]:
    """Starts a gang's processes in a placement group, packed onto as few nodes as will hold them."""
    group = placement_group([demand(learner)] * learner.world_size, strategy="PACK")
    remote = ray.remote(LearnerProcess)
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
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(placement.threads), **env_vars}},
    }
