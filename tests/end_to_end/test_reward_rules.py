"""What becomes of a run whose rewards vote, fail, or need packages of their own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from cluster.run_dir import follower_dir
from learner.checkpoint import latest_checkpoint, newest_common
from tests.cluster.package_shelf import add_package
from tests.end_to_end.runs import Driver, Run, finished, sfumato, sfumato_here

REWARDS = """
import os, random

class Votes:
    # Another mark each time that it is asked, for whatever it is asked.
    is_pure = False

    def __call__(self, images, prompts):
        return [random.SystemRandom().random() for _ in prompts]

def moody(images, prompts):
    # Fails on about a third of all groups; the probe at the start has two images.
    if len(images) == 4 and random.SystemRandom().random() < 1 / 3:
        raise RuntimeError("not today")
    return images.mean(axis=(1, 2, 3))

class Breaks:
    def __init__(self, mark):
        self.mark = mark

    def __call__(self, images, prompts):
        if os.path.exists(self.mark):
            raise RuntimeError("the model is gone")
        return images.std(axis=(1, 2, 3))
"""
AGED = """
'''How old a package is that the main environment has in another version.'''
PINS = ("hjson==0.0.1",)

def age(images, prompts):
    import hjson
    return images.std(axis=(1, 2, 3)) + hjson.age
"""


@pytest.fixture
def desk(workshop: Path, tmp_path: Path) -> Path:
    """A user's working directory with rewards."""
    (tmp_path / "mine.py").write_text(REWARDS)
    (tmp_path / "aged.py").write_text(AGED)
    for name in ("model", "prompts.txt", "held_out.txt", "recipe.yaml"):
        (tmp_path / name).symlink_to(workshop / name)
    return tmp_path


def with_rewards(*rewards: dict[str, object]) -> str:
    return f"rewards={json.dumps(rewards)}"


def test_a_run_is_repeated_from_its_score_log_though_rewards_vote_and_fail(desk: Path) -> None:
    votes = {"name": "./mine.py:Votes", "normalise": {"how": "running"}}
    moody = {"name": "./mine.py:moody", "weight": 0.1, "required": False, "max_attempts": 1}
    command = ("train", "recipe.yaml", with_rewards(votes, moody), "lag=1", "rounds=4", "--run-dir", "run")
    first = finished(sfumato(*command, cwd=desk), desk / "run")
    digests, metrics = first.digests, first.metrics
    left_out = [row["round"] for row in metrics if row.get("left_out/moody")]
    # Of four groups a round one fails in four rounds out of five.
    assert left_out
    assert all(("reward/moody" in row) == (row["round"] not in left_out) for row in metrics)
    told = "the optional reward moody failed: this round is trained without it"
    assert first.output.count(told) == len(left_out)
    assert [row["round"] for row in first.ledger if row["left_out"] == ["moody"]] == left_out

    # As if the machine had died before the first checkpoint: every group is made again.
    shutil.rmtree(desk / "run" / "checkpoints")
    again = finished(sfumato(*command, "--resume", cwd=desk), desk / "run")
    assert again.digests == digests
    assert [row["reward/Votes"] for row in again.metrics] == [row["reward/Votes"] for row in metrics]
    replayed = sfumato_here("verify", "run", "--replay", "8", cwd=desk)
    assert replayed.returncode == 0, replayed.stderr
    assert re.search(r"8 of 8 groups drawn, all bit-identical", replayed.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("rollouts", [1, 0])
def test_a_required_reward_that_fails_ends_the_run_with_a_checkpoint_to_go_on_from(desk: Path, rollouts: int) -> None:
    rewards = with_rewards({"name": "./mine.py:Breaks", "kwargs": {"mark": str(desk / "mark")}, "max_attempts": 2})
    follower = {"name": "dpo", "algorithm": {"name": "dpo", "beta_half": 100}}
    others = ("checkpoints.every_rounds=100", f"rollouts={rollouts}", f"followers={json.dumps([follower])}")
    arguments = ("recipe.yaml", rewards, "rounds=30", *others)
    with Driver(desk / "run", arguments, cwd=desk) as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 2)
        (desk / "mark").touch()
        driver.wait_for_failure()
        output = driver.output()
    assert "Traceback" not in output
    assert re.search(r"error: reward .*Breaks: raised RuntimeError: the model is gone, 2 times, on the prompt", output)
    found = latest_checkpoint(desk / "run")
    stopped_at = Run(desk / "run").digests
    assert found is not None
    assert found.meta.round == max(stopped_at) >= 2
    assert newest_common([desk / "run", follower_dir(desk / "run", "dpo")]) == found.meta.round

    (desk / "mark").unlink()
    rounds = f"rounds={found.meta.round + 2}"
    resumed = finished(
        sfumato("train", *arguments[:2], rounds, *others, "--run-dir", "run", "--resume", cwd=desk), desk / "run"
    )
    assert {version: resumed.digests[version] for version in stopped_at} == stopped_at
    assert len(resumed.metrics) == found.meta.round + 2


def test_a_reward_scores_in_its_own_environment_in_a_run_and_in_its_evaluation(
    desk: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shelf = tmp_path_factory.mktemp("shelf")
    add_package(shelf, "hjson", "0.0.1", "age = 1000.0\n")
    env = {"SFUMATO_CACHE": str(desk / "cache"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(shelf)}
    rewards = with_rewards({"name": "./aged.py:age"})
    process = sfumato("train", "recipe.yaml", rewards, "rounds=1", "--run-dir", "run", cwd=desk, env=env)
    run = finished(process, desk / "run")
    assert run.metrics[0]["reward/age"] > 1000
    assert "installing age's environment" in run.output
    evaluated = sfumato("evaluate", "run", "--json", "table.json", cwd=desk, env=env)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "installing" not in evaluated.stdout
    assert json.loads((desk / "table.json").read_text())["rewards"]["age"]["base"]["mean"] > 1000
    replayed = sfumato("verify", "run", "--replay", "2", cwd=desk, env=env)
    assert "2 of 2 groups drawn, all bit-identical" in replayed.stdout, replayed.stderr


@pytest.mark.slow
def test_the_firewall_ends_a_run_that_is_hacked_and_leaves_the_last_good_weights(desk: Path) -> None:
    recipe = yaml.safe_load((desk / "recipe.yaml").read_text())
    # What is held out is the opposite of what is trained on.
    held_out = {"name": "jpeg_incompressibility"}
    firewall = {"every_rounds": 1, "num_prompts": 3, "margin": 1e-6, "on_trip": "stop", "rewards": [held_out]}
    learner = {**recipe["learner"], "learning_rate": 1e-2}
    (desk / "hacked.yaml").write_text(
        yaml.safe_dump({**recipe, "rounds": 12, "firewall": firewall, "learner": learner})
    )
    process = sfumato("train", "hacked.yaml", "--run-dir", "run", cwd=desk)
    assert process.returncode == 2
    told = (
        r"error: the firewall stopped the run after round (\d+): jpeg_incompressibility fell from .* while the trained"
    )
    (last,) = re.findall(told, process.stderr)
    run = Run(desk / "run")
    assert max(run.digests) == int(last)
    assert run.metrics[-1]["firewall/tripped"] == 1
    assert [row["firewall/version"] for row in run.metrics] == list(range(int(last)))
    assert (desk / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()
    assert sfumato("verify", "run", cwd=desk).returncode == 0
