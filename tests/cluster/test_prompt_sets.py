"""A run's prompts are what its sets were when it began, and what it holds out is never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.cli import run_command_line
from cluster.evaluate import evaluate_run
from cluster.run_dir import RunDir
from cluster.sources import held_out_prompts, prepare_sources, read_plan, read_prompt_set
from protocol.animals import animal_activities
from protocol.errors import ModelError, RunDirError
from protocol.paths import spread
from protocol.prompt_sets import split_by_hash
from protocol.recipe import Recipe
from tests.models import make_tiny_model
from tests.small_datasets import library_cache

BASE: dict[str, Any] = {
    "rounds": 2,
    "model": {"path": "model"},
    "batch": {"num_groups": 4, "group_size": 2},
    "sampler": {"num_steps": 3},
    "rewards": [{"name": "jpeg_compressibility"}],
    "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
}
FIREWALL = {"rewards": [{"name": "jpeg_incompressibility"}], "num_prompts": 5}
ROWS = [{"n": n, "prompt": prompt} for n, prompt in enumerate(["a fox", "#owl", "a\nwolf", "", "a fox", "a wolf"])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("prompt-sets") / "model")


@pytest.fixture
def desk(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a machine without a network: a model and a table of prompts."""
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with library_cache(tmp_path / "library-cache"):
        yield tmp_path


def recipe(prompts: dict[str, Any], **parts: Any) -> Recipe:
    """A recipe of the desk."""
    return Recipe.model_validate({**BASE, "prompts": prompts, **parts})


def prepare(recipe_: Recipe, run_dir: Path) -> list[str]:
    """Prepares a run's sources; returns what people are told."""
    run_dir.mkdir(exist_ok=True)
    told: list[str] = []
    prepare_sources(recipe_, run_dir, told.append)
    return told


def trained_on(recipe_: Recipe, run_dir: Path) -> tuple[str, ...]:
    """The prompts of a run's tickets."""
    return read_plan(recipe_, run_dir).sources[0].prompts


# --- once in the life of a run --------------------------------------------------------------------------


def test_a_runs_lists_are_tidy_and_stay_whatever_becomes_of_their_sources(desk: Path) -> None:
    made = recipe({"train": "rows.jsonl", "held_out": "held.csv"})
    (desk / "held.csv").write_text("Caption,n\na bear,1\na fox,2\n")
    assert prepare(made, desk / "run") == [
        "prompts: 3 to train on, 2 held out, 1 of them trained on as well (dropped: duplicates 2, empty 1)"
    ]
    assert (desk / "run" / "prompts.txt").read_text() == "a fox\n#owl\na wolf\n"
    assert trained_on(made, desk / "run") == ("a fox", "#owl", "a wolf")
    assert held_out_prompts(made, desk / "run") == ["a bear", "a fox"]

    (desk / "rows.jsonl").unlink()
    (desk / "held.csv").write_text("prompt\nanother\n")
    assert prepare(made, desk / "run") == []
    assert trained_on(made, desk / "run") == ("a fox", "#owl", "a wolf")
    assert held_out_prompts(made, desk / "run") == ["a bear", "a fox"]


def test_a_share_held_out_is_none_of_the_plans_and_the_rest_is(desk: Path) -> None:
    made = recipe({"train": "builtin:animal_activities", "held_out_share": 0.2})
    prepare(made, desk / "run")
    train, held = trained_on(made, desk / "run"), held_out_prompts(made, desk / "run")
    assert held is not None
    assert (train, tuple(held)) == split_by_hash(animal_activities(), 0.2)
    assert {*train} | {*held} == {*animal_activities()}


def test_a_list_that_was_not_written_is_made_without_asking_for_the_other(desk: Path) -> None:
    """A recipe may hold prompts out that had none, when its run is resumed."""
    prepare(recipe({"train": "rows.jsonl"}), desk / "run")
    (desk / "rows.jsonl").unlink()
    resumed = recipe({"train": "rows.jsonl", "held_out": "builtin:animals"})
    assert prepare(resumed, desk / "run") == ["prompts: 45 held out"]
    assert len(held_out_prompts(resumed, desk / "run") or ()) == 45
    assert trained_on(resumed, desk / "run") == ("a fox", "#owl", "a wolf")


def test_a_resumed_run_keeps_what_it_holds_out_unless_its_recipe_names_another_set(desk: Path) -> None:
    first, other = (recipe({"train": "rows.jsonl", "held_out": name}) for name in ("held.txt", "builtin:animals"))
    (desk / "held.txt").write_text("a bear\n")
    RunDir(desk / "run", first, resume=False).release()
    prepare(first, desk / "run")
    (desk / "held.txt").write_text("an owl\n")
    for resumed, expected in ((first, ["a bear"]), (other, read_prompt_set("builtin:animals"))):
        RunDir(desk / "run", resumed, resume=True).release()
        prepare(resumed, desk / "run")
        assert held_out_prompts(resumed, desk / "run") == expected


def test_the_firewall_draws_prompts_that_are_held_out_or_else_some_that_are_trained_on(desk: Path) -> None:
    for number, prompts in enumerate([{"held_out_share": 0.2}, {}]):
        made = recipe({"train": "builtin:animal_activities", **prompts}, firewall=FIREWALL)
        prepare(made, desk / f"run-{number}")
        plan = read_plan(made, desk / f"run-{number}")
        of = held_out_prompts(made, desk / f"run-{number}") or plan.sources[0].prompts
        assert plan.checks is not None
        assert list(plan.checks.prompts) == spread(of, 5)
        assert bool({*plan.checks.prompts} & {*plan.sources[0].prompts}) == (not prompts)


def test_a_run_without_held_out_prompts_has_none_and_one_whose_list_is_gone_says_so(desk: Path) -> None:
    assert held_out_prompts(recipe({"train": "rows.jsonl"}), desk) is None
    made = recipe({"train": "builtin:animals", "held_out_share": 0.2})
    prepare(made, desk / "run")
    for spoil in (lambda file: file.write_text(""), lambda file: file.unlink()):
        spoil(desk / "run" / "held_out.txt")
        with pytest.raises(RunDirError, match=r"held_out\.txt"):
            held_out_prompts(made, desk / "run")


def test_an_evaluation_takes_the_runs_own_list_or_any_set_that_is_named(desk: Path) -> None:
    made = recipe({"train": "rows.jsonl", "held_out": "held.csv"})
    (desk / "held.csv").write_text("prompt\na bear\n")
    RunDir(desk / "run", made, resume=False).release()
    prepare(made, desk / "run")
    (desk / "held.csv").unlink()
    for name in (None, "builtin:animals", "rows.jsonl"):
        with pytest.raises(RunDirError, match="has no checkpoint yet"):  # Prompts come first, and were found.
            evaluate_run(desk / "run", name)
    with pytest.raises(ModelError, match="does not exist"):
        evaluate_run(desk / "run", "held.csv")
    assert read_prompt_set("rows.jsonl") == ["a fox", "#owl", "a wolf"]


# --- before anything starts -----------------------------------------------------------------------------


def run_recipe(desk: Path, prompts: dict[str, Any], *options: str) -> int:
    """Trains by the command line, which comes neither to Redis nor to Ray."""
    (desk / "recipe.yaml").write_text(yaml.safe_dump({**BASE, "prompts": prompts}))
    return run_command_line(["train", "recipe.yaml", "--run-dir", "run", *options])


def numbers(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What a dry run has printed."""
    lines = [line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    return {name: value.strip() for name, value in lines}


@pytest.mark.parametrize(
    ("prompts", "start", "held", "dropped"),
    [
        ({"train": "rows.jsonl"}, "3 prompts", None, "duplicates 2, empty 1"),
        ({"train": "rows.jsonl", "max_prompts": 2}, "2 prompts", None, "duplicates 2, empty 1"),
        ({"train": "rows.parquet", "column": "title"}, "2 prompts", None, "duplicates 1"),
        ({"train": "builtin:animals", "held_out_share": 0.2}, "34 prompts", "11", None),
        ({"train": "builtin:animals", "held_out": "builtin:animals"}, "45 prompts", "45, 45 of them trained on", None),
        ({"train": "hub:HPDv2", "held_out_share": 0.05}, "prompts of hub:HPDv2", "5.0% of them", None),
        ({"train": "builtin:animals", "held_out": "hub:DrawBench"}, "45 prompts", "hub:DrawBench", None),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_dry_run_counts_what_is_here_and_asks_nobody_else(
    desk: Path,
    capsys: pytest.CaptureFixture[str],
    prompts: dict[str, Any],
    start: str,
    held: str | None,
    dropped: str | None,
) -> None:
    pq.write_table(pa.table({"title": ["a fox", "a wolf", "a fox"]}), desk / "rows.parquet")
    assert run_recipe(desk, prompts, "--dry-run") == 0
    told = numbers(capsys)
    assert told["tickets start from"] == start
    assert told.get("prompts held out", "").startswith(held or "")
    assert ("prompts held out" in told) == (held is not None)
    assert told.get("prompts dropped") == dropped
    assert not (desk / "run").exists()


@pytest.mark.parametrize(
    ("prompts", "told"),
    [
        ({"train": "rows.jsonl", "column": "title"}, ["rows.jsonl has no column title", "['n', 'prompt']"]),
        ({"train": "rows.jsonl", "column": "n"}, ["rows.jsonl has no prompts", "6 rows"]),
        ({"train": "rows.jsonl", "held_out": "bad.parquet"}, ["bad.parquet cannot be read"]),
        ({"train": "rows.jsonl", "held_out_share": 0.01}, ["held_out_share leaves 3 prompts to train on and 0 held"]),
        ({"train": "rows.jsonl", "held_out": "rows.jsonl", "held_out_share": 0.1}, ["keep one of the two"]),
        ({"train": "rows.jsonl", "held_out": "hub:DrawBenc"}, ["did you mean hub:DrawBench?"]),
        ({"train": "builtin:plants"}, ["builtin:plants", "builtin:animals"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_prompts_that_cannot_be_used_are_refused_and_leave_nothing_behind(
    desk: Path, capsys: pytest.CaptureFixture[str], prompts: dict[str, Any], told: list[str]
) -> None:
    (desk / "bad.parquet").write_text("a fox\n")
    assert run_recipe(desk, prompts) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert all(words in message for words in told), message
    assert not (desk / "run").exists()


def test_a_set_out_of_reach_ends_the_run_with_the_command_that_fetches_it_and_another_may_follow(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_recipe(desk, {"train": "hub:PartiPrompts", "held_out": "rows.jsonl"}) == 2
    message = capsys.readouterr().err
    assert "`hf download nateraw/parti-prompts --repo-type dataset --local-dir nateraw/parti-prompts`" in message
    assert "Traceback" not in message
    prepare(recipe({"train": "rows.jsonl", "held_out_share": 0.4}, firewall=FIREWALL), desk / "run")
    RunDir(desk / "run", recipe({"train": "builtin:animals"}), resume=False).release()
    assert not list((desk / "run").glob("*.txt"))
    assert prepare(recipe({"train": "builtin:animals"}), desk / "run") == ["prompts: 45 to train on"]
