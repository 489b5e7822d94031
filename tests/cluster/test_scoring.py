"""Scores and weights between real Ray actors: tried again when an actor is lost, explained when that does not help."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.exceptions

from cluster import launch
from cluster.attempt import start_error
from cluster.scoring import RewardPool, Scorer
from cluster.weight_store import StoreClient
from protocol.errors import RecipeError, RewardError
from protocol.recipe import Recipe
from protocol.roles import Reward

IMAGES = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)

REWARDS = """
import os, time

def brightness(images, prompts):
    return images.mean(axis=(1, 2, 3))

def pid(images, prompts):
    return [os.getpid()] * len(images)

def too_few(images, prompts):
    return [1.0]

def broken(images, prompts):
    return [1 / 0]

def slow(images, prompts):
    time.sleep(60)

class DiesOnce:
    def __init__(self, mark):
        self.mark = mark
    def __call__(self, images, prompts):
        if not os.path.exists(self.mark):
            open(self.mark, "w").close()
            os._exit(1)
        return [7.0] * len(images)
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of rewards, and a local Ray to run them in."""
    file = tmp_path_factory.mktemp("scoring") / "mine.py"
    file.write_text(REWARDS)
    os.environ.pop("RAY_ADDRESS", None)
    launch.connect_ray(recipe_with(Reward(name=f"{file}:brightness", replicas=4)), debug=False)
    yield file
    ray.shutdown()


def recipe_with(*rewards: Reward) -> Recipe:
    return Recipe.model_validate(
        {
            "rounds": 1,
            "prompts": {"train": "unused"},
            "batch": {"num_groups": 1, "group_size": 3},
            "rewards": [reward.model_dump() for reward in rewards],
            "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
        }
    )


@pytest.fixture
def pools(rewards: Path) -> Iterator[Any]:
    """Starts the pools of rewards of the file, and stops them after the test."""
    started: list[RewardPool] = []

    def start(*settings: Reward) -> list[RewardPool]:
        named = [each.model_copy(update={"name": f"{rewards}:{each.name}"}) for each in settings]
        started.extend(launch.start_rewards(recipe_with(*named)))
        return started

    yield start
    launch.stop_actors([actor for pool in started for actor in pool.actors], [])


def test_each_reward_is_kept_beside_the_weighted_sum(pools: Any) -> None:
    score = Scorer(pools(Reward(name="brightness", weight=2.0), Reward(name="pid", weight=0.0)))
    scores = score(IMAGES, "a red seven", "000000-0000").result()
    brightness_G = IMAGES.mean(axis=(1, 2, 3)).astype(np.float32)
    assert scores.keys() == {"reward_G", "reward_brightness_G", "reward_pid_G"}
    assert np.array_equal(scores["reward_brightness_G"], brightness_G)
    assert np.array_equal(scores["reward_G"], 2 * brightness_G)
    assert all(array.dtype == np.float32 for array in scores.values())


def test_a_pool_shares_the_tickets_out(pools: Any) -> None:
    score = Scorer(pools(Reward(name="pid", replicas=2)))
    pending = [score(IMAGES, "a red seven", f"000000-{index:04d}") for index in range(8)]
    assert len({scores.result()["reward_G"][0] for scores in pending}) == 2


def test_a_reward_actor_that_dies_is_asked_again(pools: Any, tmp_path: Path) -> None:
    score = Scorer(pools(Reward(name="DiesOnce", kwargs={"mark": str(tmp_path / "died")})))
    assert score(IMAGES, "a red seven", "000000-0000").result()["reward_G"].tolist() == [7.0] * 3
    assert (tmp_path / "died").exists()


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (Reward(name="too_few"), r"reward too_few, on the prompt 'a red seven', returned the wrong number of scores"),
        (Reward(name="broken"), r"broken: raised ZeroDivisionError: division by zero, 3 times, on .* 'a red seven'"),
        (Reward(name="slow", timeout_s=0.5, max_attempts=1), r"slow: gave no scores within 0.5 s, 1 times"),
    ],
    ids=lambda value: value.name if isinstance(value, Reward) else "",
)
def test_a_reward_that_never_scores_is_explained(pools: Any, reward: Reward, told: str) -> None:
    pending = Scorer(pools(reward))(IMAGES, "a red seven", "000000-0000")
    with pytest.raises(RewardError, match=told):
        pending.result()


def test_a_reward_that_cannot_be_built_is_explained_at_the_start(pools: Any) -> None:
    ((actor,),) = (pool.actors for pool in pools(Reward(name="DiesOnce", kwargs={"marc": "x"})))
    with pytest.raises(ray.exceptions.RayError) as failed:
        ray.get(actor.probe.remote(["a red seven"], 16))
    told = start_error(failed.value)
    assert "DiesOnce cannot be built: TypeError" in str(told)
    assert "Expected: keyword arguments of DiesOnce(mark)" in str(told)


def test_scores_that_are_on_their_way_do_not_block(pools: Any) -> None:
    pending = Scorer(pools(Reward(name="brightness"), Reward(name="slow")))(IMAGES, "p", "000000-0000")
    started = time.monotonic()
    assert not pending.ready()
    assert time.monotonic() - started < 10


@pytest.fixture
def store(rewards: Path) -> Iterator[Any]:
    """A weight store that keeps two versions."""
    actor = launch.start_store(recipe_with(Reward(name=f"{rewards}:brightness")))
    yield actor
    ray.kill(actor)


def test_a_store_gives_back_the_very_bytes_by_digest(store: Any) -> None:
    client, data = StoreClient(store), os.urandom(2_000_000)
    client.publish(0, "abc", data)
    assert client.fetch("abc") == data
    assert client.fetch("another") is None


def test_a_store_keeps_the_newest_versions_whatever_order_they_come_in(store: Any) -> None:
    client = StoreClient(store)
    for version in (3, 1, 2, 4):
        client.publish(version, f"digest {version}", b"weights")
    assert client.held() == {3, 4}
    assert client.fetch("digest 1") is None


def test_a_store_that_was_restarted_is_empty_and_answers(store: Any) -> None:
    client = StoreClient(store)
    client.publish(0, "abc", b"weights")
    ray.kill(store, no_restart=False)
    # Ray kills in its own time: the dying process may still answer what is asked at once.
    deadline = time.monotonic() + 60
    while client.held() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert client.held() == set()
    client.publish(0, "abc", b"weights")
    assert client.fetch("abc") == b"weights"


def test_bytes_outlive_the_process_that_published_them(store: Any) -> None:
    @ray.remote(num_cpus=1)
    def publish_and_die() -> None:
        StoreClient(store).publish(7, "abc", b"weights" * 100_000)
        threading.Timer(0.2, os._exit, (1,)).start()

    ray.get(publish_and_die.remote())
    time.sleep(1)
    assert StoreClient(store).fetch("abc") == b"weights" * 100_000


def test_a_cluster_that_could_never_place_the_roles_is_refused(rewards: Path) -> None:
    greedy = recipe_with(Reward(name=f"{rewards}:brightness", num_gpus=2.0, num_cpus=1000))
    with pytest.raises(RecipeError, match=r"ask for .*'CPU': 100.*'GPU': 2.* but the cluster has"):
        launch.check_cluster(greedy)


def test_a_local_ray_has_room_for_every_role() -> None:
    settings = recipe_with(Reward(name="jpeg_compressibility", replicas=40))
    assert launch.local_options(settings)["num_cpus"] >= sum(p.num_cpus * n for p, n in launch.roles(settings))
