"""Every algorithm on every model family that it is for, as people run it: Ray, Redis, DeepSpeed, the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.end_to_end.conftest import RECIPE
from tests.end_to_end.runs import finished, sfumato
from tests.learner.test_every_algorithm import CASES, T
from tests.learner.test_family_runs import FLOWS, MAKE, QUICK, supported_cases
from tests.small_datasets import write_images, write_pairs


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model of each family, prompts and two datasets."""
    folder = tmp_path_factory.mktemp("families")
    for name, make in MAKE.items():
        make(folder / name)
    (folder / "prompts.txt").write_text("a red seven\na blue one\ngreen two\n")
    write_images(folder / "images")
    write_pairs(folder / "pairs")
    return folder


def recipe_for(family: str, parts: dict[str, Any]) -> dict[str, Any]:
    sampler = {"num_steps": T, **parts.get("sampler", {})}
    if family in FLOWS:
        sampler |= {"kernel": "flow_grpo", "eta": 0.7}
    shared = {name: RECIPE[name] for name in ("seed", "batch", "redis", "evaluation")}
    return {
        **shared,
        "rounds": 3,
        "learner": {"learning_rate": 1e-3, "micro_batch_size": 8},
        **parts,
        "model": {"path": family, "trainable": {"rank": 2, "alpha": 2}, "resolution": 16},
        "sampler": sampler,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name", "parts"), supported_cases())
def test_a_run_of_an_algorithm_on_a_family_ends_with_trained_weights(
    shop: Path, family: str, name: str, parts: dict[str, Any]
) -> None:
    file = shop / f"{family}-{name}.yaml"
    file.write_text(yaml.safe_dump(recipe_for(family, parts)))
    folder = shop / f"run-{family}-{name}"
    run = finished(sfumato("train", file, "--run-dir", folder, cwd=shop, env={"HF_HOME": str(shop / "hub")}), folder)
    assert len(run.metrics) == 3
    assert all(math.isfinite(row["loss"]) for row in run.metrics)
    assert len(set(run.digests.values())) > 1, "the weights have moved"
    exported = list((folder / "export").glob("*.safetensors"))
    assert [path.name for path in exported] == ["pytorch_lora_weights.safetensors"]


def test_every_case_of_every_family_is_there() -> None:
    assert {family for family, _, _ in (case.values for case in supported_cases())} == MAKE.keys() == QUICK.keys()
    assert {name for _, name, _ in (case.values for case in supported_cases())} >= CASES.keys()
