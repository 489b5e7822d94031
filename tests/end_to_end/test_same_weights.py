"""A run is a function of code, recipe and seed: what else may vary does not change one bit of the weights."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.redis_server import RedisServer
from tests.end_to_end.runs import Driver, Run, finished, rows, sfumato, sfumato_here
from tests.redis_cluster import RedisCluster, keys_of

TWO_RANKS = "learner.world_size=2"
UNBROKEN = {lag: ("rounds=6", f"lag={lag}", TWO_RANKS) for lag in (0, 1, 2)}
"""The runs that others are compared with that lose processes on the way."""

ROLES = ("ray::RolloutProcess", "ray::RewardProcess", "ray::WeightStore", "redis-server")
"""Who holds nothing durable."""

SLOW = pytest.mark.slow
OVERRUN = "raise RuntimeError('a module of the user hides one of ours')\n"


def agrees(run: Run, reference: Run) -> bool:
    """Whether a run that may be longer has every version of another, and each of its own rounds once."""
    assert [row["round"] for row in run.metrics] == [row["round"] for row in run.ledger] == list(range(len(run.ledger)))
    return {version: run.digests.get(version) for version in reference.digests} == reference.digests


def test_three_rollout_actors_end_with_the_digest_of_one(train: Callable[..., Run]) -> None:
    three = train("lag=0", "rollouts=3")
    assert three.digests == train("lag=0").digests
    assert len({worker for row in three.ledger for worker in row["workers"]}) == 3


def test_a_learner_that_samples_too_ends_with_the_digest_of_a_rollout_actor(train: Callable[..., Run]) -> None:
    alone = train("lag=0", "rollouts=0")
    assert alone.digests == train("lag=0").digests
    assert {worker.partition("@")[0] for row in alone.ledger for worker in row["workers"]} == {"learner-0"}
    drawn, reference = (run.folder / "samples" / "before_after.png" for run in (alone, train("lag=0")))
    assert drawn.read_bytes() == reference.read_bytes()


@SLOW
def test_two_ranks_that_sample_get_help_lose_it_and_die_and_end_where_an_unbroken_run_does(
    train: Callable[..., Run], workshop: Path
) -> None:
    run = Run(workshop / "colocated")
    with Driver(run.folder, ["recipe.yaml", *UNBROKEN[1], "rounds=400", "rollouts=0"], cwd=workshop) as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 1)
        assert sfumato("scale", run.folder, "--rollouts", "1", cwd=workshop).returncode == 0
        driver.wait_for(lambda: len({worker for row in run.ledger for worker in row["workers"]}) == 3)
        assert sfumato("scale", run.folder, "--rollouts", "0", cwd=workshop).returncode == 0
        alone = driver.rounds_done() + 2
        driver.wait_for(lambda: driver.rounds_done() >= alone)
        driver.kill_one("ray::LearnerProcess")
        driver.wait_for(lambda: driver.attempt() == 1)
        enough = max(driver.rounds_done() + 2, 6)
        driver.wait_for(lambda: driver.rounds_done() >= enough)
        driver.kill()
    assert run.digests.items() >= train(*UNBROKEN[1]).digests.items()


@SLOW
def test_another_seed_ends_with_another_digest(train: Callable[..., Run]) -> None:
    assert train("seed=1", "rounds=1").digests[1] != train("lag=0").digests[1]


@SLOW
def test_lag_changes_the_weights_from_the_second_version_on(train: Callable[..., Run]) -> None:
    eager, late = train(*UNBROKEN[0]).digests, train(*UNBROKEN[1]).digests
    assert [eager[version] == late[version] for version in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("lag", [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW)])
def test_a_run_that_loses_every_role_and_its_driver_ends_where_an_unbroken_one_does(
    train: Callable[..., Run], workshop: Path, lag: int
) -> None:
    settings = ["recipe.yaml", *UNBROKEN[lag], "rounds=8"]
    folder = workshop / f"storm-{lag}"
    with Driver(folder, settings, cwd=workshop) as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 1)
        assert sfumato_here("scale", folder, "--rollouts", "3", cwd=workshop).returncode == 0
        for round_, role in enumerate(ROLES, start=1):
            driver.wait_for(lambda reached=round_: driver.rounds_done() >= reached)
            driver.kill_one(role)
        driver.wait_for(lambda: driver.rounds_done() >= 5)
        driver.kill_one("ray::LearnerProcess")
        driver.wait_for(lambda: driver.attempt() == 1)
        assert sfumato_here("scale", folder, "--rollouts", "2", cwd=workshop).returncode == 0
        moment_s = random.SystemRandom().uniform(0, 20)
        time.sleep(moment_s)
        below = driver.kill()
    assert driver.rounds_done() < 8, "the run was over before it was killed"
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive, "processes outlive their driver"

    resumed = sfumato("train", *settings, "rollouts=2", "--run-dir", folder, "--resume", cwd=workshop)
    assert agrees(finished(resumed, folder), train(*UNBROKEN[lag])), f"killed {moment_s:.3f} s after the restart"


@SLOW
def test_actors_that_come_and_go_while_it_runs_change_nothing(train: Callable[..., Run], workshop: Path) -> None:
    run = Run(workshop / "scaled")

    def seen() -> int:
        return len({worker for row in run.ledger for worker in row["workers"]})

    with Driver(run.folder, ["recipe.yaml", *UNBROKEN[1], "rounds=400"], cwd=workshop) as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 1)
        for num, num_seen in ((3, 3), (1, 3), (2, 4)):
            assert sfumato_here("scale", run.folder, "--rollouts", str(num), cwd=workshop).returncode == 0
            enough = driver.rounds_done() + 2
            driver.wait_for(
                lambda seen_by_then=num_seen, by=enough: seen() >= seen_by_then and driver.rounds_done() >= by
            )
        driver.wait_for(lambda: driver.rounds_done() >= 6)
        driver.kill()
    assert run.digests.items() >= train(*UNBROKEN[1]).digests.items()


@SLOW
def test_a_run_that_scales_by_itself_and_by_hand_ends_where_one_of_a_fixed_size_does(
    train: Callable[..., Run], workshop: Path
) -> None:
    run = Run(workshop / "elastic")

    def scaled(what: str = "rollouts") -> list[dict[str, Any]]:
        return [row for row in rows(run.folder / "scaling.jsonl") if row["what"] == what]

    def ask(rollouts: str, replicas: int) -> None:
        sizes = ["--rollouts", rollouts, "--reward", f"jpeg_compressibility={replicas}"]
        assert sfumato_here("scale", run.folder, *sizes, cwd=workshop).returncode == 0

    settings = ["recipe.yaml", *UNBROKEN[1], "rounds=400", "rollouts={min: 1, max: 2}"]
    with Driver(run.folder, settings, cwd=workshop) as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 1)
        ask("4", 3)
        driver.wait_for(lambda: len({worker for row in run.ledger for worker in row["workers"]}) >= 3)
        # One could feed this learner.
        ask("1:4", 1)
        driver.wait_for(lambda: scaled()[-1]["to"] < 4)
        enough = max(driver.rounds_done() + 2, 6)
        driver.wait_for(lambda: driver.rounds_done() >= enough)
        driver.kill()
    assert scaled()[-1]["reason"].startswith("rollouts idle")
    assert [row["to"] for row in scaled("reward jpeg_compressibility")] == [3, 1]
    assert run.digests.items() >= train(*UNBROKEN[1]).digests.items()


@SLOW
def test_a_process_that_lives_but_stands_still_is_replaced(train: Callable[..., Run], workshop: Path) -> None:
    bounds = ["supervision.stall_timeout_s=30", "supervision.answer_timeout_s=5", "redis.timeout_s=5"]
    settings = ["recipe.yaml", *UNBROKEN[1], *bounds, "rounds=8"]
    with Driver(workshop / "stopped", settings, cwd=workshop) as driver:
        for round_, role in enumerate((*ROLES, "ray::LearnerProcess"), start=1):
            driver.wait_for(lambda reached=round_: driver.rounds_done() >= reached)
            driver.stop_one(role)
        run = driver.finish()
    assert agrees(run, train(*UNBROKEN[1]))
    assert "made no progress for" in run.output


@SLOW
def test_more_rounds_on_resume_end_where_a_longer_run_does(train: Callable[..., Run], workshop: Path) -> None:
    folder = workshop / "longer"
    finished(sfumato("train", "recipe.yaml", "rounds=1", "--run-dir", folder, cwd=workshop), folder)
    resumed = sfumato("train", "recipe.yaml", "--run-dir", folder, "--resume", cwd=workshop)
    assert finished(resumed, folder).digests == train("lag=0").digests


def test_modules_of_the_user_with_our_names_change_nothing(
    train: Callable[..., Run], workshop: Path, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text(OVERRUN)
    (tmp_path / "protocol.py").write_text(OVERRUN)
    (tmp_path / "actors").mkdir()
    (tmp_path / "actors" / "__init__.py").write_text(OVERRUN)
    overrides = [f"model.path={workshop}/model", f"prompts={{train: {workshop}/prompts.txt}}"]
    process = sfumato(
        "train",
        workshop / "recipe.yaml",
        *overrides,
        "--run-dir",
        tmp_path / "run",
        cwd=tmp_path,
        env={"PYTHONPATH": "."},
    )
    assert finished(process, tmp_path / "run").digest == train("lag=0").digest


def test_an_external_redis_changes_nothing_and_its_password_is_not_kept(
    train: Callable[..., Run], workshop: Path, own_redis_server: RedisServer
) -> None:
    folder, url = workshop / "attached", own_redis_server.url
    password = url.removeprefix("redis://:").partition("@")[0]
    process = sfumato("train", "recipe.yaml", "rounds=1", f"redis.url={url}", "--run-dir", folder, cwd=workshop)
    run = finished(process, folder)
    assert run.digests[1] == train("lag=0").digests[1]
    found = subprocess.run(["grep", "-rl", password, str(folder)], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert password not in process.stdout + process.stderr


@SLOW
def test_a_redis_cluster_changes_nothing_and_keeps_nothing(
    train: Callable[..., Run], workshop: Path, redis_cluster: RedisCluster
) -> None:
    folder = workshop / "clustered"
    settings = [f"redis.url={redis_cluster.url}", "redis.num_shards=6", TWO_RANKS, "rollouts=2", "lag=1"]
    process = sfumato("train", "recipe.yaml", *settings, "rounds=6", "--run-dir", folder, cwd=workshop)
    assert finished(process, folder).digests == train(*UNBROKEN[1]).digests
    assert [keys_of(member) for member in redis_cluster.members] == [[], [], []]


WEIGHT_TOLERANCE = 1e-5
"""Of weights that move by 1e-3 an update: the order of sums over ranks and micro-batches differs."""


def largest_gap(run: Run, reference: Run) -> float:
    ours, theirs = run.weights(), reference.weights()
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


@SLOW
@pytest.mark.parametrize(
    "settings", [(TWO_RANKS,), pytest.param((TWO_RANKS, "learner.zero_stage=3"), marks=SLOW)], ids=" ".join
)
def test_other_layouts_of_the_learner_end_with_close_weights(
    train: Callable[..., Run], settings: tuple[str, ...]
) -> None:
    run = train(*settings)
    assert largest_gap(run, train("lag=0")) < WEIGHT_TOLERANCE
    assert any(torch.count_nonzero(tensor) for name, tensor in run.weights().items() if "lora_B" in name)


@SLOW
def test_a_resume_with_another_number_of_ranks_says_so_and_ends_close(
    train: Callable[..., Run], workshop: Path
) -> None:
    folder = workshop / "relaid"
    first = sfumato("train", "recipe.yaml", TWO_RANKS, "rounds=2", "--run-dir", folder, cwd=workshop)
    finished(first, folder)
    second = sfumato("train", "recipe.yaml", "learner.zero_stage=1", "--run-dir", folder, "--resume", cwd=workshop)
    run = finished(second, folder)
    assert "layout changes (world_size 2 -> 1, zero_stage 0 -> 1): from here on weights differ in" in run.output
    assert [row["world_size"] for row in run.ledger] == [2, 2, 1]
    assert largest_gap(run, train("lag=0")) < WEIGHT_TOLERANCE


@SLOW
def test_bf16_runs_on_two_ranks_whatever_the_number_of_rollout_actors(train: Callable[..., Run]) -> None:
    settings = ("learner.precision=bf16", "learner.zero_stage=2", TWO_RANKS, "learner.parity_tolerance=0.05")
    run = train(*settings, "rollouts=2")
    assert run.digests == train(*settings).digests
    assert all(tensor.dtype == torch.bfloat16 for tensor in run.weights().values())
