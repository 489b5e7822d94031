"""The same prompts come out of every form of file, tidied by one rule and split by each prompt's own hash."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from protocol.animals import ACTIVITIES, ANIMALS, animal_activities, animal_paintings, animals
from protocol.errors import ModelError
from protocol.paths import ROOT
from protocol.prompt_sets import KNOWN_SETS, Hub, Prompts, PromptSet, make_lists, parse_hub, read_set, split_by_hash

PROMPTS = ("a red seven, on blue", 'a sign that says "open"', "ein großer Bär", "猫", "it's 5 o'clock; tea\\time")
TEXTS = st.lists(st.text(st.sampled_from("ab é\u0301\n\u2028\t#\ud800")), max_size=12)
WORDS = st.lists(st.text(st.sampled_from("abcdefgh"), min_size=1), min_size=1, max_size=40, unique=True)


def delimited(prompts: Sequence[str], delimiter: str) -> bytes:
    """A table of numbers and prompts, as spreadsheets write it."""
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([("id", "Prompt"), *enumerate(prompts)])
    return file.getvalue().encode()


def parquet(prompts: Sequence[str]) -> bytes:
    """A table with a column beside the captions."""
    file = io.BytesIO()
    pq.write_table(pa.table({"label_0": [1.0] * len(prompts), "caption": list(prompts)}), file)
    return file.getvalue()


FORMS: dict[str, Callable[[Sequence[str]], bytes]] = {
    ".txt": lambda prompts: "\n".join(prompts).encode(),
    ".prompts": lambda prompts: "\r\n".join(prompts).encode(),
    ".jsonl": lambda prompts: "".join(json.dumps({"n": 1, "text": prompt}) + "\n" for prompt in prompts).encode(),
    ".ndjson": lambda prompts: "\n".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts).encode(),
    ".json": lambda prompts: json.dumps([{"prompt": prompt, "rank": [1, 0]} for prompt in prompts], indent=1).encode(),
    ".csv": lambda prompts: delimited(prompts, ","),
    ".TSV": lambda prompts: delimited(prompts, "\t"),
    ".parquet": parquet,
}


def prompts_of(file: Path, column: str | None = None) -> tuple[str, ...]:
    """The prompts of a file."""
    found = read_set(str(file), column)
    assert found is not None
    return found.prompts


# --- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", FORMS)
def test_every_form_holds_the_same_prompts_in_the_same_order(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(FORMS[suffix](PROMPTS))
    assert prompts_of(file) == PROMPTS
    if suffix != ".parquet":
        file.write_bytes(b"\xef\xbb\xbf" + FORMS[suffix](PROMPTS))
        assert prompts_of(file) == PROMPTS
        packed = file.with_name(f"{file.name}.gz")
        packed.write_bytes(gzip.compress(FORMS[suffix](PROMPTS)))
        assert prompts_of(packed) == PROMPTS


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
def test_line_breaks_inside_a_prompt_become_spaces_and_empty_cells_are_dropped(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(FORMS[suffix](["a red\nseven", "", " \r\n ", "a  red\tseven ", "a blue one"]))
    assert read_set(str(file)) == PromptSet(("a red seven", "a blue one"), num_empty=2, num_duplicates=1)


def test_cells_that_are_no_text_count_as_empty(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": null}\n{"prompt": 7}\n{"other": "b"}\n')
    (tmp_path / "a.csv").write_text("id,prompt\n1,a\n2\n")
    assert read_set(str(tmp_path / "a.jsonl")) == PromptSet(("a",), num_empty=3, num_duplicates=0)
    assert read_set(str(tmp_path / "a.csv")) == PromptSet(("a",), num_empty=1, num_duplicates=0)


def test_a_hash_begins_a_comment_in_text_files_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("# no prompt\na fox\n")
    (tmp_path / "a.jsonl").write_text('"#fox, a photo"\n"a fox"\n')
    assert prompts_of(tmp_path / "a.txt") == ("a fox",)
    assert prompts_of(tmp_path / "a.jsonl") == ("#fox, a photo", "a fox")


def test_the_column_is_the_one_named_or_else_the_usual_one(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    for header, expected in (
        ("TEXT,caption,Prompts,prompt", "fourth"),
        ("TEXT,caption,Prompts,x", "third"),
        ("TEXT,Caption,y,x", "second"),
        ("TEXT,z,y,x", "first"),
    ):
        file.write_text(f"{header}\nfirst,second,third,fourth\n")
        assert prompts_of(file) == (expected,)
    assert prompts_of(file, "y") == ("third",)


@pytest.mark.parametrize(
    ("name", "content", "column", "told"),
    [
        ("a.csv", b"id,title\n1,a\n", None, ["not clear which column", "['id', 'title']", "prompts.column"]),
        ("a.csv", b"id,title\n1,a\n", "prompt", ["has no column prompt", "['id', 'title']"]),
        ("a.jsonl", b'{"title": "a"}\n', "text", ["has no column text", "['title']"]),
        ("a.parquet", parquet(["a"]), "title", ["has no column title", "['label_0', 'caption']"]),
        ("a.csv", b"", None, ["not clear which column", "first row names its columns"]),
        ("a.csv", b"prompt\n", None, ["has no prompts"]),
        ("a.csv", b"prompt,id\n,1\n ,2\n", None, ["has no prompts", "2 rows, all empty"]),
        ("a.jsonl", b"\n", None, ["has no prompts"]),
        ("a.json", b"[]", None, ["has no prompts"]),
        ("a.txt", b"# only this\n", None, ["has no prompts"]),
        ("a.parquet", parquet([]), None, ["has no prompts"]),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', None, ["a.jsonl, line 2, is not JSON"]),
        ("a.json", b'[{"prompt": "a"},\n{"prompt": ]', None, ["a.json, line 2, is not JSON"]),
        ("a.csv", b'prompt\n"' + b"a" * 200_000 + b'"\n', None, ["a.csv cannot be read", "JSONL"]),
        ("a.parquet", b"a red seven\n", None, ["a.parquet cannot be read"]),
        ("a.jsonl", b'{"prompt": "\xff"}\n', None, ["a.jsonl is not text"]),
        ("a.txt.gz", b"a red seven\n", None, ["a.txt.gz cannot be read"]),
        ("a.txt.gz", gzip.compress(b"a red seven\n" * 99, mtime=0)[:-20], None, ["a.txt.gz cannot be read"]),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_a_file_that_cannot_be_used_is_refused_with_what_is_there(
    tmp_path: Path, name: str, content: bytes, column: str | None, told: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_set(str(tmp_path / name), column)
    assert all(words in str(caught.value) for words in told), str(caught.value)


def test_only_parquet_needs_more_than_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt\na fox\n")
    program = (
        "import sys; from protocol.prompt_sets import Prompts, make_lists\n"
        f"made = make_lists(Prompts(train={str(tmp_path / 'a.csv')!r}, held_out='hub:PartiPrompts'))\n"
        "print(made.train, made.held_out, [name for name in ('pyarrow', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "('a fox',) None []"


# --- one rule of tidiness -------------------------------------------------------------------------------


@given(TEXTS)
def test_a_set_has_each_prompt_once_on_one_line_in_order_and_counts_the_rest(cells: list[str]) -> None:
    made = PromptSet.of(cells)
    assert len(cells) == len(made.prompts) + made.num_empty + made.num_duplicates
    assert len(set(made.prompts)) == len(made.prompts)
    for prompt in made.prompts:
        assert prompt == " ".join(prompt.split()) == unicodedata.normalize("NFC", prompt) != ""
        assert prompt.encode().decode() == prompt
    assert PromptSet.of(made.prompts) == PromptSet(made.prompts, 0, 0)
    assert PromptSet.of([*cells, *cells]).prompts == made.prompts
    one_by_one = [prompt for cell in cells for prompt in PromptSet.of([cell]).prompts]
    assert made.prompts == tuple(dict.fromkeys(one_by_one))


def test_prompts_that_look_the_same_are_one_and_case_makes_two() -> None:
    assert PromptSet.of(["caf\u00e9", "cafe\u0301"]) == PromptSet(("caf\u00e9",), 0, 1)
    assert PromptSet.of(["A cat", "a cat", "a cat."]).num_duplicates == 0


# --- the split ------------------------------------------------------------------------------------------


EDGES = ("a camel playing chess", "a bird playing chess")
"""Held out at shares above 0.002, and below 0.995 not: with them neither side is ever empty."""


def held_out(prompts: Sequence[str], share: float) -> set[str]:
    """What is held out of prompts, edges aside."""
    return set(split_by_hash([*prompts, *EDGES], share)[1]) - {*EDGES}


@given(WORDS, st.permutations(range(40)), st.integers(0, 40))
def test_whether_a_prompt_is_held_out_depends_on_nothing_but_itself(
    prompts: list[str], order: list[int], num_others: int
) -> None:
    whole = held_out(prompts, 0.3)
    shuffled = [prompts[place] for place in order if place < len(prompts)]
    assert held_out(shuffled, 0.3) == whole
    part = prompts[: num_others + 1]
    assert held_out(part, 0.3) == whole & {*part}


@given(WORDS, st.floats(0.1, 0.8), st.floats(0.1, 0.8))
def test_a_larger_share_only_adds_and_both_sides_keep_their_order(prompts: list[str], one: float, two: float) -> None:
    assert held_out(prompts, min(one, two)) <= held_out(prompts, max(one, two))
    given_ = [EDGES[1], *prompts, EDGES[0]]
    train, held = split_by_hash(given_, one)
    assert [prompt for prompt in given_ if prompt not in {*held}] == list(train)
    assert [prompt for prompt in given_ if prompt in {*held}] == list(held)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_the_share_is_kept_within_chance(share: float) -> None:
    num = 20_000
    _, held = split_by_hash([f"prompt {number}" for number in range(num)], share)
    assert abs(len(held) - num * share) < 4 * (num * share * (1 - share)) ** 0.5


def test_the_split_is_the_same_for_ever() -> None:
    """Runs of another year hold out the same animals."""
    _, held = split_by_hash(animals(), 0.2)
    of_a = ("zebra", "spider", "goat", "wolf", "lizard", "fish", "shark", "snake", "chicken", "fly")
    assert set(held) == {"an ant", *(f"a {animal}" for animal in of_a)}


@pytest.mark.parametrize(("prompts", "share"), [(["a zebra"], 0.5), (["a cat"], 0.01)])
def test_a_split_that_leaves_a_side_empty_is_refused(prompts: list[str], share: float) -> None:
    with pytest.raises(ModelError, match="held_out_share leaves"):
        split_by_hash(prompts, share)


def test_held_out_prompts_are_named_in_one_way() -> None:
    with pytest.raises(ValidationError, match="keep one of the two"):
        Prompts(train="builtin:animals", held_out="builtin:animals", held_out_share=0.1)
    with pytest.raises(ValidationError, match="held_out_share splits train, which is null"):
        Prompts(held_out_share=0.1)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValidationError, match="held_out_share"):
            Prompts(train="builtin:animals", held_out_share=share)


def test_training_prompts_are_thinned_evenly_after_the_split() -> None:
    whole = make_lists(Prompts(train="builtin:animals", held_out_share=0.2))
    thin = make_lists(Prompts(train="builtin:animals", held_out_share=0.2, max_prompts=17))
    assert whole.train is not None
    assert thin.train == whole.train[::2]
    assert thin.held_out == whole.held_out


def test_prompts_on_both_sides_are_told() -> None:
    made = make_lists(Prompts(train="builtin:animals", held_out="builtin:animals", max_prompts=5))
    assert made.shared == ", 5 of them trained on as well"
    assert make_lists(Prompts(train="builtin:animals", held_out_share=0.2)).shared == ""


# --- built-in sets, and names of the hub ----------------------------------------------------------------


def test_the_built_in_animals_are_the_papers() -> None:
    assert len(set(ANIMALS)) == len(animals()) == len(animal_paintings()) == 45
    assert len(set(animal_activities())) == 45 * len(ACTIVITIES) == 135
    assert animals()[:2] == ["a cat", "a dog"]
    assert [prompt for prompt in animals() if prompt.startswith("an ")] == ["an ant"]
    assert {"a dolphin riding a bike", "an ant playing chess", "a bear washing dishes"} <= {*animal_activities()}
    assert "A painting of a squirrel" in animal_paintings()
    for name, prompts in (("animals", animals()), ("animal_activities", animal_activities())):
        assert read_set(f"builtin:{name}") == PromptSet(tuple(prompts), 0, 0)


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("hub:owner/name", Hub("owner/name", None, "train", None)),
        ("hub:owner/name:small", Hub("owner/name", "small", "train", None)),
        ("hub:owner/name:small:test:title", Hub("owner/name", "small", "test", "title")),
        ("hub:owner/name::test", Hub("owner/name", None, "test", None)),
        ("hub:owner/name:::title", Hub("owner/name", None, "train", "title")),
        ("hub:PartiPrompts", Hub("nateraw/parti-prompts", None, "train", "Prompt")),
        ("hub:DrawBench", Hub("sayakpaul/drawbench", None, "train", "Prompts")),
        ("hub:Pick-a-Pic-v1", Hub("yuvalkirstain/pickapic_v1_no_images", None, "train", "caption")),
        ("hub:Pick-a-Pic-v2::test_unique", Hub("yuvalkirstain/pickapic_v2_no_images", None, "test_unique", "caption")),
        ("hub:HPDv2", Hub("ymhao/HPDv2", None, "train", "prompt", ("train.json",))),
        ("hub:HPDv2::test", Hub("ymhao/HPDv2", None, "test", "prompt", ("test.json",))),
        ("hub:HPDv2-benchmark::photo", Hub("zhwang/HPDv2", None, "photo", "text", ("benchmark/photo.json",))),
    ],
)
def test_a_name_of_the_hub_says_dataset_configuration_split_and_column(name: str, hub: Hub) -> None:
    assert parse_hub(name) == hub


def test_a_recipes_column_is_for_sets_that_have_none_of_their_own() -> None:
    assert parse_hub("hub:owner/name", "title").column == "title"
    assert parse_hub("hub:owner/name:::caption", "title").column == "caption"
    assert parse_hub("hub:PartiPrompts", "title").column == "Prompt"


def test_every_short_name_has_a_default_split() -> None:
    assert all(parse_hub(f"hub:{name}").split in ("train", "all") for name in KNOWN_SETS)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hub:PartiPrompt", ["'hub:PartiPrompt'", "did you mean hub:PartiPrompts?", "hub:owner/name[:config]"]),
        ("hub:", ["hub:HPDv2"]),
        ("hub:owner/", ["hub:HPDv2"]),
        ("hub:a/b/c", ["hub:HPDv2"]),
        ("hub:a/b:c:d:e:f", ["hub:owner/name[:config][:split][:column]"]),
        ("hub:HPDv2::dev", ["HPDv2 has no split dev", "train, test"]),
        ("builtin:animal", ["did you mean builtin:animals?", "builtin:animal_activities"]),
        ("nowhere.csv", ["nowhere.csv does not exist"]),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_those_that_do(name: str, told: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        read_set(name, fetch=lambda _: [])
    assert all(words in str(caught.value) for words in told), str(caught.value)
