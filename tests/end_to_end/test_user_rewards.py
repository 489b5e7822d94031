"""A user's own rewards: found by file and by dotted path, and named when their scores cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.runs import finished, sfumato

SHARPNESS = """
import numpy as np

class Sharpness:
    def __init__(self, power=1.0):
        self.power = power

    def __call__(self, images, prompts):
        assert images.dtype == np.uint8 and len(images) == len(prompts)
        return (np.abs(np.diff(images.astype(float), axis=2)) ** self.power).mean(axis=(1, 2, 3))
"""
CONTRAST = """
def contrast(images, prompts):
    return [float(image.std()) for image in images]
"""
# The probe at the start has two images; a group has four.
NAN = "def score(images, prompts):\n    return [float('nan') if len(images) == 4 else 1.0] * len(images)\n"


@pytest.fixture
def desk(workshop: Path, tmp_path: Path) -> Path:
    """A user's working directory with a rewards.py and a package."""
    (tmp_path / "rewards.py").write_text(SHARPNESS)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "scores.py").write_text(CONTRAST)
    for name in ("model", "prompts.txt", "held_out.txt", "recipe.yaml"):
        (tmp_path / name).symlink_to(workshop / name)
    return tmp_path


def test_rewards_of_a_file_and_of_a_package_are_trained_on(desk: Path) -> None:
    ours = "{name: './rewards.py:Sharpness', kwargs: {power: 2.0}}"
    rewards = f"rewards=[{ours}, {{name: 'my_package.scores:contrast', weight: 0.5}}]"
    process = sfumato("train", "recipe.yaml", "rounds=1", rewards, "--run-dir", "run", cwd=desk)
    (row,) = finished(process, desk / "run").metrics
    assert row["reward/Sharpness"] > 0
    assert row["reward/mean"] == pytest.approx(row["reward/Sharpness"] + 0.5 * row["reward/contrast"], rel=1e-5)


def test_a_reward_whose_scores_cannot_be_used_ends_the_run_by_name(desk: Path) -> None:
    (desk / "broken.py").write_text(NAN)
    process = sfumato("train", "recipe.yaml", "rewards=[{name: './broken.py:score'}]", "--run-dir", "run", cwd=desk)
    assert process.returncode == 2
    assert "Traceback" not in process.stdout + process.stderr
    assert process.stderr.startswith("error: reward score, on the prompt 'a ")
    assert "not finite, for image 0. Got: nan" in process.stderr


@pytest.mark.slow
def test_a_base_model_whose_weights_are_torn_is_refused(desk: Path, workshop: Path) -> None:
    (desk / "torn").mkdir()
    for path in (workshop / "model").iterdir():
        (desk / "torn" / path.name).symlink_to(path)
    (desk / "torn" / "vae").unlink()
    (desk / "torn" / "vae").mkdir()
    config, weights = "config.json", "diffusion_pytorch_model.safetensors"
    (desk / "torn" / "vae" / config).symlink_to(workshop / "model" / "vae" / config)
    (desk / "torn" / "vae" / weights).write_bytes((workshop / "model" / "vae" / weights).read_bytes()[:1000])
    process = sfumato("train", "recipe.yaml", "model.path=./torn", "--run-dir", "run", cwd=desk)
    assert process.returncode == 2
    assert "Traceback" not in process.stdout + process.stderr
    assert "error: the vae of the base model cannot be loaded" in process.stderr
    assert str(desk / "torn") in process.stderr
