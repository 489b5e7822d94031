"""Rewards of a command that scores by itself: built in this process, those with an environment of their own in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import ray
from ray.exceptions import RayError

from actors.reward_actor import RewardActor
from cluster import launch
from cluster.device import own_device
from cluster.environments import prepare
from cluster.scoring import RewardPool, explain
from protocol.recipe import Recipe
from protocol.roles import Reward
from rewards.contract import check_scores
from rewards.loading import build, pins_of

ScoreGroup = Callable[[np.ndarray, str, int], np.ndarray]
"""(images uint8 (G M, H, W, 3), prompt, M states) -> fp32 scores (G M,)."""


@contextmanager
def open_rewards(recipe: Recipe, rewards: Sequence[Reward]) -> Iterator[dict[str, ScoreGroup]]:
    """Yields what scores groups, by label. Ray is started only where a reward needs its own environment."""
    isolated = [reward for reward in rewards if pins_of(reward)]
    with ExitStack() as stack:
        if isolated:
            launch.connect_ray(recipe, debug=False)
            stack.callback(ray.shutdown)
        environments = prepare(isolated, print) if isolated else {}
        pools = {reward.label: launch.start_pool(_alone(reward), environments) for reward in isolated}
        yield {
            reward.label: _of_pool(pools[reward.label]) if reward.label in pools else _of_this_process(reward, stack)
            for reward in rewards
        }


def _alone(reward: Reward) -> Reward:
    """One actor, asked once, where this command runs, which may have no GPU and is no node of a special kind."""
    has_gpu = ray.cluster_resources().get("GPU", 0.0) >= reward.num_gpus
    gpus = reward.num_gpus if has_gpu else 0.0
    return reward.model_copy(update={"replicas": 1, "resources": {}, "num_gpus": gpus, "max_attempts": 1})


def _of_this_process(reward: Reward, stack: ExitStack) -> ScoreGroup:
    device = own_device(wants_gpu=reward.num_gpus > 0)
    actor = RewardActor(reward.label, build(reward.name, reward.kwargs, str(device)), check_scores)
    return stack.enter_context(closing(actor)).score


def _of_pool(pool: RewardPool) -> ScoreGroup:
    def score(images: np.ndarray, prompt: str, num_states: int) -> np.ndarray:
        try:
            answer = ray.get(pool.actors[0].score.remote(images, prompt, num_states))
        except RayError as error:
            raise explain(pool.settings, prompt, error) from error
        return np.array(answer.scores, np.float32)

    return score
