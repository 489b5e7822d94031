"""What a run's tickets start from is fixed when the run is made; what cannot be used is refused before it starts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from cluster.cli import run_command_line
from cluster.run_dir import RunDir
from cluster.sources import prepare_sources, read_plan
from protocol.errors import RecipeError, RunDirError
from protocol.recipe import Recipe
from protocol.tickets import Source
from tests.models import make_tiny_model
from tests.small_datasets import CAPTIONS, LABELS, library_cache, random_image, write_images, write_pairs, write_rows

PROMPTS = ("a red seven", "a blue one", "a green two")
DECIDED = tuple(row for row, label in enumerate(LABELS) if label in (0, 1))
BASE: dict[str, Any] = {
    "rounds": 2,
    "model": {"path": "model"},
    "batch": {"num_groups": 4, "group_size": 2},
    "sampler": {"num_steps": 3},
    "algorithm": {"name": "sft"},
}
ON_PROMPTS: dict[str, Any] = {"prompts": {"train": "prompts.txt"}, "rewards": [{"name": "jpeg_compressibility"}]}
MIXTURE: dict[str, Any] = {
    **ON_PROMPTS,
    "prompts": {"train": "prompts.txt", "weight": 2.0},
    "data": [{"path": "images", "max_items": 4}, {"path": "pairs", "kind": "pairs", "weight": 5.0}],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("sources") / "model")


@pytest.fixture
def desk(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory: a model, prompts and two datasets."""
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    write_images(tmp_path / "images")
    write_pairs(tmp_path / "pairs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with library_cache(tmp_path / "library-cache"):
        yield tmp_path


def recipe(**parts: Any) -> Recipe:
    """A recipe of the desk."""
    return Recipe.model_validate({**BASE, **parts})


def prepare(recipe_: Recipe, run_dir: Path) -> list[str]:
    """Prepares a run's sources; returns what people are told."""
    run_dir.mkdir(exist_ok=True)
    told: list[str] = []
    prepare_sources(recipe_, run_dir, told.append)
    return told


def written(run_dir: Path) -> dict[str, tuple[bytes, int]]:
    """Every file of a run directory, and when it was written."""
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in run_dir.iterdir()}


# --- once in the life of a run --------------------------------------------------------------------------


def test_sources_are_read_once_and_a_resumed_run_has_those_whatever_became_of_the_files(desk: Path) -> None:
    run_dir = desk / "run"
    told = prepare(recipe(**MIXTURE), run_dir)
    plan, files = read_plan(recipe(**MIXTURE), run_dir), written(run_dir)
    assert set(files) == {"prompts.txt", *(f"data-{n}{end}.jsonl" for n in (0, 1) for end in ("", ".skipped"))}
    assert told

    (desk / "prompts.txt").write_text("another prompt\n")
    write_rows(desk / "images", [{"file_name": "5.png", "text": "another caption"}])
    for file in (desk / "pairs").iterdir():
        file.unlink()
    assert prepare(recipe(**MIXTURE), run_dir) == []
    assert written(run_dir) == files
    assert read_plan(recipe(**MIXTURE), run_dir) == plan
    assert read_plan(recipe(**MIXTURE), run_dir).round(1, "digest") == plan.round(1, "digest")


def test_a_scan_that_was_cut_short_is_made_again(desk: Path) -> None:
    prepare(recipe(data=[{"path": "pairs", "kind": "pairs"}]), desk / "whole")
    plan = read_plan(recipe(data=[{"path": "pairs", "kind": "pairs"}]), desk / "whole")
    prepare(recipe(data=[{"path": "pairs", "kind": "pairs"}]), desk / "cut")
    (desk / "cut" / "data-0.jsonl").unlink()
    (desk / "cut" / "data-0.skipped.jsonl").write_text("{")
    assert prepare(recipe(data=[{"path": "pairs", "kind": "pairs"}]), desk / "cut")
    assert read_plan(recipe(data=[{"path": "pairs", "kind": "pairs"}]), desk / "cut") == plan


def test_a_manifest_that_is_gone_or_torn_stops_the_run(desk: Path) -> None:
    made = recipe(data=[{"path": "images"}])
    prepare(made, desk / "run")
    for name in ("data-0.jsonl", "data-0.skipped.jsonl"):
        whole = (desk / "run" / name).read_bytes()
        (desk / "run" / name).write_text('{"row": 0,')
        with pytest.raises(RunDirError, match="manifest"):
            read_plan(made, desk / "run")
        (desk / "run" / name).write_bytes(whole)
    assert len(read_plan(made, desk / "run").sources[0].rows) == len(CAPTIONS)


# --- rows that are left out -----------------------------------------------------------------------------


def test_rows_that_are_left_out_are_listed_with_reasons_and_told(desk: Path) -> None:
    Image.fromarray(random_image(0)).save(desk / "images" / "torn.png")
    torn = desk / "images" / "torn.png"
    torn.write_bytes(torn.read_bytes()[:-200])
    rows = [
        {"file_name": "0.png", "text": "a red seven"},
        {"file_name": "torn.png", "text": "a torn one"},
        {"file_name": "1.png", "text": ""},
        {"file_name": "2.png", "text": "a green two"},
    ]
    write_rows(desk / "images", rows)
    made = recipe(data=[{"path": "images"}, {"path": "pairs", "kind": "pairs"}])
    told = prepare(made, desk / "run")
    skipped = [
        {line["row"]: line["reason"] for line in map(json.loads, path.read_text().splitlines())}
        for path in (desk / "run" / "data-0.skipped.jsonl", desk / "run" / "data-1.skipped.jsonl")
    ]
    assert skipped == [{1: "unreadable_image", 2: "no_caption"}, {2: "undecided", 5: "undecided"}]
    ends = [words for words in told if words.startswith("dataset ")]
    assert ends == [
        "dataset images: 2 rows usable, 2 skipped (no caption 1, unreadable image 1; listed in data-0.skipped.jsonl)",
        "dataset pairs: 4 rows usable, 2 skipped (undecided 2; listed in data-1.skipped.jsonl)",
    ]
    images, pairs = read_plan(made, desk / "run").sources
    assert (images.rows, images.prompts) == ((0, 3), ("a red seven", "a green two"))
    assert (pairs.rows, pairs.prompts) == (DECIDED, tuple(CAPTIONS[row] for row in DECIDED))


def test_nothing_is_said_of_skipped_rows_where_there_are_none(desk: Path) -> None:
    told = prepare(recipe(data=[{"path": "images"}]), desk / "run")
    assert told[-1] == "dataset images: 6 rows usable, 0 skipped"
    assert told[0] == "reading dataset images: 6 of 6 rows"


# --- plans ----------------------------------------------------------------------------------------------


def test_a_mixtures_plan_has_the_prompts_first_and_every_dataset_with_its_weight(desk: Path) -> None:
    prepare(recipe(**MIXTURE), desk / "run")
    plan = read_plan(recipe(**MIXTURE), desk / "run")
    assert plan.sources == (
        Source("prompts", PROMPTS, (0, 1, 2), 2.0),
        Source("images", CAPTIONS[:4], (0, 1, 2, 3), 1.0),
        Source("pairs", tuple(CAPTIONS[row] for row in DECIDED), DECIDED, 5.0),
    )
    assert (plan.run_seed, plan.num_groups, plan.group_size, plan.lag, plan.iteration_starts) == (0, 4, 2, 0, ())
    tickets = [ticket for round_ in range(200) for ticket in plan.round(round_, "digest")]
    shares = Counter(ticket.source for ticket in tickets)
    for number, share in enumerate((2 / 8, 1 / 8, 5 / 8)):
        assert abs(shares[number] - 800 * share) <= 4 * (800 * share * (1 - share)) ** 0.5
    for ticket in tickets:
        source = plan.sources[ticket.source]
        assert ticket.prompt == source.prompts[source.rows.index(ticket.row)]


def test_a_plan_of_datasets_alone_has_no_prompts(desk: Path) -> None:
    made = recipe(data=[{"path": "pairs", "kind": "pairs"}, {"path": "images"}], lag=2, seed=5)
    prepare(made, desk / "run")
    plan = read_plan(made, desk / "run")
    assert [source.kind for source in plan.sources] == ["pairs", "images"]
    assert (plan.lag, plan.run_seed) == (2, 5)
    assert not (desk / "run" / "prompts.txt").exists()


def test_a_plan_of_self_play_starts_every_iteration_with_a_version_of_its_own(desk: Path) -> None:
    iterations = [{"rounds": 2, "beta_half": 1}, {"rounds": 3, "beta_half": 1}, {"rounds": 1, "beta_half": 1}]
    made = recipe(data=[{"path": "images"}], algorithm={"name": "spin", "iterations": iterations}, rounds=6)
    prepare(made, desk / "run")
    plan = read_plan(made, desk / "run")
    assert plan.iteration_starts == (0, 2, 5)
    assert [plan.version_of(round_) for round_ in range(6)] == [0, 0, 2, 2, 2, 5]


# --- refused before anything starts ---------------------------------------------------------------------


def refused(desk: Path, capsys: pytest.CaptureFixture[str], parts: dict[str, Any]) -> str:
    """Trains by the command line, which must not come to Redis or Ray; returns the message."""
    (desk / "recipe.yaml").write_text(yaml.safe_dump({**BASE, **parts}))
    assert run_command_line(["train", "recipe.yaml", "--run-dir", "run"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    assert not (desk / "run" / "redis.log").exists()
    return message


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"data": [{"path": "nowhere"}]}, ["there is no dataset here", "'nowhere'", "metadata.jsonl"]),
        ({"data": [{"path": "model"}]}, ["there is no dataset here", "'model'"]),
        ({"data": []}, ["nothing to learn from", "sft needs prompts.train or a dataset of images in data"]),
        ({"data": [{"path": "images", "kind": "paris"}]}, ["data.0.kind", "'paris'", "'pairs'"]),
        ({"data": [{"path": "images", "pair_filter": "absolute_winners"}]}, ["pair_filter", "needs kind: pairs"]),
        ({"data": [{"path": "images"}], "algorithm": {"name": "dpo", "beta_full": 1}}, ["dpo cannot learn from"]),
        ({"data": [{"path": "pairs"}], "algorithm": {"name": "prdp", "kl_weight": 1, "clip_eps": None}}, ["prdp"]),
        ({"data": [{"path": "images", "weight": 0}]}, ["data.0.weight", "greater than 0"]),
        ({**ON_PROMPTS, "rewards": [], "data": [{"path": "images"}]}, ["rewards", "at least one is needed"]),
    ],
    ids=lambda value: str(value.get("data")) if isinstance(value, dict) else "",
)
def test_a_dataset_that_a_recipe_alone_shows_to_be_wrong_leaves_nothing_behind(
    desk: Path, capsys: pytest.CaptureFixture[str], parts: dict[str, Any], told: list[str]
) -> None:
    message = refused(desk, capsys, parts)
    assert all(words in message for words in told), message
    assert not (desk / "run").exists()


def unlabelled(desk: Path) -> dict[str, Any]:
    """Pairs of which none is decided."""
    rows = [{"jpg_0_file_name": "0-0.png", "jpg_1_file_name": "0-1.png", "label_0": 0.5, "caption": "a one"}]
    write_rows(desk / "pairs", rows)
    return {"path": "pairs", "kind": "pairs"}


def uncaptioned(desk: Path) -> dict[str, Any]:
    """Images without a column of captions."""
    write_rows(desk / "images", [{"file_name": "0.png", "title": "a one"}])
    return {"path": "images"}


def empty(desk: Path) -> dict[str, Any]:
    """A folder that says nothing of its images."""
    write_rows(desk / "images", [])
    return {"path": "images"}


def not_parquet(desk: Path) -> dict[str, Any]:
    """A file that is not what its name says."""
    (desk / "images.parquet").write_text("a red seven")
    return {"path": "images.parquet"}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (unlabelled, ["no usable row", "undecided"]),
        (uncaptioned, ["lacks the column text", "title"]),
        (empty, ["cannot be read"]),
        (not_parquet, ["cannot be read", "images.parquet"]),
    ],
)
def test_a_dataset_that_reading_shows_to_be_wrong_is_refused_and_a_better_one_may_follow(
    desk: Path, capsys: pytest.CaptureFixture[str], spoil: Any, told: list[str]
) -> None:
    message = refused(desk, capsys, {"data": [spoil(desk)]})
    assert all(words in message for words in told), message
    assert not list((desk / "run").glob("data-*"))
    RunDir(desk / "run", recipe(data=[{"path": "images"}]), resume=False).release()


def test_a_scan_that_fails_leaves_no_manifest(desk: Path) -> None:
    with pytest.raises(RecipeError, match="no usable row"):
        prepare(recipe(data=[{"path": "images"}, unlabelled(desk)]), desk / "run")
    assert {file.name for file in (desk / "run").iterdir()} == {"data-0.jsonl", "data-0.skipped.jsonl"}
