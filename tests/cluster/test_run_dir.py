"""A run directory has one driver and one run, and tells no secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.run_dir import RunDir, read_recipe
from cluster.sources import prepare_sources, read_plan
from cluster.wanted import Wanted, read_wanted, scale
from protocol.datasets import Item, Manifest
from protocol.errors import RecipeError, RunDirError
from protocol.paths import manifest_path
from protocol.recipe import Recipe
from protocol.recipe_file import load_recipe, parse_recipe
from protocol.roles import Rollouts
from protocol.tickets import Source


def make_recipe(prompts: Path, /, **changes: object) -> Recipe:
    document = {
        "rounds": 2,
        "prompts": {"train": str(prompts)},
        "batch": {"num_groups": 4, "group_size": 4},
        "rewards": [{"name": "jpeg_compressibility"}],
        "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
    }
    return parse_recipe(document | changes, source="test")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a red seven\n")
    return tmp_path / "prompts.txt"


@pytest.fixture
def recipe(prompts: Path) -> Recipe:
    return make_recipe(prompts)


def start(path: Path, recipe: Recipe, *, resume: bool = False) -> RunDir:
    """Opens a run directory and lets go of it, as a driver does that ends."""
    opened = RunDir(path, recipe, resume=resume)
    opened.release()
    return opened


def test_a_new_directory_holds_the_recipe_and_the_runs_name(tmp_path: Path, recipe: Recipe) -> None:
    opened = start(tmp_path / "some" / "run", recipe)
    run = json.loads((opened.path / "run.json").read_text())
    assert (run["run_id"], run["attempt"]) == (opened.run_id, 0)
    assert read_recipe(opened.path) == load_recipe(opened.path / "recipe.yaml") == recipe


def test_two_runs_have_two_names(tmp_path: Path, recipe: Recipe) -> None:
    assert start(tmp_path / "a", recipe).run_id != start(tmp_path / "b", recipe).run_id


def test_an_empty_directory_may_be_used(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "run").mkdir()
    start(tmp_path / "run", recipe)


def test_a_relative_path_becomes_absolute(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert start(Path("run"), recipe).path == tmp_path / "run"


def test_resuming_keeps_the_name_and_counts_the_attempt(tmp_path: Path, recipe: Recipe) -> None:
    first = start(tmp_path / "run", recipe)
    second = start(tmp_path / "run", recipe, resume=True)
    third = RunDir(tmp_path / "run", recipe, resume=True)
    assert first.run_id == second.run_id == third.run_id
    assert [first.attempt, second.attempt, third.attempt] == [0, 1, 2]
    assert third.next_attempt() == 3
    third.release()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["attempt"] == 3


def test_a_prompt_file_that_has_changed_does_not_change_a_resumed_run(
    tmp_path: Path, recipe: Recipe, prompts: Path
) -> None:
    prepare_sources(recipe, start(tmp_path / "run", recipe).path, print)
    prompts.write_text("something else\n")
    prepare_sources(recipe, start(tmp_path / "run", recipe, resume=True).path, print)
    assert (tmp_path / "run" / "prompts.txt").read_text() == "a red seven\n"
    assert read_plan(recipe, tmp_path / "run").sources == (Source.of_prompts(("a red seven",)),)


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_driver_is_refused_until_the_first_lets_go(tmp_path: Path, recipe: Recipe, resume: bool) -> None:
    first = RunDir(tmp_path / "run", recipe, resume=False)
    with pytest.raises(RunDirError):
        RunDir(tmp_path / "run", recipe, resume=resume)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["attempt"] == 0
    first.release()
    start(tmp_path / "run", recipe, resume=True)


@pytest.mark.parametrize(
    "changes",
    [{"rounds": 9}, {"rollouts": 3}, {"redis": {"claim_idle_s": 1.0}}, {"checkpoints": {"every_rounds": 1}}],
    ids=str,
)
def test_what_weights_do_not_depend_on_may_change_on_resume(
    tmp_path: Path, recipe: Recipe, prompts: Path, changes: dict[str, object]
) -> None:
    start(tmp_path / "run", recipe)
    changed = make_recipe(prompts, **changes)
    resumed = start(tmp_path / "run", changed, resume=True)
    assert read_recipe(resumed.path) == changed


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"lag": 1}, "lag"),
        ({"batch": {"num_groups": 8, "group_size": 4}}, "batch.num_groups"),
        ({"sampler": {"eta": 0.5}}, "sampler.eta"),
        ({"learner": {"micro_batch_size": 2}}, "learner.micro_batch_size"),
        ({"learner": {"threads": 2}}, "learner.threads"),
        ({"rewards": [{"name": "jpeg_compressibility", "weight": 2.0}]}, "rewards"),
        ({"model": {"trainable": {"form": "full"}}}, "model.trainable.form"),
    ],
    ids=str,
)
def test_what_weights_depend_on_may_not_change_on_resume(
    tmp_path: Path, recipe: Recipe, prompts: Path, changes: dict[str, object], key: str
) -> None:
    start(tmp_path / "run", recipe)
    with pytest.raises(RunDirError, match=rf"differs in .*{key}"):
        RunDir(tmp_path / "run", make_recipe(prompts, **changes), resume=True)
    assert read_recipe(tmp_path / "run") == recipe


def test_the_number_of_rounds_may_not_change_where_learning_rates_follow_from_it(tmp_path: Path, prompts: Path) -> None:
    decaying = {"learner": {"decay": "linear"}}
    start(tmp_path / "run", make_recipe(prompts, **decaying))
    with pytest.raises(RunDirError, match=r"differs in rounds\."):
        RunDir(tmp_path / "run", make_recipe(prompts, rounds=9, **decaying), resume=True)


def test_a_password_is_not_written_down(tmp_path: Path, prompts: Path) -> None:
    secret = make_recipe(prompts, redis={"url": "rediss://me:s3cret@redis.example:6380/2"})
    opened = start(tmp_path / "run", secret)
    assert not any("s3cret" in file.read_text() for file in opened.path.rglob("*") if file.is_file())
    assert read_recipe(opened.path).redis.url == "rediss://redis.example:6380/2"
    start(tmp_path / "run", secret, resume=True)


def test_a_link_into_rays_session_folder_is_seen_through(tmp_path: Path, recipe: Recipe) -> None:
    session = tmp_path / "ray" / "session_latest_1"
    session.mkdir(parents=True)
    (tmp_path / "harmless").symlink_to(session)
    with pytest.raises(RunDirError, match="inside Ray's session folder"):
        RunDir(tmp_path / "harmless" / "run", recipe, resume=False)
    assert list(session.iterdir()) == []


def test_a_redis_url_of_the_environment_is_kept_by_its_variables_name(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFUMATO_REDIS_URL", "redis://:hush@host:6380/0")
    start(tmp_path / "run", make_recipe(prompts, redis={"url": "env:SFUMATO_REDIS_URL"}))
    assert read_recipe(tmp_path / "run").redis.url == "env:SFUMATO_REDIS_URL"
    assert not any("hush" in file.read_text() for file in (tmp_path / "run").rglob("*") if file.is_file())


def test_a_driver_hears_what_is_wanted_and_the_next_one_starts_afresh(tmp_path: Path, recipe: Recipe) -> None:
    driven = RunDir(tmp_path / "run", recipe, resume=False)
    label = recipe.rewards[0].label
    assert read_wanted(driven.path) == Wanted()
    scale(driven.path, "3", [])
    assert read_wanted(driven.path) == Wanted(Rollouts(min=3, max=3))
    scale(driven.path, None, [f"{label}=4"])
    scale(driven.path, "2:16", [])
    assert read_wanted(driven.path) == Wanted(Rollouts(min=2, max=16), {label: 4})
    driven.release()
    assert read_wanted(start(driven.path, recipe, resume=True).path) == Wanted()


def test_only_a_run_that_is_going_on_can_be_scaled(tmp_path: Path, recipe: Recipe) -> None:
    ended = start(tmp_path / "run", recipe)
    with pytest.raises(RunDirError, match="no driver is running this run"):
        scale(ended.path, "2", [])
    with pytest.raises(RunDirError, match="not a run directory"):
        scale(tmp_path, "2", [])
    assert read_wanted(ended.path) == Wanted()


@pytest.mark.parametrize(
    ("rollouts", "rewards", "message"),
    [
        (None, [], "nothing to scale"),
        ("0", [], r"--rollouts: this is no number of actors. Got: '?0'?. Expected: 1 to 1024.*resume"),
        ("-1", [], "--rollouts: this is no number"),
        ("two", [], "--rollouts: this is no number"),
        ("1025", [], "--rollouts: this is no number"),
        ("0:4", [], "--rollouts: this is no number"),
        ("2:", [], "--rollouts: this is no number"),
        ("5:4", [], "the minimum is above the maximum"),
        ("2", ["beauty=3"], r"the run has no reward beauty. Expected: one of jpeg_compressibility"),
        ("2", ["jpeg_compressibility=0"], "--reward jpeg_compressibility: this is no number"),
        ("2", ["jpeg_compressibility=4096"], "--reward jpeg_compressibility: this is no number"),
        ("2", ["jpeg_compressibility"], "not of the form NAME=M"),
    ],
)
def test_a_request_that_is_wrong_in_one_part_asks_for_nothing(
    tmp_path: Path, recipe: Recipe, rollouts: str | None, rewards: list[str], message: str
) -> None:
    driven = RunDir(tmp_path / "run", recipe, resume=False)
    with pytest.raises(RecipeError, match=message):
        scale(driven.path, rollouts, rewards)
    assert read_wanted(driven.path) == Wanted()
    driven.release()


def test_a_run_whose_learner_samples_too_may_be_scaled_to_no_rollout_actor(tmp_path: Path, prompts: Path) -> None:
    driven = RunDir(tmp_path / "run", make_recipe(prompts, rollouts=0), resume=False)
    for text, bounds in (("2", (2, 2)), ("0:4", (0, 4)), ("0", (0, 0))):
        assert scale(driven.path, text, []).rollouts == Rollouts(min=bounds[0], max=bounds[1])
    driven.release()


def test_a_resume_may_change_the_number_of_rollout_actors_to_bounds(tmp_path: Path, prompts: Path) -> None:
    start(tmp_path / "run", make_recipe(prompts, rollouts=4))
    resumed = start(tmp_path / "run", make_recipe(prompts, rollouts={"max": 16}), resume=True)
    assert read_recipe(resumed.path).rollouts == Rollouts(min=1, max=16)


def test_another_layout_of_the_learner_is_taken_with_a_notice(tmp_path: Path, prompts: Path) -> None:
    start(tmp_path / "run", make_recipe(prompts, learner={"world_size": 2}))
    assert start(tmp_path / "run", make_recipe(prompts, learner={"world_size": 2}), resume=True).notice is None
    again = start(tmp_path / "run", make_recipe(prompts, learner={"zero_stage": 2}), resume=True)
    assert again.notice is not None
    assert "world_size 2 -> 1, zero_stage 0 -> 2" in again.notice


def test_a_run_that_failed_before_its_first_round_leaves_a_directory_for_another(
    tmp_path: Path, recipe: Recipe, prompts: Path
) -> None:
    failed = start(tmp_path / "run", recipe)
    prepare_sources(recipe, failed.path, print)
    Manifest((Item(0, "a red seven", ("3b1f",)),), ()).write(manifest_path(failed.path, 0))
    (failed.path / "samples").mkdir()
    other = start(tmp_path / "run", make_recipe(prompts, seed=1))
    assert other.run_id != failed.run_id
    assert read_recipe(other.path).seed == 1
    assert sorted(path.name for path in other.path.iterdir()) == [".lock", "recipe.yaml", "run.json"]
    (other.path / "ledger.jsonl").touch()
    with pytest.raises(RunDirError, match="already holds a run"):
        RunDir(tmp_path / "run", recipe, resume=False)
    assert read_recipe(other.path).seed == 1


WATCHED = {
    "firewall": {"every_rounds": 1, "rewards": [{"name": "image_diversity"}], "on_trip": "roll_back"},
    "rounds": 2,
}


@pytest.mark.parametrize("on_trip", ["warn", "roll_back", "stop"])
def test_what_a_firewall_does_may_change_on_resume_and_what_it_looks_at_may_not(
    tmp_path: Path, prompts: Path, on_trip: str
) -> None:
    firewall = WATCHED["firewall"] | {"on_trip": on_trip}
    start(tmp_path / "run", make_recipe(prompts, firewall=firewall))
    start(tmp_path / "run", make_recipe(prompts, firewall=firewall), resume=True)
    decided = firewall | {"on_trip": "warn", "margin": 2.0, "max_roll_backs": 3}
    start(tmp_path / "run", make_recipe(prompts, firewall=decided), resume=True)
    pool = [{"name": "image_diversity", "replicas": 2, "timeout_s": 9.0}]
    start(tmp_path / "run", make_recipe(prompts, firewall=firewall | {"rewards": pool}), resume=True)
    others = [{"num_prompts": 3}, {"images_per_prompt": 2}, {"rewards": [{"name": "jpeg_incompressibility"}]}]
    for change in others:
        with pytest.raises(RunDirError, match=r"differs in firewall"):
            start(tmp_path / "run", make_recipe(prompts, firewall=firewall | change), resume=True)
    with pytest.raises(RunDirError, match=r"differs in evaluation.seed"):
        start(tmp_path / "run", make_recipe(prompts, firewall=firewall, evaluation={"seed": 1}), resume=True)
    with pytest.raises(RunDirError, match=r"differs in evaluation, firewall|differs in evaluation.seed, firewall"):
        start(tmp_path / "run", make_recipe(prompts), resume=True)


def test_more_rounds_may_be_asked_for_unless_rates_follow_from_their_number(tmp_path: Path, prompts: Path) -> None:
    start(tmp_path / "run", make_recipe(prompts))
    start(tmp_path / "run", make_recipe(prompts, rounds=9), resume=True)
    linear = {"learner": {"decay": "linear"}}
    start(tmp_path / "other", make_recipe(prompts, **linear))
    start(tmp_path / "other", make_recipe(prompts, **linear), resume=True)
    with pytest.raises(RunDirError, match="differs in rounds"):
        start(tmp_path / "other", make_recipe(prompts, rounds=9, **linear), resume=True)


def test_scores_of_a_false_start_are_not_read_by_the_next_run(tmp_path: Path, recipe: Recipe, prompts: Path) -> None:
    failed = start(tmp_path / "run", recipe)
    (failed.path / "scores" / "judge").mkdir(parents=True)
    (failed.path / "scores" / "judge" / "000000-0000-aa.json").write_text("{}")
    start(tmp_path / "run", make_recipe(prompts, seed=1))
    assert not (failed.path / "scores").exists()
