"""Estimates against machines that are given, and one run that this machine could never hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli import run_command_line
from cluster.memory import CUDA_BYTES, Machine, Shortage, check_memory, peak_numbers, shortages, this_machine
from protocol.activations import MARGIN
from protocol.errors import RecipeError
from protocol.memory import GIB, Item, Process, estimate
from protocol.paths import ROOT
from protocol.recipe_file import load_recipe
from protocol.roles import Placement

RECIPE = str(ROOT / "recipes" / "tiny_prdp.yaml")


def process(*, count: int = 1, num_gpus: float = 1.0, device_gib: float = 0.0, host_gib: float = 0.0) -> Process:
    items = (
        Item("weights", int(device_gib * GIB / 4), "device", "choose a smaller model"),
        Item("activations", int(device_gib * GIB * 3 / 4), "device", "lower the micro-batch"),
        Item("groups", int(host_gib * GIB), "host", "lower batch"),
    )
    return Process("a learner rank", count, Placement(num_gpus=num_gpus), items)


def machine(host_gib: float, *gpu_gib: float, free_gib: float | None = None) -> Machine:
    free = int((host_gib if free_gib is None else free_gib) * GIB)
    return Machine("here", int(host_gib * GIB), free, tuple(int(size * GIB) + CUDA_BYTES for size in gpu_gib))


def found(*processes: Process, on: list[Machine]) -> list[Shortage]:
    return list(shortages(processes, on))


def test_what_fits_is_not_mentioned() -> None:
    assert not found(process(device_gib=24, host_gib=8), on=[machine(8, 24)])


def test_within_the_margin_is_a_warning_and_beyond_it_is_certain() -> None:
    room = 10.0
    just = found(process(device_gib=room / (1 - MARGIN) - 0.1), on=[machine(64, room)])
    beyond = found(process(device_gib=room / (1 - MARGIN) + 0.1), on=[machine(64, room)])
    assert [short.is_certain for short in just] == [False, False]
    assert [short.is_certain for short in beyond] == [True, True]


def test_the_largest_item_comes_first() -> None:
    (short, *_) = found(process(device_gib=100), on=[machine(64, 24)])
    assert short.items[0].do == "lower the micro-batch"


def test_processes_that_fit_one_by_one_must_fit_together() -> None:
    two = process(count=2, device_gib=20)
    assert found(two, on=[machine(64, 24)])
    assert not found(two, on=[machine(64, 24), machine(64, 24)])


def test_without_a_gpu_everything_is_held_against_main_memory() -> None:
    on_cpu = process(num_gpus=0, device_gib=20, host_gib=2)
    assert found(on_cpu, on=[machine(16)])
    assert not found(on_cpu, on=[machine(22)])


def test_memory_that_others_hold_now_is_a_warning_only() -> None:
    (short,) = found(process(host_gib=8), on=[machine(64, 24, free_gib=4)])
    assert not short.is_certain


def test_where_no_gpu_is_seen_its_size_is_not_judged() -> None:
    assert not found(process(device_gib=500), on=[machine(64)])


def test_a_refusal_names_the_largest_item_and_what_shrinks_it() -> None:
    recipe = load_recipe(RECIPE, ["learner.micro_batch_size=1000000", "batch.num_groups=240000"])
    told: list[str] = []
    with pytest.raises(RecipeError, match=r"activations of 1000000 latents.*gradient_checkpointing"):
        check_memory(recipe, [machine(24)], told.append)
    check_memory(load_recipe(RECIPE, []), [machine(24)], told.append)
    assert told == []


def test_a_run_that_this_machine_cannot_hold_is_refused_before_anything_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run_dir = tmp_path / "run"
    arguments = [
        "train",
        RECIPE,
        "learner.micro_batch_size=1000000",
        "batch.num_groups=240000",
        "--run-dir",
        str(run_dir),
    ]
    assert run_command_line(arguments) == 2
    assert "main memory than" in capsys.readouterr().err
    assert not run_dir.exists()


def test_this_machine_has_at_least_as_much_as_is_free() -> None:
    here = this_machine()
    assert 0 < here.free_bytes <= here.host_bytes


def test_a_peak_stands_beside_its_estimate(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE, [])
    rows = [{"memory/learner_peak_bytes": GIB}, {"memory/learner_peak_bytes": 2 * GIB}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (learner, *_) = estimate(recipe) or []
    words = f"2.00 GiB at its peak, {learner.size_bytes('host') / GIB:.2f} GiB by the estimate"
    assert peak_numbers(recipe, tmp_path) == {"memory of a learner rank": words}
