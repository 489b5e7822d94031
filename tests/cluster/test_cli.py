"""Bad input is refused with what, value, expected and what to do; nothing starts and nothing is left behind."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cluster.cli import run_command_line
from cluster.driver import default_run_dir
from cluster.redis_server import RedisServer
from protocol.recipe_file import dump_recipe, load_recipe
from tests.models import make_tiny_model

ROOT = Path(__file__).parents[2]
RECIPE = {
    "rounds": 2,
    "model": {"path": "model"},
    "prompts": {"train": "prompts.txt"},
    "batch": {"num_groups": 4, "group_size": 4},
    "sampler": {"num_steps": 4},
    "rewards": [{"name": "jpeg_compressibility"}],
    "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
}

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture
def desk(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a recipe that would run, its model and its prompts."""
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "prompts.txt").write_text("a red seven\na blue one\n")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


@pytest.fixture
def refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused; returns the message. A traceback comes with --debug alone."""

    def refused_(*arguments: str) -> str:
        before = {path: path.lstat().st_mtime_ns for path in desk.rglob("*")}
        assert run_command_line(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert "Traceback" not in message
        assert run_command_line([*arguments, "--debug"]) == 2
        debugging = capsys.readouterr().err
        assert debugging.startswith(message)
        assert "Traceback (most recent call last)" in debugging
        assert {path: path.lstat().st_mtime_ns for path in desk.rglob("*")} == before
        return message

    return refused_


def train(*overrides: str) -> tuple[str, ...]:
    return ("train", "recipe.yaml", "--run-dir", "run", *overrides)


# --- the recipe -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("learner.zerostage=1", ["unknown key learner.zerostage", "Did you mean zero_stage?", "Legal keys here"]),
        ("seeed=1", ["unknown key seeed", "Did you mean seed?"]),
        ("rounds=0", ["rounds", "greater than or equal to 1", "0"]),
        ("rounds=many", ["rounds", "'many'"]),
        ("lag=-1", ["lag", "greater than or equal to 0", "-1"]),
        ("batch.group_size=1", ["batch.group_size", "1", "at least 2"]),
        ("learner.world_size=3", ["batch.num_groups", "4 groups do not divide evenly", "multiple of 3"]),
        ("learner.learning_rate=.nan", ["learner.learning_rate", "nan"]),
        ("learner.learning_rate=-1", ["learner.learning_rate", "greater than 0"]),
        ("sampler.eta=0", ["eta 0", "stochastic sampler"]),
        ("learner.zero_stage=4", ["learner.zero_stage", "4"]),
        ("algorithm.name=pdrp", ["algorithm.name is none of prdp, policy_gradient", "Did you mean prdp?", "'pdrp'"]),
        ("algorithm.kl_weight=0", ["algorithm.kl_weight: Input should be greater than 0"]),
        ("algorithm={name: spin}", ["algorithm.iterations is missing"]),
        ("data=[{path: nowhere}]", ["prdp cannot learn from a dataset of images in data; it needs prompts.train"]),
        ("prompts={}", ["there is nothing to learn from: algorithm prdp needs prompts.train"]),
        ("redis.num_shards=3", ["num_shards"]),
        ("redis.maxmemory_bytes=1000", ["redis.maxmemory_bytes", "1000", "at least"]),
        ("rewards=[]", ["rewards: algorithm prdp learns from rewards, so that at least one is needed"]),
        ("rewards.0.weight=0", ["every weight is 0"]),
        ("rewards.1.weight=2", ["'1' does not name an entry of a list"]),
        ("rounds.two=2", ["override rounds.two", "2"]),
        ("rounds=[", ["rounds", "not YAML"]),
        ("=3", ["key.sub=value"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_impossible_setting_is_refused_by_name(refused: Refused, override: str, told: list[str]) -> None:
    if override == "redis.num_shards=3":
        message = refused(*train(override, "learner.world_size=2"))
    else:
        message = refused(*train(override))
    assert all(words in message for words in told), message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"rounds: [", "cannot be read"),
        (b"- 1\n- 2\n", "Expected: a YAML mapping"),
        (b"", "Expected: a YAML mapping"),
        (b"rounds: \xff\xfe\n", "cannot be read"),
        (b"rounds: 2\n", "batch is missing"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(refused: Refused, desk: Path, content: bytes, told: str) -> None:
    (desk / "recipe.yaml").write_bytes(content)
    message = refused(*train())
    assert "recipe.yaml" in message
    assert told in message


def test_a_missing_recipe_is_refused_and_those_that_there_are_are_named(refused: Refused) -> None:
    message = refused("train", "recipes/tiny_prpd.yaml")
    assert "recipes/tiny_prpd.yaml does not exist" in message
    assert "recipes/tiny_prdp.yaml" in message


# --- models and prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nowhere", "prompts.txt", "."])
def test_a_path_that_holds_no_model_is_refused(refused: Refused, path: str) -> None:
    message = refused(*train(f"model.path={path}"))
    assert repr(path) in message
    assert "model_index.json" in message
    assert "To do: correct model.path" in message


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["missing", "torn", "empty"])
def test_a_model_folder_without_a_readable_unet_is_refused(
    refused: Refused, desk: Path, model: Path, content: str | None
) -> None:
    shutil.copytree(model, desk / "broken")
    config = desk / "broken" / "unet" / "config.json"
    config.unlink() if content is None else config.write_text(content)
    message = refused(*train("model.path=./broken"))
    assert str(desk / "broken") in message
    assert "unet/config.json" in message


@pytest.mark.parametrize("key", ["train", "held_out"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "bad.txt does not exist"),
        (b"", "has no prompts"),
        (b"\n  \n# a comment\n", "has no prompts"),
        (b"a red \xff seven\n", "is not text: invalid start byte at byte 6"),
    ],
    ids=["missing", "empty", "comments", "binary"],
)
def test_a_prompt_file_that_cannot_be_used_is_refused(
    refused: Refused, desk: Path, key: str, content: bytes | None, told: str
) -> None:
    if content is not None:
        (desk / "bad.txt").write_bytes(content)
    assert told in refused(*train(f"prompts.{key}=bad.txt"))


def test_a_dataset_that_is_not_there_is_refused(refused: Refused, desk: Path) -> None:
    message = refused(*train("algorithm={name: sft}", "data=[{path: ./nowhere}]"))
    assert "there is no dataset here. Got: './nowhere'" in message
    assert f"looked up from {desk}" in message


# --- rewards --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("jpeg_compresibility", ["did you mean jpeg_compressibility?", "digit_alignment", "./file.py:Name"]),
        ("./nowhere.py:Score", ["nowhere.py does not exist"]),
        ("./broken.py:Score", ["broken.py cannot be imported: ZeroDivisionError: division by zero"]),
        ("./mine.py:Scores", ["mine.py has no class or function Scores", "one of Score"]),
        ("no_such_package.scores:Score", ["no_such_package", "ModuleNotFoundError"]),
        ("rewards.mine:Score", ["rewards is a package of sfumato's", "./file.py:Name"]),
    ],
)
def test_a_reward_that_cannot_be_imported_is_refused(
    refused: Refused, desk: Path, name: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (desk / "mine.py").write_text("class Score:\n    pass\n")
    (desk / "broken.py").write_text("1 / 0\n")
    message = refused(*train(f"rewards=[{{name: '{name}'}}]"))
    assert all(words in message for words in told), message


def test_two_rewards_of_one_name_are_refused(refused: Refused) -> None:
    message = refused(*train("rewards=[{name: './a.py:Score'}, {name: './b.py:Score'}]"))
    assert "two rewards are called Score" in message


# --- Redis ----------------------------------------------------------------------------------------------


def test_a_redis_that_nobody_serves_is_refused(refused: Refused) -> None:
    message = refused(*train("redis.url=redis://:secret@127.0.0.1:1/0"))
    assert "the connection failed (Redis at redis://127.0.0.1:1/0)" in message
    assert "secret" not in message


def test_a_redis_that_refuses_the_password_is_refused(refused: Refused, redis_server: RedisServer) -> None:
    message = refused(*train(f"redis.url=redis://:guessed@127.0.0.1:{redis_server.port}/0"))
    assert "the server refuses us" in message
    assert "check user and password" in message
    assert "guessed" not in message


def test_a_redis_that_is_too_small_for_the_recipe_is_refused(refused: Refused, desk: Path) -> None:
    with RedisServer(desk / ".." / f"{desk.name}-redis", maxmemory_bytes=8 * 2**20) as server:
        message = refused(*train(f"redis.url={server.url}"))
    assert "too small for what may be in flight" in message
    assert f"maxmemory {8 * 2**20}" in message


# --- run directories ------------------------------------------------------------------------------------


def make_run(folder: Path, *overrides: str) -> None:
    """Writes what marks a run's directory."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run_id": "abc", "attempt": 0, "started": 0.0}))
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe("recipe.yaml", overrides)))
    (folder / "prompts.txt").write_text("a red seven\n")


def test_a_directory_that_holds_a_run_is_refused(refused: Refused, desk: Path) -> None:
    make_run(desk / "run")
    (desk / "run" / "ledger.jsonl").touch()
    message = refused(*train())
    assert "already holds a run" in message
    assert str(desk / "run") in message
    assert "--resume" in message


def test_a_directory_of_other_things_is_refused(refused: Refused, desk: Path) -> None:
    (desk / "run").mkdir()
    (desk / "run" / "thesis.tex").write_text("irreplaceable")
    assert "not empty and holds no run of ours" in refused(*train())


def test_a_run_directory_that_is_a_file_is_refused(refused: Refused, desk: Path) -> None:
    (desk / "run").write_text("")
    assert "the run directory is a file" in refused(*train())


def test_a_run_directory_below_a_file_is_refused(refused: Refused) -> None:
    assert "prompts.txt" in refused("train", "recipe.yaml", "--run-dir", "prompts.txt/run")


@pytest.mark.parametrize("folder", ["ray", "scratch"])
def test_a_run_directory_in_a_ray_session_is_refused(refused: Refused, desk: Path, folder: str) -> None:
    session = desk / folder / "session_2026-01-01_00-00-00_000000_1"
    session.mkdir(parents=True)
    message = refused("train", "recipe.yaml", "--run-dir", str(session / "run"))
    assert "inside Ray's session folder" in message
    assert "give one with --run-dir" in message


def test_a_job_without_a_place_for_its_runs_is_told_how_to_give_one(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFUMATO_RUNS", str(desk / "ray" / "session_2026-01-01_00-00-00_000000_1"))
    assert run_command_line(["train", "recipe.yaml"]) == 2
    message = capsys.readouterr().err
    assert not (desk / "ray").exists()
    assert "inside Ray's session folder" in message
    assert "--run-dir, or set SFUMATO_RUNS" in message


def test_runs_are_kept_where_the_environment_says(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_run_dir(Path("recipes/mine.yaml")).parent == Path("runs")
    monkeypatch.setenv("SFUMATO_RUNS", "/mnt/runs")
    assert default_run_dir(Path("recipes/mine.yaml")).parent == Path("/mnt/runs")


def test_a_redis_url_of_a_variable_that_is_not_set_is_refused(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SFUMATO_REDIS_URL", raising=False)
    message = refused(*train("redis.url=env:SFUMATO_REDIS_URL"))
    assert "environment variable that is not set here" in message


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("10.0.0.4", "Expected: host:port"),
        ("ray://10.0.0.4:10001", "`ray job submit` sets it there"),
        ("127.0.0.1:1", "no Ray head answers at RAY_ADDRESS"),
        ("127.0.0.1:99999999", "no Ray head answers at RAY_ADDRESS"),
    ],
)
def test_a_cluster_that_nobody_can_join_is_refused(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, address: str, told: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    message = refused(*train())
    assert told in message
    assert repr(address) in message


def test_a_directory_that_another_driver_uses_is_refused(refused: Refused, desk: Path) -> None:
    make_run(desk / "run")
    with (desk / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another driver" in refused(*train("--resume"))


def test_resuming_a_run_of_another_recipe_is_refused_with_the_keys_that_differ(refused: Refused, desk: Path) -> None:
    make_run(desk / "run")
    message = refused(*train("--resume", "learner.learning_rate=1e-3", "seed=5"))
    assert "made with another recipe, which differs in learner.learning_rate, seed." in message


def test_resuming_where_there_is_no_run_is_refused(refused: Refused) -> None:
    assert "there is no run to resume" in refused(*train("--resume"))


def test_resuming_without_saying_which_run_is_refused(refused: Refused) -> None:
    assert "add --run-dir DIR" in refused("train", "recipe.yaml", "--resume")


# --- the other commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "digest", "verify"])
def test_a_folder_that_is_no_run_is_refused(refused: Refused, desk: Path, command: str) -> None:
    (desk / "folder").mkdir()
    for path in ("folder", "nowhere", "prompts.txt"):
        message = refused(command, path)
        assert "not a run directory" in message
        assert path in message


def test_a_run_that_has_published_nothing_yet_has_no_digest(refused: Refused, desk: Path) -> None:
    make_run(desk / "run")
    assert "has not published a version yet" in refused("digest", "run")


def ledger_line(round_: int) -> str:
    row = {"round": round_, "version": round_, "digest": f"d{round_}", "published_version": round_ + 1}
    return json.dumps({**row, "published_digest": f"d{round_ + 1}"}) + "\n"


def test_the_digest_is_the_last_line_and_any_version_can_be_asked_for(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(desk / "run")
    (desk / "run" / "ledger.jsonl").write_text(ledger_line(0) + ledger_line(1))
    for arguments, digest in (((), "d2"), (("--version", "0"), "d0"), (("--version", "1"), "d1")):
        assert run_command_line(["digest", "run", *arguments]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == digest


def test_a_version_that_a_run_does_not_have_is_refused(refused: Refused, desk: Path) -> None:
    make_run(desk / "run")
    (desk / "run" / "ledger.jsonl").write_text(ledger_line(0))
    message = refused("digest", "run", "--version", "7")
    assert "Got: 7" in message
    assert "from 0 to 1" in message


def test_a_line_of_the_ledger_that_is_still_being_written_does_not_count(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(desk / "run")
    (desk / "run" / "ledger.jsonl").write_text(ledger_line(0) + ledger_line(1)[:30])
    assert run_command_line(["digest", "run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "d1"


def test_a_line_of_the_ledger_that_cannot_be_read_is_named(refused: Refused, desk: Path) -> None:
    make_run(desk / "run")
    (desk / "run" / "ledger.jsonl").write_text(ledger_line(0) + "{\n" + ledger_line(2))
    message = refused("digest", "run")
    assert "the ledger of the run run cannot be read" in message
    assert "ledger.jsonl, line 2" in message


def test_evaluating_needs_prompts_and_a_checkpoint(refused: Refused, desk: Path) -> None:
    make_run(desk / "run")
    assert "there are no prompts to evaluate on" in refused("evaluate", "run")
    assert "no checkpoint yet" in refused("evaluate", "run", "--prompts", "prompts.txt")
    assert "nowhere.txt does not exist" in refused("evaluate", "run", "--prompts", "nowhere.txt")


def test_an_evaluation_that_could_not_be_written_is_refused_before_it_is_made(refused: Refused, desk: Path) -> None:
    make_run(desk / "run")
    message = refused("evaluate", "run", "--prompts", "prompts.txt", "--json", "nowhere/result.json")
    assert f"{desk}/nowhere of --json does not exist" in message


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--num-images", "0"], ["--num-images", "Got: 0"]),
        (["--num-steps", "0"], ["num_steps", "0"]),
        (["--guidance-scale", "nan"], ["guidance_scale", "nan"]),
        (["--out", "nowhere/picture.png"], ["--out", "nowhere/picture.png"]),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_refused(refused: Refused, options: list[str], told: list[str]) -> None:
    message = refused("sample", "model", "--prompt", "a red seven", "--out", "picture.png", *options)
    assert all(words in message for words in told), message


def test_sampling_from_what_is_neither_a_run_nor_a_model_is_refused(refused: Refused) -> None:
    message = refused("sample", "nowhere", "--prompt", "a red seven", "--out", "picture.png")
    assert "neither a run directory nor a model" in message
    assert "'nowhere'" in message


# --- what is light --------------------------------------------------------------------------------------

WITHOUT_HEAVY_IMPORTS = """
import contextlib, io, sys
import sfumato
sys.argv = ["sfumato", *sys.argv[1:]]
with contextlib.suppress(SystemExit):
    sfumato.main()
heavy = {"torch", "ray", "redis", "diffusers", "transformers", "deepspeed", "peft", "sklearn"} & set(sys.modules)
sys.exit(f"imported: {sorted(heavy)}" if heavy else 0)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["verify", "--help"],
        ["train", "recipe.yaml", "--dry-run"],
        ["train", "recipe.yaml", "--dry-run", "lag=-1"],
        ["train", "recipes/tiny_prdp.yaml", "--dry-run"],
    ],
    ids=" ".join,
)
def test_a_light_command_imports_nothing_heavy_and_writes_nothing(desk: Path, arguments: list[str]) -> None:
    before = set(desk.rglob("*"))
    command = [sys.executable, "-B", "-c", WITHOUT_HEAVY_IMPORTS, *arguments]
    done = subprocess.run(command, cwd=desk, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert set(desk.rglob("*")) == before


def test_a_dry_run_prints_every_derived_number_and_starts_nothing(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(desk.rglob("*"))
    assert run_command_line(["train", "recipe.yaml", "--dry-run", "rounds=3", "--run-dir", "run"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    numbers = dict(line.split("  ", 1) for line in lines)
    assert numbers["images sampled a round, at most"].strip() == "16 (4 groups of 4), 48 in all"
    assert numbers["scored steps of a trajectory"].strip() == "3 of 4"
    assert numbers["latent shape, entries"].strip() == "(4, 8, 8), 256"
    assert set(desk.rglob("*")) == before


@pytest.mark.parametrize("name", ["jpeg_compresibility", "./nowhere.py:Score"])
def test_a_dry_run_refuses_a_reward_that_is_not_there(refused: Refused, name: str) -> None:
    assert name in refused(*train(f"rewards=[{{name: '{name}'}}]", "--dry-run"))


def test_overrides_may_stand_before_and_after_options(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["train", "recipe.yaml", "rounds=3", "--dry-run", "batch.num_groups=8"]) == 0
    assert "32 (8 groups of 4), 96 in all" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["trian"], ["train"], ["train", "recipe.yaml", "--dyr-run"], ["sample", "model"]]
)
def test_a_command_line_that_is_not_ours_is_refused_with_the_usage(
    desk: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(arguments)
    assert ended.value.code == 2
    assert "usage: sfumato" in capsys.readouterr().err


def test_version_names_the_release(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command_line(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("sfumato ")
