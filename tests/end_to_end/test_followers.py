"""Several learners on one stream: each ends where it would, whoever else reads along and whatever dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cluster.run_dir import follower_dir
from tests.end_to_end.runs import Driver, Run, finished, sfumato, sfumato_here

FOLLOWERS = [
    {"name": "dpo", "algorithm": {"name": "dpo", "beta_half": 100}, "learner": {"learning_rate": 1e-3}},
    {
        "name": "other_prdp",
        "algorithm": {"name": "prdp", "kl_weight": 1e-1, "clip_eps": 1e-2},
        "learner": {"learning_rate": 3e-3, "world_size": 2, "micro_batch_size": 8},
        "trainable": {"rank": 2, "alpha": 2},
    },
]


@pytest.fixture(scope="module")
def recipe(workshop: Path) -> str:
    """A recipe with followers in the workshop."""
    document = yaml.safe_load((workshop / "recipe.yaml").read_text()) | {"followers": FOLLOWERS}
    (workshop / "followed.yaml").write_text(yaml.safe_dump(document))
    return "followed.yaml"


@pytest.fixture(scope="module")
def followed(workshop: Path, recipe: str) -> Run:
    """An unbroken run with two followers."""
    folder = workshop / "followed"
    return finished(sfumato("train", recipe, "--run-dir", folder, cwd=workshop), folder)


def follower(run: Run, name: str) -> Run:
    return Run(follower_dir(run.folder, name))


def test_the_first_learner_does_not_notice_its_followers(train: Callable[..., Run], followed: Run) -> None:
    assert followed.digests == train("lag=0").digests


def test_followers_learn_from_the_very_groups_of_the_first_learner(followed: Run) -> None:
    for name in ("dpo", "other_prdp"):
        own = follower(followed, name)
        assert [row["round"] for row in own.metrics] == [0, 1, 2]
        for column in ("tickets", "checksums", "version", "digest"):
            assert [row[column] for row in own.ledger] == [row[column] for row in followed.ledger], column
        published = [row["published_digest"] for row in own.ledger]
        assert len(set(published)) == 3
        assert not set(published) & set(followed.digests.values())
    assert all(row["kl_off_policy"] is not None for row in follower(followed, "other_prdp").metrics)


def test_a_followers_directory_is_a_run_to_look_at(followed: Run, workshop: Path) -> None:
    folder = follower_dir(followed.folder, "dpo")
    assert (folder / "export" / "pytorch_lora_weights.safetensors").is_file()
    digest = sfumato_here("digest", folder, cwd=workshop)
    assert digest.stdout.split()[-1] == follower(followed, "dpo").digest
    for command in (["verify", folder], ["evaluate", folder]):
        done = sfumato_here(*command, cwd=workshop)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_followers_and_first_learner_resume_together(followed: Run, workshop: Path, recipe: str) -> None:
    """A learner's process is killed, no matter whose: all go on from a round that all have. Then the driver is."""
    folder = workshop / "followed-broken"
    settings = [recipe, "lag=0", "rounds=6", "checkpoints.every_rounds=1"]
    with Driver(folder, settings, cwd=workshop) as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 2)
        driver.kill_one("ray::LearnerProcess")
        driver.wait_for(lambda: driver.attempt() == 1)
        driver.wait_for(lambda: driver.rounds_done() >= 3)
        driver.kill()
    resumed = finished(sfumato("train", *settings, "--run-dir", folder, "--resume", cwd=workshop), folder)
    for broken, unbroken in (
        (resumed, followed),
        *((follower(resumed, n), follower(followed, n)) for n in ("dpo", "other_prdp")),
    ):
        assert [row["round"] for row in broken.metrics] == [row["round"] for row in broken.ledger] == list(range(6))
        assert {v: broken.digests.get(v) for v in range(1, 4)} == {v: unbroken.digests[v] for v in range(1, 4)}
