"""Scores between real Ray actors: tried again when an actor is lost, explained when that does not help."""

from __future__ import annotations

import json
import os
import re
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
from cluster.nodes import check_cluster, roles
from cluster.scoring import RewardPool, Scorer
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

class HangsOnce:
    def __init__(self, mark):
        self.mark = mark
    def __call__(self, images, prompts):
        if not os.path.exists(self.mark):
            open(self.mark, "w").close()
            time.sleep(600)
        return [7.0] * len(images)

class Votes:
    # Never the same twice.
    is_pure = False
    def __init__(self):
        self.num_calls = 0
    def __call__(self, images, prompts):
        self.num_calls += 1
        return [self.num_calls + 0.1] * len(images)

async def patient(images, prompts):
    import asyncio
    await asyncio.sleep(0.01)
    return [3.0] * len(images)

class Rank:
    # Where an image stands among its siblings.
    group_wise = True
    def __call__(self, images, prompts):
        means = images.mean(axis=(1, 2, 3))
        return [(means < mean).sum() for mean in means]

def darkens(images, prompts):
    images[:] = 0
    return images.mean(axis=(1, 2, 3))

def takes_half_a_second(images, prompts):
    time.sleep(0.5)
    return [1.0] * len(images)

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
        started.extend(launch.start_rewards(recipe_with(*named), {}))
        return started

    yield start
    launch.stop_actors([actor for pool in started for actor in pool.actors], [])


@pytest.fixture
def scorer(pools: Any, tmp_path: Path) -> Any:
    """Starts rewards and returns what asks them, with this test's folder as the run's."""
    return lambda *settings: Scorer(pools(*settings), tmp_path)


def test_all_rewards_answer_by_their_labels(scorer: Any) -> None:
    scores = scorer(Reward(name="brightness"), Reward(name="pid"))(IMAGES, "a red seven", "000000-0000").result()
    assert scores.keys() == {"brightness", "pid"}
    assert np.array_equal(scores["brightness"], IMAGES.mean(axis=(1, 2, 3)).astype(np.float32))
    assert all(array.dtype == np.float32 for array in scores.values())


def test_a_reward_may_write_to_its_images(scorer: Any) -> None:
    assert scorer(Reward(name="darkens"))(IMAGES, "p", "000000-0000").result()["darkens"].tolist() == [0.0] * 3


def test_two_of_one_kind_are_told_apart_by_what_they_are_called(scorer: Any) -> None:
    scores = scorer(Reward(name="brightness"), Reward(name="brightness", called="again"))(IMAGES, "p", "0").result()
    assert scores.keys() == {"brightness", "again"}


def test_a_pool_shares_the_tickets_out(scorer: Any) -> None:
    score = scorer(Reward(name="pid", replicas=2))
    pending = [score(IMAGES, "a red seven", f"000000-{index:04d}") for index in range(8)]
    assert len({scores.result()["pid"][0] for scores in pending}) == 2


def test_an_asynchronous_function_is_waited_for(scorer: Any) -> None:
    assert scorer(Reward(name="patient"))(IMAGES, "p", "000000-0000").result()["patient"].tolist() == [3.0] * 3


def test_a_group_wise_reward_sees_the_siblings_of_one_state_at_a_time(scorer: Any) -> None:
    level = np.array([5, 90, 7, 60, 9, 30], np.uint8)  # 3 siblings at 2 states each
    images = np.broadcast_to(level[:, None, None, None], (6, 4, 4, 3)).copy()
    ranks = scorer(Reward(name="Rank"))(images, "p", "000000-0000", 2).result()["Rank"]
    assert ranks.reshape(3, 2).T.tolist() == [[0, 1, 2], [2, 1, 0]]


@pytest.mark.parametrize("name", ["DiesOnce", "HangsOnce"])
def test_a_reward_actor_that_dies_or_hangs_makes_way_for_one_that_is_asked_again(
    scorer: Any, tmp_path: Path, name: str
) -> None:
    score = scorer(Reward(name=name, kwargs={"mark": str(tmp_path / "mark")}, timeout_s=1.0))
    assert score(IMAGES, "a red seven", "000000-0000").result()[name].tolist() == [7.0] * 3
    assert (tmp_path / "mark").exists()


def test_waiting_for_a_free_actor_does_not_count_as_scoring(scorer: Any) -> None:
    score = scorer(Reward(name="takes_half_a_second", timeout_s=1.5, max_attempts=1))
    pending = [score(IMAGES, "p", f"000000-{index:04d}") for index in range(6)]
    assert all(scores.result()["takes_half_a_second"].tolist() == [1.0] * 3 for scores in pending)


def test_a_time_out_costs_those_that_wait_behind_it_no_attempt(scorer: Any, tmp_path: Path) -> None:
    kwargs = {"mark": str(tmp_path / "mark")}
    hangs = Reward(name="HangsOnce", kwargs=kwargs, timeout_s=1.0, max_attempts=1, required=False)
    score = scorer(Reward(name="brightness"), hangs)
    pending = [score(IMAGES, "p", f"000000-{index:04d}") for index in range(4)]
    scores = [one.result() for one in pending]
    answered = [each["HangsOnce"].tolist() for each in scores if "HangsOnce" in each]
    assert answered == [[7.0] * 3] * 3, "all but the one that hung"


FAILURES = [
    (Reward(name="too_few"), r"reward too_few, on the prompt 'a red seven', returned the wrong number of scores"),
    (Reward(name="broken"), r"broken: raised ZeroDivisionError: division by zero, 3 times, on .* 'a red seven'"),
    (Reward(name="slow", timeout_s=0.5, max_attempts=1), r"slow: gave no scores within 0.5 s, 1 times"),
]


@pytest.mark.parametrize(("reward", "told"), FAILURES, ids=[reward.name for reward, _ in FAILURES])
def test_a_required_reward_that_never_scores_is_explained(scorer: Any, reward: Reward, told: str) -> None:
    with pytest.raises(RewardError, match=told):
        scorer(reward)(IMAGES, "a red seven", "000000-0000").result()


@pytest.mark.parametrize(("reward", "told"), FAILURES, ids=[reward.name for reward, _ in FAILURES])
def test_an_optional_reward_that_never_scores_has_no_scores_now_and_for_good(
    scorer: Any, tmp_path: Path, reward: Reward, told: str
) -> None:
    optional = reward.model_copy(update={"required": False})
    score = scorer(Reward(name="brightness"), optional)
    assert score(IMAGES, "a red seven", "000000-0000").result().keys() == {"brightness"}
    (entry,) = (tmp_path / "scores" / reward.name).glob("000000-0000-*.json")
    assert re.search(told, json.loads(entry.read_text())["failed"])
    # A ticket that is answered again reads what was written, so that its group is the same.
    again = score(IMAGES, "a red seven", "000000-0000")
    assert again.ready() or again.result()
    assert again.result().keys() == {"brightness"}


def test_an_impure_reward_answers_once_for_each_ticket(scorer: Any, tmp_path: Path) -> None:
    score = scorer(Reward(name="Votes"))
    first = score(IMAGES, "p", "000000-0000").result()["Votes"]
    other = score(IMAGES, "p", "000000-0001").result()["Votes"]
    assert first[0] != other[0]
    assert np.array_equal(score(IMAGES, "p", "000000-0000").result()["Votes"], first)
    assert score(IMAGES[::-1], "p", "000000-0000").result()["Votes"][0] not in (first[0], other[0]), "other images"
    assert len(list((tmp_path / "scores" / "Votes").iterdir())) == 3


def test_a_pure_and_required_reward_writes_nothing(scorer: Any, tmp_path: Path) -> None:
    scorer(Reward(name="brightness"))(IMAGES, "p", "000000-0000").result()
    assert not (tmp_path / "scores").exists()


def test_a_reward_that_cannot_be_built_is_explained_at_the_start(pools: Any) -> None:
    ((actor,),) = (pool.actors for pool in pools(Reward(name="DiesOnce", kwargs={"marc": "x"})))
    with pytest.raises(ray.exceptions.RayError) as failed:
        ray.get(actor.probe.remote(["a red seven"], 16))
    told = start_error(failed.value)
    assert "DiesOnce cannot be built: TypeError" in str(told)
    assert "Expected: keyword arguments of DiesOnce(mark)" in str(told)


def test_scores_that_are_on_their_way_do_not_block(scorer: Any) -> None:
    pending = scorer(Reward(name="brightness"), Reward(name="slow"))(IMAGES, "p", "000000-0000")
    started = time.monotonic()
    assert not pending.ready()
    assert time.monotonic() - started < 10


def test_a_cluster_that_could_never_place_the_roles_is_refused(rewards: Path) -> None:
    greedy = recipe_with(Reward(name=f"{rewards}:brightness", num_gpus=2.0, num_cpus=1000))
    with pytest.raises(RecipeError, match=r"cannot hold this recipe: .*CPU .* of 100.*GPU 0 of 2"):
        check_cluster(greedy)


def test_a_local_ray_has_room_for_every_role() -> None:
    settings = recipe_with(Reward(name="jpeg_compressibility", replicas=40))
    assert launch.local_options(settings)["num_cpus"] >= sum(p.num_cpus * n for _, p, n in roles(settings))
