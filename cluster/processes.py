"""What runs inside Ray actors: the processes of rollouts, learner ranks and rewards."""

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
from typing import TYPE_CHECKING, Any

import psutil
import ray

from cluster.pulse import HEALTH
from cluster.scoring import Answer, MakingWayError, OutOfTimeError, RewardPool, Scorer
from cluster.versions import OF_REWARDS, own_versions, refuse_others
from cluster.weight_store import StoreClient
from learner.company import Company
from protocol import log
from protocol.errors import RedisError, RewardError
from protocol.recipe import Recipe
from protocol.roles import Placement, Reward
from protocol.scores import plain_total
from protocol.stream import Streams, connect
from protocol.tickets import Ticket, TicketPlan

if TYPE_CHECKING:  # Before a process has its settings it must not import torch.
    from actors.rollout_worker import RolloutWorker
    from diffusion.chain import Chain

BUILD_TIMEOUT_S = 3600.0
"""How long a reward may take to be built: its first time on a machine may download gigabytes."""

FETCH_EVERY_S = 0.2


@dataclass(frozen=True)
class Endpoint:
    """What a process needs to join an attempt's streams, and the versions that it must run to do so."""

    url: str
    run_id: str
    attempt: int
    num_shards: int
    timeout_s: float
    versions: Mapping[str, str]

    def refuse_others(self, who: str) -> None:
        """Raises TrainingError where this process runs other versions than the driver."""
        refuse_others(f"{who} on node {ray.util.get_node_ip_address()}", own_versions(), self.versions)

    def open(self) -> Streams:
        """Connects. Raises RedisError."""
        client = connect(self.url, timeout_s=self.timeout_s)
        return Streams(client, run_id=self.run_id, attempt=self.attempt, num_shards=self.num_shards)


class Sampling:
    """What a process that samples has besides its chain: it answers tickets, and draws sample grids."""

    def __init__(
        self, name: str, recipe: Recipe, run_dir: Path, endpoint: Endpoint, pools: Sequence[RewardPool]
    ) -> None:
        self._name, self._recipe, self._run_dir, self._endpoint = name, recipe, run_dir, endpoint
        self._scorer = Scorer(pools, run_dir)
        self.use = self._scorer.use

    def make_worker(
        self, chain: Chain, fetch: Callable[[Ticket], bytes], after_step: Callable[[], None] = lambda: None
    ) -> RolloutWorker:
        """Connects, and returns what answers tickets with a chain."""
        from actors.makers import GroupMaker
        from actors.real import open_real_images
        from actors.rollout import Rollout
        from actors.rollout_worker import RolloutWorker

        log.set_up(self._endpoint.run_id, f"rollout/{self._name}")
        self._chain = chain
        maker = GroupMaker(chain, self._recipe, open_real_images(self._recipe, self._run_dir, chain.policy))
        rollout = Rollout(chain, maker, fetch, self._scorer, self._name)
        streams = self._endpoint.open()
        return RolloutWorker(self._name, rollout, streams, self._recipe, lambda: self._scorer.num_replicas, after_step)

    def draw_grid(self, prompts: Sequence[str], data: bytes | None) -> list[tuple[str, Any, Any]]:
        """Returns (prompt, images, rewards) at the evaluation's fixed seeds, with weights or with the base's."""
        from actors.evaluator import draw_images
        from diffusion.weights import unpack

        if data is not None:
            self._chain.policy.load_trainable_state(unpack(data))
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


class RolloutProcess:
    """A rollout worker in a process of its own. `run` and `stop` are called concurrently.

    The constructor builds nothing: an error of ours raised there would reach the driver as a dead actor's.
    """

    def __init__(
        self, name: str, recipe: Recipe, run_dir: str, endpoint: Endpoint, store: Any, pools: Sequence[RewardPool]
    ) -> None:
        self._name, self._recipe, self._endpoint, self._store = name, recipe, endpoint, StoreClient(store)
        self._sampling = Sampling(name, recipe, Path(run_dir), endpoint, pools)
        self._stopping = threading.Event()

    def use_pools(self, pools: Sequence[RewardPool]) -> None:
        """From now on asks these reward actors."""
        self._sampling.use(pools)

    def build(self) -> None:
        """Loads the model and connects."""
        self._endpoint.refuse_others(f"the rollout actor {self._name}")
        import torch

        from diffusion.chain import Chain
        from diffusion.policy import Policy

        torch.set_num_threads(self._recipe.rollout_worker.threads)
        policy = Policy.from_recipe(self._recipe, device_of(self._recipe.rollout_worker))
        self._worker = self._sampling.make_worker(Chain(policy, self._recipe.sampler), self._fetch)

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
        """See Sampling."""
        return self._sampling.draw_grid(prompts, data)

    def _fetch(self, ticket: Ticket) -> bytes:
        """Waits until the store has the ticket's weights: a restarted store is filled again by the learner."""
        while (data := self._store.fetch(ticket.weights_digest)) is None:
            if self._stopping.wait(FETCH_EVERY_S):
                raise RedisError(f"the run ends before version {ticket.version} came")
        return data


class LearnerProcess:
    """One learner rank in a process of its own. Where it samples too, `use_pools` is called while it trains."""

    def __init__(self) -> None:
        self._sampling: Sampling | None = None

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
        pools: Sequence[RewardPool],
    ) -> None:
        """Builds the rank; returns when the whole gang is built. `pools` is what it asks where it samples too."""
        endpoint.refuse_others(f"the learner rank {rank}")
        address, port = meeting
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(recipe.learner.world_size))
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
        _choose_interface()
        import torch

        from learner.train import LearnerRank

        if recipe.is_colocated and company.name is None:
            self._sampling = Sampling(colocated_name(rank), recipe, Path(run_dir), endpoint, pools)
        device = torch.device(device_of(recipe.learner))
        make_worker = self._sampling.make_worker if self._sampling else None
        self._rank = LearnerRank(
            recipe, plan, Path(run_dir), endpoint.open(), StoreClient(store), device, company, resume_round, make_worker
        )

    def train(self) -> None:
        """Runs the rounds that are left."""
        self._rank.train()

    @ray.method(concurrency_group=HEALTH)
    def use_pools(self, pools: Sequence[RewardPool]) -> None:
        """From now on asks these reward actors, if it samples."""
        if self._sampling:
            self._sampling.use(pools)

    def draw_grid(self, prompts: Sequence[str], data: bytes | None) -> list[tuple[str, Any, Any]]:
        """See Sampling; before or after training, by a rank that samples."""
        assert self._sampling is not None, "this rank does not sample"
        return self._sampling.draw_grid(prompts, data)


def _choose_interface() -> None:
    """Has gloo use the interface by which other nodes reach this one. By itself it takes that to which the machine's
    name resolves, often loopback. NCCL never takes that, and is left alone."""
    own = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class RewardProcess:
    """A reward actor in a process of its own. It builds its reward when it is first asked, also after a restart."""

    def __init__(self, settings: Reward) -> None:
        self._settings, self._is_hung = settings, False
        self._busy_s, self._started_at = 0.0, time.monotonic()
        # One thread for all scores: some models are bound to the thread that built them.
        self._thread = ThreadPoolExecutor(1)

    def refuse_others(self, versions: Mapping[str, str]) -> None:
        """Raises TrainingError where this process runs other versions than the driver of what rewards share."""
        who = f"the reward {self._settings.label} on node {ray.util.get_node_ip_address()}"
        refuse_others(who, own_versions(), versions, OF_REWARDS)

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


def colocated_name(rank: int) -> str:
    """Returns the rollout name of a learner rank that samples too."""
    return f"learner-{rank}"


def device_of(placement: Placement) -> str:
    """Ray shows a process only its own GPUs, so the first visible one is its."""
    return "cuda" if placement.num_gpus > 0 else "cpu"
