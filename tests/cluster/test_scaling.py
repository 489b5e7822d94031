"""Actors come and go while a run goes on: those that wait for a node hold up nobody, those that go finish first."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.crew import Crew
from cluster.pulse import Services
from cluster.reward_pools import Pools
from cluster.run_dir import SCALE_FILE
from cluster.scaling import WINDOW_S, Scaling, Window
from cluster.scoring import Answer, RewardPool, Scorer
from protocol.paths import ROOT
from protocol.recipe_file import parse_recipe
from protocol.roles import Reward
from protocol.stream import QueueDepth

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)
REWARD = Reward(name="mine", max_attempts=1)
RECIPE = parse_recipe(
    {
        "rounds": 1,
        "rollouts": {"min": 1, "max": 3},
        "prompts": {"train": "builtin:animals"},
        "batch": {"num_groups": 4, "group_size": 4},
        "rewards": [{"name": "mine"}],
        "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
    },
    source="test",
)


class StandIn:
    """A rollout that has nothing to sample: it runs until it is asked to stop."""

    def __init__(self) -> None:
        self._stopping = threading.Event()

    def build(self) -> None:
        pass

    def build_and_run(self) -> None:
        self.run()

    def run(self) -> None:
        self._stopping.wait()

    def stop(self) -> None:
        self._stopping.set()

    def use_pools(self, pools: list[RewardPool]) -> None:
        pass


class SlowReward:
    """Scores its process id, after a while."""

    def __init__(self, *, is_broken: bool = False) -> None:
        self._is_broken = is_broken

    def score(self, images: np.ndarray, prompt: str, num_states: int) -> Answer:
        if self._is_broken:
            raise ValueError("no such model")
        time.sleep(0.3)
        return Answer([float(os.getpid())] * len(images), True)

    def ping(self) -> None:
        pass


@pytest.fixture(scope="module")
def ray_with_two_places() -> Iterator[None]:
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(
        address="local",
        num_cpus=2,
        resources={"place": 2},
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)])}},
    )
    yield
    ray.shutdown()


@pytest.fixture
def crew(ray_with_two_places: None) -> Iterator[Crew]:
    remote = ray.remote(StandIn).options(num_cpus=0, resources={"place": 1}, max_concurrency=2)
    crew = Crew(lambda _: remote.remote())
    yield crew
    for actor in crew.actors:
        ray.kill(actor)


def start_reward(_: Reward, *, is_broken: bool = False) -> Any:
    return ray.remote(SlowReward).options(num_cpus=0).remote(is_broken=is_broken)


@pytest.fixture
def pools(ray_with_two_places: None, tmp_path: Path) -> Iterator[tuple[Pools, Services, Scorer]]:
    """A pool of one, and a scorer that is told of its changes."""
    first, services = RewardPool(REWARD, (start_reward(REWARD),)), Services({})
    scorer = Scorer([first], tmp_path)
    pools = Pools(services, start_reward, lambda actor: actor.score.remote(IMAGES, "", 1), scorer.use)
    pools.open([first])
    yield pools, services, scorer
    for actor in pools.actors:
        ray.kill(actor)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_rollouts_without_a_place_wait_and_go_first_and_are_never_lost(crew: Crew) -> None:
    ray.get(crew.hire(1))
    crew.run()
    crew.resize(4)
    wait_for(lambda: len(crew.placed) == 2)
    assert len(crew.names) == 4
    placed = crew.placed
    crew.resize(2)
    assert crew.names == placed
    gone, _ = ray.wait(crew.runs, num_returns=2, timeout=30)
    assert [crew.ended(run)[1] for run in gone] == [None, None]
    assert crew.names == placed


def test_a_place_that_is_given_back_goes_to_who_waits_for_it(crew: Crew) -> None:
    ray.get(crew.hire(2))
    crew.run()
    crew.resize(3)
    (late,) = set(crew.names) - set(crew.placed)
    first = crew.placed[0]
    crew.kill(first)
    (lost,), _ = ray.wait(crew.runs, num_returns=1, timeout=30)
    name, error = crew.ended(lost)
    assert (name, error is not None) == (first, True)
    wait_for(lambda: late in crew.placed)


def test_the_end_of_a_run_waits_for_no_rollout_that_has_no_place(crew: Crew) -> None:
    ray.get(crew.hire(2))
    crew.run()
    crew.resize(4)
    started = time.monotonic()
    assert len(crew.stop()) == 2
    assert time.monotonic() - started < 15


def test_a_reward_actor_that_comes_is_asked_and_looked_after_once_it_has_scored(
    pools: tuple[Pools, Services, Scorer],
) -> None:
    pool, services, scorer = pools
    assert pool.resize("mine", 2)
    assert not pool.resize("mine", 2)
    assert (pool.size("mine"), scorer.num_replicas, len(services.answers())) == (1, 1, 1)
    wait_for(lambda: pool.look() == [] and pool.size("mine") == 2)
    assert (scorer.num_replicas, set(services.answers())) == (2, {"reward/mine/0", "reward/mine/1"})
    pending = [scorer(IMAGES, "p", f"000000-{index:04d}") for index in range(4)]
    assert len({scores.result()["mine"][0] for scores in pending}) == 2


def test_a_reward_actor_that_goes_answers_what_it_was_asked(pools: tuple[Pools, Services, Scorer]) -> None:
    pool, services, scorer = pools
    pool.resize("mine", 2)
    wait_for(lambda: pool.look() == [] and pool.size("mine") == 2)
    pending = [scorer(IMAGES, "p", f"000000-{index:04d}") for index in range(6)]
    pool.resize("mine", 1)
    assert services.answers().keys() == {"reward/mine/0"}
    wait_for(lambda: pool.look() == [] and len(pool.actors) == 1)
    assert len({scores.result()["mine"][0] for scores in pending}) == 2


def test_what_a_dismissed_reward_actor_no_longer_answers_another_does_and_it_is_no_failed_attempt(
    pools: tuple[Pools, Services, Scorer],
) -> None:
    pool, _, scorer = pools
    pool.resize("mine", 2)
    wait_for(lambda: pool.look() == [] and pool.size("mine") == 2)
    pending = [scorer(IMAGES, "p", f"000000-{index:04d}") for index in range(6)]
    _, leaving = pool.now[0].actors
    pool.resize("mine", 1)
    ray.kill(leaving)
    assert len({scores.result()["mine"][0] for scores in pending}) <= 2


def test_a_reward_actor_that_cannot_score_never_joins_and_is_not_tried_again_and_again(
    ray_with_two_places: None,
) -> None:
    def start(reward: Reward) -> Any:
        return start_reward(reward, is_broken=True)

    told: list[Any] = []
    pool = Pools(Services({}), start, lambda actor: actor.score.remote(IMAGES, "", 1), told.append)
    first = RewardPool(REWARD, (start_reward(REWARD),))
    pool.open([first])
    pool.resize("mine", 2)
    problems: list[tuple[str, str]] = []

    def has_failed() -> bool:
        problems.extend(pool.look())
        return bool(problems)

    wait_for(has_failed)
    ((label, problem),) = problems
    assert label == "mine"
    assert "no such model" in problem
    assert not pool.resize("mine", 2)
    assert (pool.now, told, len(pool.actors)) == ([first], [], 1)
    ray.kill(first.actors[0])


def learner(round_: int, *, busy_s: float, alive_s: float) -> dict[str, Any]:
    return {"round": round_, "busy_s": busy_s, "alive_s": alive_s}


def test_a_window_sums_up_whole_rounds_and_whoever_came_in_between() -> None:
    now_s = [0.0]
    window = Window("learner/0", lambda: now_s[0])
    rollouts = ["rollout/0", "rollout/1", "rollout/2"]
    before = {
        "learner/0": learner(3, busy_s=50, alive_s=100),
        "rollout/0": {"busy_s": 10.0, "alive_s": 100.0},
        # It was lost and is starting again.
        "rollout/1": {"busy_s": 0.0, "alive_s": 0.0},
    }
    assert window.look(before, QueueDepth(waiting=4, claimed=1), rollouts) is None
    now_s[0] = 2 * WINDOW_S
    in_between = before | {"learner/0": learner(3, busy_s=70, alive_s=120)}
    assert window.look(in_between, QueueDepth(waiting=0, claimed=1), rollouts) is None
    after = {
        "learner/0": learner(4, busy_s=65, alive_s=120),
        "rollout/0": {"busy_s": 25.0, "alive_s": 120.0},
        "rollout/1": {"busy_s": 3.0, "alive_s": 4.0},
    }
    seen = window.look(after, QueueDepth(waiting=0, claimed=1), rollouts)
    assert seen is not None
    assert (seen.size, seen.starting) == (3, 1)
    assert seen.learner_waits == pytest.approx(0.25)
    assert seen.tickets_wait == pytest.approx(1 / 3)
    assert seen.rollouts_idle == pytest.approx(0.25)
    assert window.look(after, QueueDepth(waiting=0, claimed=0), rollouts) is None


def test_short_rounds_are_observed_together() -> None:
    now_s = [0.0]
    window = Window("learner/0", lambda: now_s[0])
    seen = []
    for round_ in range(31):
        now_s[0] = round_ * WINDOW_S / 10
        said = {"learner/0": learner(round_, busy_s=now_s[0], alive_s=now_s[0])}
        seen.append(window.look(said, QueueDepth(waiting=0, claimed=0), []))
    assert sum(each is not None for each in seen) == 3


def test_what_was_asked_for_is_done_at_once_and_logged_with_its_reason(
    crew: Crew, pools: tuple[Pools, Services, Scorer], tmp_path: Path
) -> None:
    pool, _, _ = pools
    ray.get(crew.hire(1))
    crew.run()
    scaling = Scaling(RECIPE, tmp_path, "learner/0", crew, pool)
    scaling.turn()
    assert len(crew.names) == 1
    (tmp_path / SCALE_FILE).write_text(json.dumps({"rollouts": 2, "replicas": {"mine": 3}}))
    scaling.turn()
    scaling.turn()
    assert len(crew.names) == 2
    rows = [json.loads(line) for line in (tmp_path / "scaling.jsonl").read_text().splitlines()]
    assert [(row["what"], row["from"], row["to"], row["reason"]) for row in rows] == [
        ("rollouts", 1, 2, "asked for 2"),
        ("reward mine", 1, 3, "asked for 3"),
    ]
    assert scaling.told == "reward mine 1 -> 3: asked for 3"
