"""Prompt sets of the hub, read from folders in their layout and from a filled cache; out of reach, what to run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.datasets import read_column
from protocol.errors import ModelError
from protocol.prompt_sets import parse_hub, read_set

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a machine without a network, and with nothing in its caches."""
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "library-cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "desk"


def write(file: Path, text: str) -> None:
    """Writes a file in a new folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def write_parquet(file: Path, column: str, prompts: Sequence[str]) -> None:
    """Writes a table whose other column is no image, but says it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": b"no image", "path": None}] * len(prompts)
    table = pa.table({"jpg_0": images, column: list(prompts)})
    features = datasets.Features({"jpg_0": datasets.Image(), column: datasets.Value("string")})
    metadata = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    pq.write_table(table.replace_schema_metadata(metadata), file)


def prompts_of(name: str, column: str | None = None) -> tuple[str, ...]:
    """The prompts of a named set."""
    found = read_set(name, column, read_column)
    assert found is not None
    return found.prompts


def test_parti_prompts_are_a_table_with_tabs(desk: Path) -> None:
    rows = "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\na 'quoted' word, and more\tPeople\tBasic\tx\n"
    write(desk / "nateraw" / "parti-prompts" / "PartiPrompts.tsv", rows)
    write(desk / "nateraw" / "parti-prompts" / "README.md", "---\nlicense: apache-2.0\n---\n# P2\n")
    assert prompts_of("hub:PartiPrompts") == ("bond", "a 'quoted' word, and more")


def test_drawbench_is_a_table_with_commas(desk: Path) -> None:
    write(desk / "sayakpaul" / "drawbench" / "drawbench.csv", 'Prompts,Category\n"a red car, parked",Colors\n')
    assert prompts_of("hub:DrawBench") == ("a red car, parked",)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_pick_a_pics_captions_come_by_split_and_no_image_is_decoded(desk: Path, version: str) -> None:
    folder = desk / "yuvalkirstain" / f"pickapic_{version}_no_images" / "data"
    write_parquet(folder / "train-00000-of-00002-ab.parquet", "caption", ["a fox", "a fox", "a wolf"])
    write_parquet(folder / "train-00001-of-00002-cd.parquet", "caption", ["a fox", "an owl"])
    write_parquet(folder / "test_unique-00000-of-00001-ef.parquet", "caption", ["a bear"])
    assert prompts_of(f"hub:Pick-a-Pic-{version}") == ("a fox", "a wolf", "an owl")
    assert prompts_of(f"hub:Pick-a-Pic-{version}::test_unique") == ("a bear",)


def test_hpdv2_is_read_by_file_although_its_repository_is_a_script(desk: Path) -> None:
    folder = desk / "ymhao" / "HPDv2"
    rows = [{"prompt": prompt, "file_path": ["1.jpg", "2.jpg"], "human_preference": [1, 0]} for prompt in ("a", "b")]
    write(folder / "train.json", json.dumps([*rows, rows[0]]))
    write(folder / "test.json", json.dumps([{"prompt": "c", "rank": [2, 1]}]))
    write(folder / "HPDv2.py", "raise RuntimeError\n")
    assert read_set("hub:HPDv2", fetch=read_column) == read_set(str(folder / "train.json"))
    assert prompts_of("hub:HPDv2") == ("a", "b")
    assert prompts_of("hub:HPDv2::test") == ("c",)


def test_hpdv2s_benchmark_has_four_styles_or_one(desk: Path) -> None:
    for style in ("anime", "concept-art", "paintings", "photo"):
        write(desk / "zhwang" / "HPDv2" / "benchmark" / f"{style}.json", json.dumps([f"{style} one", f"{style} two"]))
    assert prompts_of("hub:HPDv2-benchmark::photo") == ("photo one", "photo two")
    assert len(prompts_of("hub:HPDv2-benchmark")) == 8


def test_files_that_hf_download_has_put_into_the_cache_need_no_network(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "datasets--ymhao--HPDv2"
    write(repository / "refs" / "main", COMMIT)
    write(repository / "snapshots" / COMMIT / "train.json", '[{"prompt": "a fox"}]')
    assert prompts_of("hub:HPDv2") == ("a fox",)


def test_configuration_split_and_column_are_those_named(desk: Path) -> None:
    card = (
        "---\nconfigs:\n- config_name: small\n  data_files: [{split: test, path: small.jsonl}]\n"
        "- config_name: large\n  data_files: [{split: train, path: large.jsonl}]\n---\n"
    )
    write(desk / "owner" / "name" / "README.md", card)
    write(desk / "owner" / "name" / "small.jsonl", '{"title": "a", "text": "b"}\n{"title": "c", "text": "d"}\n')
    write(desk / "owner" / "name" / "large.jsonl", '{"title": "e", "text": "f"}\n')
    assert prompts_of("hub:owner/name:small:test") == ("b", "d")
    assert prompts_of("hub:owner/name:small:test:title") == ("a", "c")
    assert prompts_of("hub:owner/name:large", "title") == ("e",)
    with pytest.raises(ModelError, match=r"owner/name has no column caption\. Got: \['title', 'text'\]"):
        prompts_of("hub:owner/name:large:train:caption")
    for wrong in ("hub:owner/name:medium", "hub:owner/name:large:test"):
        with pytest.raises(ModelError, match="the prompt set owner/name cannot be fetched"):
            prompts_of(wrong)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("hub:HPDv2", "hf download ymhao/HPDv2 train.json --repo-type dataset --local-dir ymhao/HPDv2"),
        ("hub:owner/name", "hf download owner/name --repo-type dataset --local-dir owner/name"),
    ],
)
def test_out_of_reach_a_set_says_which_command_fetches_it(name: str, command: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_column(parse_hub(name))
    assert "cannot be fetched" in str(caught.value)
    assert f"`{command}`" in str(caught.value)
