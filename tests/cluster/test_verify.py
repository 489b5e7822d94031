"""A run's record verifies as it was written; whatever of it is changed is named, with its place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.cli import run_command_line
from cluster.verify import UNREADABLE, packed_digest, summary, verify_record
from diffusion.weights import pack, unpack, weights_digest
from learner.checkpoint import Meta, begin, commit
from learner.collect import Counts
from learner.journal import ledger_row
from learner.receipts import Receipt
from protocol.datasets import Item, Manifest, Skipped
from protocol.errors import RunDirError, VerifyError
from protocol.paths import manifest_path
from protocol.recipe_file import dump_recipe, parse_recipe

ROOT = Path(__file__).parents[2]
ROUNDS, GROUPS, LAG = 4, 4, 1
RECIPE = {
    "rounds": ROUNDS,
    "lag": LAG,
    "prompts": {"train": "prompts.txt"},
    "batch": {"num_groups": GROUPS, "group_size": 2},
    "rewards": [{"name": "jpeg_compressibility"}],
    "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
}
OTHER = "ab" * 32

Rows = list[dict[str, Any]]


def weights(version: int) -> dict[str, Tensor]:
    """Weights of several dtypes and shapes, a scalar and an empty tensor among them."""
    return {
        "b.lora_A": torch.full((2, 3), float(version)),
        "a.lora_B": torch.arange(4, dtype=torch.bfloat16) + version,
        "scalar": torch.tensor(0.5, dtype=torch.float64),
        "empty": torch.empty(0, 3, dtype=torch.float16),
    }


def digest(version: int) -> str:
    return weights_digest(weights(version))


def row(round_: int, version: int | None = None) -> dict[str, Any]:
    """A line of the ledger, made by the learner's own function; sampled with the version of the lag by default."""
    version = max(0, round_ - LAG) if version is None else version
    receipts = [
        Receipt(
            ticket_id=f"{round_:06d}-{index:04d}",
            version=version,
            weights_digest=digest(version),
            checksum=f"{round_:032x}{index:032x}",
            worker=f"{index % 2}@{('here', 'there')[index % 2]}",
            fingerprint=f'{{"device":"cpu","threads":{index % 2 + 1}}}',
            rollout_s=0.1,
            reward_s=0.1,
            num_images=2,
            num_evaluations=8,
            rewards={"mean": (1.0, 2.0)},
        )
        for index in range(GROUPS)
    ]
    return ledger_row(round_, receipts, digest(round_ + 1), Counts(reissued=1, dead_letter=round_), world_size=2)


def write_rows(file: Path, rows: Rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_checkpoint(run: Path, round_: int, versions: Sequence[int] = ()) -> None:
    versions = versions or range(max(0, round_ - LAG), round_ + 1)
    meta = Meta(round_, round_, 0, 2, 0, "fp32", {str(version): digest(version) for version in versions}, {})
    commit(begin(run, round_), meta, {version: pack(weights(version)) for version in versions}, keep_last=2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of four rounds at lag 1, with checkpoints of rounds 2 and 4."""
    folder = tmp_path / "run"
    begin_run(folder, RECIPE)
    (folder / "prompts.txt").write_text("a red seven\na blue one\na green two\n")
    write_rows(folder / "ledger.jsonl", [row(round_) for round_ in range(ROUNDS)])
    write_checkpoint(folder, 2)
    write_checkpoint(folder, 4)
    return folder


def begin_run(folder: Path, recipe: dict[str, Any]) -> None:
    """Makes a run directory with metrics of all rounds."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"run_id": "abc", "attempt": 0, "started": 0.0}))
    (folder / "recipe.yaml").write_text(dump_recipe(parse_recipe(recipe, source="test")))
    write_rows(folder / "metrics.jsonl", [{"round": r, "loss": float("nan")} for r in range(ROUNDS)])


def violations(run: Path) -> list[str]:
    """The lines that a refusal lists."""
    with pytest.raises(VerifyError) as refused:
        verify_record(run)
    headline, *lines = str(refused.value).splitlines()
    assert str(run) in headline
    assert headline.endswith(f"violations: {len(lines)}")
    assert all(line.startswith("  ") and "Got: " in line and "Expected: " in line for line in lines)
    return [line.strip() for line in lines]


def change(file: Path, how: Callable[[Rows], object]) -> None:
    """Rewrites a file of lines."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    how(rows)
    write_rows(file, rows)


def test_a_run_as_it_was_written_verifies_and_is_told_in_short(run: Path) -> None:
    told = summary(verify_record(run))
    assert told["rounds"].startswith("4 of 4")
    assert told["tickets"].startswith("16,")
    assert told["versions"].startswith("0 to 4")
    assert told["groups by fingerprint"] == "8 on device cpu, threads 1; 8 on device cpu, threads 2"
    assert told["groups by host"] == "8 on here, 8 on there"
    assert told["made good"] == "duplicate 0, reissued 4, dead letter 6, stale 0"
    assert told["checkpoints"] == "round-000002 (versions 1, 2), round-000004 (versions 3, 4)"
    assert "note" not in told


def swap(rows: Rows, one: int, other: int) -> None:
    rows[one], rows[other] = rows[other], rows[one]


@pytest.mark.parametrize(
    ("how", "found"),
    [
        (lambda rows: rows[1]["tickets"].pop(2), ["ledger, round 1: ticket 000001-0002. Got: '0 times'"]),
        (
            lambda rows: rows[1]["tickets"].insert(2, "000001-0002"),
            ["ledger, round 1: ticket 000001-0002. Got: '2 times'"],
        ),
        (
            lambda rows: rows[1]["tickets"].__setitem__(2, "000002-0002"),
            [
                "ledger, round 1: ticket 000001-0002. Got: '0 times'",
                "ledger, round 1: a ticket that is not of the plan. Got: '000002-0002'",
            ],
        ),
        (lambda rows: rows[1]["tickets"].reverse(), ["ledger, round 1: the order of tickets"]),
        (lambda rows: rows[2]["checksums"].pop(), ["ledger, round 2: entries of checksums. Got: 3"]),
        (lambda rows: rows[2]["workers"].append("0@here"), ["ledger, round 2: entries of workers. Got: 5"]),
        (lambda rows: rows[2]["fingerprint_of"].pop(), ["ledger, round 2: entries of fingerprint_of. Got: 3"]),
        (lambda rows: rows[2]["fingerprints"].pop(), ["ledger, round 2: an entry of fingerprint_of. Got: 1"]),
        (
            lambda rows: swap(rows, 1, 2),
            [
                "ledger, round 2: stands behind round 0. Got: 2. Expected: 1",
                "ledger, round 1: stands behind round 2. Got: 1. Expected: 3",
                "ledger, round 3: stands behind round 1. Got: 3. Expected: 2",
            ],
        ),
        (lambda rows: rows.insert(1, rows[1]), ["ledger, round 1: stands behind round 1. Got: 1. Expected: 2"]),
        (
            lambda rows: rows.pop(2),
            [
                "ledger, round 3: stands behind round 1. Got: 3. Expected: 2",
                "metrics.jsonl: a round that the ledger lacks. Got: 2",
                "checkpoint of round 4: digest of version 3",
            ],
        ),
        (lambda rows: rows[3].update(digest=OTHER), [f"ledger, round 3: digest of version 2. Got: '{OTHER}'"]),
        (
            lambda rows: rows[0].update(digest=OTHER),
            [f"ledger, round 1: digest of version 0. Got: '{digest(0)}'. Expected: {OTHER}"],
        ),
        (
            lambda rows: rows[2].update(published_digest=OTHER),
            [
                f"checkpoint of round 4: digest of version 3. Got: '{digest(3)}'. Expected: {OTHER}",
                "round-000004/versions/000003.safetensors: digest of the weights",
            ],
        ),
        (
            lambda rows: rows[3].update(version=1, digest=digest(1)),
            ["ledger, round 3: version. Got: 1. Expected: 2 at lag 1"],
        ),
        (
            lambda rows: rows[3].update(published_version=5),
            [
                "ledger, round 3: published_version. Got: 5. Expected: 4",
                "checkpoint of round 4: digest of version 4",
            ],
        ),
    ],
    ids=[
        *("dropped ticket", "doubled ticket", "foreign ticket", "unsorted tickets", "dropped checksum"),
        *("added worker", "dropped entry of fingerprint_of", "dropped fingerprint", "swapped rounds", "doubled round"),
        *("dropped round", "broken chain", "another version 0", "another published digest", "wrong version"),
        "wrong published version",
    ],
)
def test_whatever_is_changed_in_the_ledger_is_found(run: Path, how: Callable[[Rows], object], found: list[str]) -> None:
    change(run / "ledger.jsonl", how)
    lines = violations(run)
    assert len(lines) == len(found), lines
    assert all(line.startswith(beginning) for line, beginning in zip(lines, found, strict=True)), lines


@pytest.mark.parametrize("torn", ["ledger.jsonl", "metrics.jsonl"])
def test_a_torn_last_line_does_not_count(run: Path, torn: str) -> None:
    with (run / torn).open("a") as file:
        file.write(json.dumps(row(ROUNDS))[:40])
    assert summary(verify_record(run))["rounds"].startswith("4 of 4")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda line: b"{" + line, "all of it: Invalid JSON"),
        (lambda line: line.replace(b"round", b"r\xffund", 1), "Invalid"),
        (lambda line: line.replace(b'"workers"', b'"makers"'), "workers: Field required"),
        (lambda line: line.replace(b'"round": 2', b'"round": "2"'), "round: Input should be a valid integer"),
    ],
    ids=["no JSON", "no text", "a key is missing", "another type"],
)
def test_a_line_of_the_ledger_that_cannot_be_read_is_named_alone(
    run: Path, damage: Callable[[bytes], bytes], told: str
) -> None:
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = damage(lines[2])
    (run / "ledger.jsonl").write_bytes(b"".join(lines))
    (line,) = violations(run)
    assert line.startswith("ledger.jsonl, line 3: ")
    assert told in line


@pytest.mark.parametrize(
    ("how", "found"),
    [
        (lambda rows: rows.pop(1), "metrics.jsonl: round 1. Got: '0 times'. Expected: once"),
        (lambda rows: rows.append(rows[2]), "metrics.jsonl: round 2. Got: '2 times'. Expected: once"),
        (lambda rows: rows.append({"round": 4}), "metrics.jsonl: a round that the ledger lacks. Got: 4"),
        (lambda rows: rows.pop(), "metrics.jsonl: round 3. Got: '0 times'"),
        (lambda rows: rows.append({"rund": 4}), "metrics.jsonl, line 5: round: Field required"),
    ],
    ids=["missing round", "doubled round", "added round", "missing checkpointed round", "unreadable line"],
)
def test_metrics_have_each_round_of_the_ledger_once(run: Path, how: Callable[[Rows], object], found: str) -> None:
    change(run / "metrics.jsonl", how)
    (line,) = violations(run)
    assert line.startswith(found)


def test_a_run_that_crashed_between_its_two_files_verifies(run: Path) -> None:
    change(run / "ledger.jsonl", lambda rows: rows.append(row(ROUNDS)))
    assert summary(verify_record(run))["rounds"].startswith("5 of 4")


def test_a_run_without_a_checkpoint_yet_verifies(run: Path) -> None:
    for folder in (run / "checkpoints").iterdir():
        folder.rename(folder.with_name(f".tmp-{folder.name}"))
    assert summary(verify_record(run))["checkpoints"] == "none yet"


META = "checkpoints/round-000004/meta.json"
VERSION = "checkpoints/round-000004/versions/000003.safetensors"


@pytest.mark.parametrize(
    ("file", "damage", "found"),
    [
        (META, lambda data: data.replace(digest(3).encode(), OTHER.encode()), "checkpoint of round 4: digest of"),
        (META, lambda data: data.replace(b'"3": ', b'"9": '), "checkpoint of round 4: digest of version 3. Got: None"),
        (META, lambda data: data[:40], "checkpoints: a meta.json cannot be read"),
        (META, lambda data: data.replace(b"step", b"stop"), "checkpoints: a meta.json cannot be read"),
        (VERSION, lambda data: data[:-1] + bytes([data[-1] ^ 1]), "round-000004/versions/000003.safetensors: digest"),
        (VERSION, lambda data: data[:-1], "round-000004/versions/000003.safetensors: digest"),
        (VERSION, lambda data: data + b"\0", "round-000004/versions/000003.safetensors: digest"),
        (VERSION, lambda data: b"", "round-000004/versions/000003.safetensors: digest"),
        (VERSION, lambda data: pack(weights(2)), "round-000004/versions/000003.safetensors: digest"),
    ],
    ids=[
        *("another digest", "another version", "torn meta", "meta of another shape"),
        *("flipped bit", "cut", "longer", "empty", "another version's weights"),
    ],
)
def test_a_checkpoint_that_is_not_what_the_ledger_names_is_found(
    run: Path, file: str, damage: Callable[[bytes], bytes], found: str
) -> None:
    (run / file).write_bytes(damage((run / file).read_bytes()))
    assert violations(run)[0].startswith(found)


def test_a_version_that_is_missing_from_a_checkpoint_is_found(run: Path) -> None:
    (run / VERSION).unlink()
    (line,) = violations(run)
    assert "FileNotFoundError" in line


def test_all_violations_are_listed_at_once(run: Path) -> None:
    change(run / "ledger.jsonl", lambda rows: (rows[0]["tickets"].pop(), rows[2].update(version=7)))
    change(run / "metrics.jsonl", lambda rows: rows.pop(1))
    (run / VERSION).unlink()
    places = [line.split(":")[0] for line in violations(run)]
    assert places == [
        *("ledger, round 0", "ledger, round 2", "ledger, round 2", "metrics.jsonl"),
        "round-000004/versions/000003.safetensors",
    ]


@pytest.fixture
def self_play(tmp_path: Path) -> Path:
    """A finished run of two iterations, of two rounds each, on a dataset of two usable rows."""
    folder = tmp_path / "self-play"
    iterations = [{"rounds": 2, "beta_half": 1.0}, {"rounds": 2, "beta_half": 2.0}]
    changes = {"prompts": {}, "rewards": [], "data": [{"path": "photos"}]}
    begin_run(folder, {**RECIPE, **changes, "algorithm": {"name": "spin", "iterations": iterations}})
    items = (Item(0, "a red seven", ("3b1f",)), Item(2, "a blue one", ("c07a",)))
    Manifest(items, (Skipped(1, "no_caption", ""),)).write(manifest_path(folder, 0))
    write_rows(folder / "ledger.jsonl", [row(round_, version) for round_, version in enumerate((0, 0, 2, 2))])
    write_checkpoint(folder, 2, versions=[2])
    write_checkpoint(folder, 4, versions=[2, 4])
    return folder


def test_a_run_of_self_play_verifies_with_the_opponents_of_its_iterations(self_play: Path) -> None:
    told = summary(verify_record(self_play))
    assert told["rounds"].startswith("4 of 4")
    assert told["checkpoints"] == "round-000002 (versions 2), round-000004 (versions 2, 4)"


def test_a_round_of_self_play_that_was_sampled_with_the_newest_weights_is_found(self_play: Path) -> None:
    change(self_play / "ledger.jsonl", lambda rows: rows[3].update(version=3, digest=digest(3)))
    (line,) = violations(self_play)
    assert line.startswith("ledger, round 3: version. Got: 3. Expected: 2")


def test_a_checkpoint_of_self_play_without_its_opponent_is_found(self_play: Path) -> None:
    meta = self_play / "checkpoints" / "round-000004" / "meta.json"
    meta.write_text(meta.read_text().replace('"2": ', '"3": '))
    assert violations(self_play)[0].startswith("checkpoint of round 4: digest of version 2. Got: None")


def test_another_number_of_ranks_is_a_note_and_no_violation(run: Path) -> None:
    change(run / "ledger.jsonl", lambda rows: [row.update(world_size=4) for row in rows[2:]])
    note = summary(verify_record(run))["note"]
    assert note == "from round 2 on with 4 ranks instead of 2: not bit-identical to an unbroken run"


def test_without_a_round_there_is_nothing_to_verify(run: Path) -> None:
    (run / "ledger.jsonl").unlink()
    with pytest.raises(RunDirError, match="has not published a version yet"):
        verify_record(run)


def test_the_digest_of_packed_weights_is_that_of_the_weights() -> None:
    for version in (0, 7):
        assert packed_digest(pack(weights(version))) == weights_digest(weights(version))
    assert packed_digest(pack({})) == weights_digest({})


def test_whichever_bit_of_packed_weights_flips_shows() -> None:
    data = pack(weights(1))
    assert weights_digest(unpack(data)) == packed_digest(data)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert packed_digest(bytes(flipped)) != digest(1), f"bit {bit}"
        except UNREADABLE:
            continue


def test_the_command_prints_what_it_found_and_exits_by_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["verify", str(run)]) == 0
    assert "each once" in capsys.readouterr().out
    change(run / "ledger.jsonl", lambda rows: rows[1]["tickets"].pop(2))
    assert run_command_line(["verify", str(run)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: the run ")
    assert "ticket 000001-0002. Got: '0 times'. Expected: once." in printed.err


def test_a_replay_of_no_group_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["verify", str(run), "--replay", "0"]) == 2
    assert "--replay is too small. Got: 0" in capsys.readouterr().err


def test_without_a_replay_neither_torch_nor_ray_is_imported(run: Path) -> None:
    program = (
        "import sys; from cluster.cli import run_command_line; code = run_command_line(['verify', sys.argv[1]]); "
        "sys.exit(code or str([n for n in ('torch', 'ray', 'diffusers', 'safetensors') if n in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program, str(run)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stderr.strip() == "[]"
