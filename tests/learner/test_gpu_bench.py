"""The benchmark for GPUs, by the same code on small models on the CPU: rows are whole and their numbers make sense."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from bench.gpu import ALGORITHMS, EVERYWHERE, KERNELS, MODELS, SMALL, Case, cases, parse, run, told
from protocol.paths import ROOT
from protocol.recipe import Recipe
from tests.models import make_tiny_xl_model
from tests.small_datasets import library_cache

pytestmark = [
    pytest.mark.usefixtures("gang_of_one"),
    # DeepSpeed's ZeRO imports an optimizer that torch compiles, for which torch imports what it has deprecated itself.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
CPU = torch.device("cpu")
NUM_ROUNDS, NUM_BRANCHES = 3, 2


@pytest.fixture(scope="module")
def tiny_xl_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny Stable Diffusion XL pipeline."""
    return str(make_tiny_xl_model(tmp_path_factory.mktemp("bench") / "xl"))


def check(row: dict[str, Any]) -> None:
    """What holds of every row of rounds."""
    rates = [row["images_per_s"], row["tflop_per_evaluation"], row["rollout"]["round_s"], row["learner"]["round_s"]]
    assert all(math.isfinite(number) and number > 0 for number in rates)
    assert row["images_per_s"] < row["rollout"]["images_per_s"]
    assert row["learner"]["step_s"] == row["learner"]["round_s"], "one step a round"
    # On the CPU what the process held before may be used again, so that there need be nothing above it.
    assert {type(row[role]["peak_bytes"]) for role in ("rollout", "learner")} == {int}
    assert len(row["loss"]) == len(row["grad_norm"]) == NUM_ROUNDS
    assert all(math.isfinite(number) for number in (*row["loss"], *row["grad_norm"]))
    assert min(row["grad_norm"]) > 0
    assert json.loads(json.dumps(row)) == row
    assert "images/s" in told(row)


def test_a_row_has_speed_memory_and_parity(tiny_xl_model: str) -> None:
    row = run(Case("sdxl", "prdp", "lora", "bf16"), Path(tiny_xl_model), SMALL, [], CPU)
    check(row)
    assert row["num_images"] == SMALL.num_groups * SMALL.group_size
    assert row["settings"]["precision"] == "bf16"
    assert row["parity"]["max_abs"] <= row["parity"]["limit"]
    passes = row["learner"]["round_s"] * row["learner"]["tflop_per_s"] / row["tflop_per_evaluation"]
    # Every scored step at least under the reference, then forward and backward.
    items = NUM_BRANCHES * row["num_images"] * (SMALL.num_steps - 1)
    assert passes >= 3 * items - 1e-6


@pytest.mark.parametrize(
    "case",
    [
        Case("sd15", "ncp_dpo", "lora", "fp32"),
        pytest.param(Case("sd15", "spin", "full", "bf16"), marks=pytest.mark.slow),
    ],
    ids=["pairs", "self-play"],
)
def test_a_dataset_is_encoded_for_methods_that_learn_from_one(tiny_model: str, tmp_path: Path, case: Case) -> None:
    with library_cache(tmp_path / "cache"):
        row = run(case, Path(tiny_model), SMALL, [], CPU)
    check(row)
    assert row["parity"] is None
    assert row["num_images"] == 2 * SMALL.num_groups * SMALL.group_size, "both of each pair"


@pytest.mark.slow
def test_other_kernels_are_compared_with_the_default(tiny_model: str) -> None:
    row = run(Case("sd15", KERNELS, "lora", "fp32"), Path(tiny_model), SMALL, [], CPU)
    variants = row["variants"]
    assert variants.keys() == EVERYWHERE.keys()
    assert variants["default"]["log_prob_gap"] == 0, "a group's own batch, on one thread"
    assert variants["default"]["speed"] == 1
    assert all(one["speed"] > 0 and one["log_prob_gap"] < 1e-5 for one in variants.values())
    assert row["log_prob_gap_of_batches"][str(SMALL.group_size)] == 0
    assert "channels_last" in told(row)


def test_every_algorithm_has_a_row_that_is_a_valid_recipe() -> None:
    tags = {get_args(kind.model_fields["name"].annotation)[0] for kind in algorithm_settings()}
    assert set(ALGORITHMS) == tags
    for case in cases(list(MODELS), ALGORITHMS):
        recipe = case.recipe(Path("a/model"), MODELS[case.model].size)
        assert recipe.algorithm.name == case.algorithm
        assert recipe.learner.precision == ("fp32" if "ncp" in case.algorithm else "bf16")
        assert recipe.batch.num_trajectories >= 8
    assert {case.trains for case in cases(["sd15"], ALGORITHMS)} == {"lora", "full"}


def algorithm_settings() -> tuple[Any, ...]:
    """The settings of every algorithm that a recipe may name."""
    return get_args(Recipe.model_fields["algorithm"].annotation)


def test_the_command_line_knows_its_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--models", "sdxl"]).models == ["sdxl"]
    with pytest.raises(SystemExit):
        parse(["--models", "sd99"])
    assert "unknown: sd99; there are sd15, sdxl" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_writes_a_row_a_case_also_of_one_that_fails(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ["--size", "small", "--models", "sd15", "--algorithms", "sft,ncp_sft", "--out", str(out)]
    subprocess.run(
        [sys.executable, "-m", "bench.gpu", *words, "--", "learner.precision=bf16"],
        cwd=ROOT,
        check=True,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    results = json.loads(out.read_text())
    assert results["torch"] == torch.__version__
    found = {(row["algorithm"], row["trains"]): row for row in results["rows"]}
    assert found.keys() == {("sft", "lora"), ("sft", "full"), ("ncp_sft", "lora"), ("ncp_sft", "full")}
    check(found["sft", "lora"])
    assert "fp32" in found["ncp_sft", "lora"]["failed"], "NCP refuses bf16, and costs its row alone"
