"""A run is a function of code, recipe and seed: what else may vary does not change one bit of the weights."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from cluster.redis_server import RedisServer
from tests.end_to_end.runs import Driver, Run, finished, sfumato

TWO_RANKS = "learner.world_size=2"
UNBROKEN = ("rounds=6", "lag=1", TWO_RANKS)
"""The run that others are compared with that lose a process on the way."""

OVERRUN = "raise RuntimeError('a module of the user hides one of ours')\n"


@pytest.mark.parametrize("settings", [("lag=0",), ("lag=0", TWO_RANKS), UNBROKEN], ids=" ".join)
def test_one_and_two_rollout_actors_end_with_equal_digests(
    train: Callable[..., Run], settings: tuple[str, ...]
) -> None:
    two = train(*settings, "rollouts=2")
    assert two.digests == train(*settings).digests
    assert len({worker for row in two.ledger for worker in row["workers"]}) == 2


def test_another_seed_ends_with_another_digest(train: Callable[..., Run]) -> None:
    assert train("seed=1", "rounds=1").digests[1] != train("lag=0").digests[1]


def test_lag_changes_the_weights_from_the_second_version_on(train: Callable[..., Run]) -> None:
    eager, late = train("lag=0", TWO_RANKS).digests, train(*UNBROKEN).digests
    assert [eager[version] == late[version] for version in range(4)] == [True, True, False, False]


def test_a_kill_of_the_driver_and_a_resume_change_nothing(train: Callable[..., Run], workshop: Path) -> None:
    with Driver(workshop / "driver-killed", ["recipe.yaml", *UNBROKEN], cwd=workshop) as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 3)
        below = driver.kill()
    assert driver.rounds_done() < 6, "the run was over before it was killed"
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive, "processes outlive their driver"

    resumed = sfumato("train", "recipe.yaml", *UNBROKEN, "--run-dir", driver.folder, "--resume", cwd=workshop)
    run = finished(resumed, driver.folder)
    assert run.digest == train(*UNBROKEN).digest
    assert [row["round"] for row in run.metrics] == [row["round"] for row in run.ledger] == list(range(6))


def test_a_kill_of_whatever_holds_nothing_durable_changes_nothing(train: Callable[..., Run], workshop: Path) -> None:
    settings = ["recipe.yaml", *UNBROKEN, "rollouts=2", "rounds=8"]
    roles = ("ray::RolloutProcess", "ray::RewardProcess", "ray::WeightStore", "redis-server")
    with Driver(workshop / "roles-killed", settings, cwd=workshop) as driver:
        for round_, role in enumerate(roles):
            driver.wait_for(lambda reached=round_: driver.rounds_done() > reached)
            driver.kill_one(role)
        run = driver.finish()
    assert [row["round"] for row in run.metrics] == list(range(8))
    assert "restarting the learner" not in run.output
    unbroken = train(*UNBROKEN).digests
    assert {version: run.digests[version] for version in unbroken} == unbroken


def test_a_kill_of_a_learner_rank_is_made_good_without_help(train: Callable[..., Run], workshop: Path) -> None:
    with Driver(workshop / "learner-killed", ["recipe.yaml", *UNBROKEN], cwd=workshop) as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 3)
        driver.kill_one("ray::LearnerProcess")
        run = driver.finish()
    assert "restarting the learner" in run.output
    assert run.digests == train(*UNBROKEN).digests
    assert [row["round"] for row in run.metrics] == list(range(6))


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


WEIGHT_TOLERANCE = 1e-5
"""Of weights that move by 1e-3 an update: the order of sums over ranks and micro-batches differs."""


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_zero_stages_and_world_sizes_end_with_close_weights(
    train: Callable[..., Run], stage: int, world_size: int
) -> None:
    reference = train("lag=0").weights()
    settings = (f"learner.zero_stage={stage}",) if stage else ("lag=0",)
    settings += (TWO_RANKS,) if world_size == 2 else ()
    weights = train(*settings).weights()
    assert weights.keys() == reference.keys()
    gaps = {name: float((weights[name] - reference[name]).abs().max()) for name in reference}
    assert max(gaps.values()) < WEIGHT_TOLERANCE
    assert any(torch.count_nonzero(tensor) for name, tensor in weights.items() if "lora_B" in name)
