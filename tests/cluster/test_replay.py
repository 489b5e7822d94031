"""Groups of a run come out again bit for bit from their tickets alone; one that does not is named."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.makers import GroupMaker
from actors.rollout import Rollout
from cluster.cli import run_command_line
from cluster.own_rewards import open_rewards
from cluster.replay import make_score, replay
from cluster.run_dir import read_recipe
from cluster.verify import verify_record
from diffusion.chain import Chain
from diffusion.policy import Policy
from diffusion.weights import pack, weights_digest
from learner.checkpoint import Meta, begin, commit
from learner.collect import Counts
from learner.journal import ledger_row
from learner.receipts import receipt_of
from protocol.errors import VerifyError
from protocol.recipe import Recipe
from protocol.recipe_file import dump_recipe, parse_recipe
from protocol.tickets import Source, TicketPlan
from tests.models import make_tiny_model

ROUNDS, GROUPS = 3, 3
PROMPTS = ("a red seven", "a blue one", "a green two")
ALL = 100
"""More groups than there are."""

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def a_recipe(model: Path) -> Recipe:
    document = {
        "rounds": ROUNDS,
        "model": {"path": str(model)},
        "prompts": {"train": "prompts.txt"},
        "batch": {"num_groups": GROUPS, "group_size": 2},
        "sampler": {"num_steps": 3},
        "rewards": [{"name": "jpeg_compressibility", "weight": 2.0}, {"name": "jpeg_incompressibility"}],
        "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
    }
    return parse_recipe(document, source="test")


def make_run(folder: Path, recipe: Recipe) -> None:
    """Writes a run of three rounds at lag 0 that has kept versions 1 and 3, whose groups a rollout has made."""
    torch.set_num_threads(recipe.rollout_worker.threads)
    policy = Policy.from_recipe(recipe)
    first = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}
    states = [{name: tensor + 0.1 * version for name, tensor in first.items()} for version in range(ROUNDS + 1)]
    digests = [weights_digest(state) for state in states]
    plan = TicketPlan(recipe.seed, (Source.of_prompts(PROMPTS),), GROUPS, recipe.batch.group_size, recipe.lag)
    chain = Chain(policy, recipe.sampler)
    with open_rewards(recipe, recipe.rewards) as functions:
        score = make_score(recipe.rewards, functions, folder)
    rollout = Rollout(chain, GroupMaker(chain, recipe), lambda ticket: pack(states[ticket.version]), score, "0")
    (folder / "run.json").write_text(json.dumps({"run_id": "abc", "attempt": 0, "started": 0.0}))
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for round_ in range(ROUNDS):
        groups = [
            rollout.complete(rollout.sample(ticket, lambda: None)) for ticket in plan.round(round_, digests[round_])
        ]
        row = ledger_row(round_, [receipt_of(group) for group in groups], digests[round_ + 1], Counts(), world_size=1)
        for name, line in (("ledger", row), ("metrics", {"round": round_})):
            with (folder / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
    for version in (1, 3):
        meta = Meta(version, version, 0, 1, 0, "fp32", {str(version): digests[version]}, {})
        commit(begin(folder, version), meta, {version: pack(states[version])}, keep_last=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, a_recipe(make_tiny_model(tmp_path_factory.mktemp("replay") / "model")))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A run of its own for each test."""
    return shutil.copytree(made, tmp_path / "run")


def change(run: Path, how: Callable[[Rows], object]) -> None:
    """Rewrites the ledger."""
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    how(rows)
    (run / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def on_other_threads(row: dict[str, Any]) -> None:
    """Says of a row's groups that they were made on two threads."""
    row["fingerprints"] = [text.replace('"threads":1', '"threads":2') for text in row["fingerprints"]]


@pytest.mark.parametrize("threads", [1, 2])
def test_groups_come_out_again_however_many_threads_the_caller_has(run: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    told = replay(verify_record(run), ALL, seed=0)
    assert told["replayed"] == "6 of 6 groups drawn, all bit-identical"
    assert told["can be replayed"].startswith("2 of 3 rounds")
    assert "not comparable" not in told
    assert torch.get_num_threads() == threads


def test_as_many_groups_are_made_again_as_are_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["verify", str(run), "--replay", "2", "--seed", "5"]) == 0
    assert "2 of 2 groups drawn" in capsys.readouterr().out


def test_a_flipped_digit_of_a_checksum_is_found_with_who_made_the_group(run: Path) -> None:
    def flip(rows: Rows) -> None:
        checksum = rows[1]["checksums"][2]
        rows[1]["checksums"][2] = f"{int(checksum[0], 16) ^ 1:x}{checksum[1:]}"

    before = json.loads((run / "ledger.jsonl").read_text().splitlines()[1])["checksums"][2]
    change(run, flip)
    with pytest.raises(VerifyError) as refused:
        replay(verify_record(run), ALL, seed=0)
    headline, *lines = str(refused.value).splitlines()
    assert headline.endswith("violations: 1")
    (line,) = lines
    assert "ticket 000001-0002" in line
    assert f"worker 0 on host {socket.gethostname()}" in line
    assert f"Expected: {before}," in line


def test_groups_made_on_another_fingerprint_are_counted_and_not_compared(run: Path) -> None:
    change(run, lambda rows: (on_other_threads(rows[0]), rows[0].update(checksums=["0" * 64] * GROUPS)))
    told = replay(verify_record(run), ALL, seed=0)
    assert told["replayed"] == "3 of 6 groups drawn, all bit-identical"
    assert told["not comparable"] == "3 made on threads 2 (here 1)"


def test_where_nothing_can_be_compared_it_says_what_to_do(run: Path) -> None:
    change(run, lambda rows: [on_other_threads(row) for row in rows])
    with pytest.raises(VerifyError) as refused:
        replay(verify_record(run), 2, seed=0)
    told = str(refused.value)
    assert "none of the 2 groups drawn can be compared" in told
    assert "2 made on threads 2 (here 1)" in told
    assert f"To do: verify on {socket.gethostname()} or a machine like it" in told


def test_other_prompts_than_the_runs_are_found(run: Path) -> None:
    (run / "prompts.txt").write_text("a red eight\na blue one\na green two\n")
    with pytest.raises(VerifyError) as refused:
        replay(verify_record(run), ALL, seed=0)
    assert str(refused.value).splitlines()[0].endswith("violations: 2")


def test_a_version_0_that_is_not_what_recipe_and_seed_make_is_found(run: Path) -> None:
    recipe = read_recipe(run).model_copy(update={"seed": 1})
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    with pytest.raises(VerifyError) as refused:
        replay(verify_record(run), ALL, seed=0)
    assert "digest of version 0 as loaded here" in str(refused.value)
