"""What a run leaves: a recipe, a line a round, a chain of digests, checkpoints, pictures and weights for others."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from cluster.grids import CAPTION_PX, CELL_PX, GAP_PX
from cluster.run_dir import read_recipe
from diffusion.policy import Policy
from diffusion.weights import pack, unpack, weights_digest
from learner.checkpoint import checkpoints_in, latest_checkpoint
from protocol.recipe_file import dump_recipe, load_recipe
from tests.end_to_end.conftest import RECIPE
from tests.end_to_end.runs import Driver, Run, finished, sfumato, sfumato_here

METRICS = {
    *("round", "step", "version", "reward/mean", "reward/jpeg_compressibility", "loss", "kl", "grad_norm"),
    *("learning_rate", "clip_fraction", "parity/max_abs", "time/rollout_s", "time/learner_s", "time/wait_s"),
    *("groups/duplicate", "groups/reissued", "groups/dead_letter"),
    *("weights/version", "weights/size_bytes", "weights/publish_s", "weights/fetch_s", "weights/num_fetches"),
}
LATE = ("rounds=6", "lag=1", "learner.world_size=2")
FULL = "model.trainable={form: full}"


@pytest.fixture(scope="session")
def run(train: Callable[..., Run]) -> Run:
    return train("lag=0")


@pytest.fixture(scope="session")
def full_run(train: Callable[..., Run]) -> Run:
    return train(FULL, "learner.learning_rate=1e-4")


def test_its_recipe_loads_back_equal(run: Run, workshop: Path) -> None:
    kept = load_recipe(run.folder / "recipe.yaml")
    assert kept == load_recipe(workshop / "recipe.yaml", ["lag=0"])
    assert dump_recipe(kept) == (run.folder / "recipe.yaml").read_text()
    assert (run.folder / "prompts.txt").read_bytes() == (workshop / "prompts.txt").read_bytes()


def test_metrics_have_every_named_key_a_line_a_round(run: Run) -> None:
    metrics = run.metrics
    assert [row["round"] for row in metrics] == [0, 1, 2]
    assert [row["version"] for row in metrics] == [1, 2, 3]
    assert [row["step"] for row in metrics] == [2, 4, 6]
    assert all(row.keys() >= METRICS for row in metrics)


def test_the_trained_reward_is_the_weighted_sum_of_its_parts(run: Run) -> None:
    for row in run.metrics:
        assert row["reward/mean"] == pytest.approx(100 * row["reward/jpeg_compressibility"], rel=1e-6)


def test_each_rollout_fetches_each_version_once_and_of_a_lora_the_adapters_alone(run: Run, full_run: Run) -> None:
    for each in (run, full_run):
        for row in each.metrics:
            assert (row["weights/version"], row["weights/num_fetches"]) == (row["round"], 1)
            assert row["weights/size_bytes"] == len(pack(each.weights()))
    assert all("lora" in name for name in run.weights())
    assert not any("lora" in name for name in full_run.weights())
    # Of so small a network adapters are a large part.
    assert 3 * run.metrics[0]["weights/size_bytes"] < full_run.metrics[0]["weights/size_bytes"]


@pytest.mark.slow
def test_rollout_and_learner_agree_but_for_the_size_of_their_batches(run: Run, train: Callable[..., Run]) -> None:
    for row in run.metrics + train(*LATE).metrics:
        assert 0 <= row["parity/max_abs"] < 1e-5


@pytest.mark.parametrize(("settings", "lag"), [(("lag=0",), 0), (LATE, 1)], ids=["lag 0", "lag 1"])
def test_each_round_is_sampled_with_the_version_that_its_lag_names(
    train: Callable[..., Run], settings: tuple[str, ...], lag: int
) -> None:
    run = train(*settings)
    digests = run.digests
    assert len(set(digests.values())) == len(digests)
    for round_, row in enumerate(run.ledger):
        assert row["round"] == round_
        assert row["version"] == max(0, round_ - lag)
        assert row["digest"] == digests[row["version"]]
        assert row["published_version"] == round_ + 1
        assert row["tickets"] == [f"{round_:06d}-{index:04d}" for index in range(4)]


def test_only_on_policy_rounds_have_an_unbiased_kl(train: Callable[..., Run]) -> None:
    on_policy = [row["kl"] is not None for row in train(*LATE).metrics]
    assert on_policy == [True, False, False, False, False, False]


def test_checkpoints_hold_the_bytes_of_the_versions_that_the_ledger_names(train: Callable[..., Run]) -> None:
    run = train(*LATE)
    kept = checkpoints_in(run.folder)
    assert [found.meta.round for found in kept] == [4, 6]
    for found in kept:
        versions = [found.meta.round - 1, found.meta.round]
        assert {int(version): digest for version, digest in found.meta.digests.items()} == {
            version: run.digests[version] for version in versions
        }
        for version in versions:
            assert weights_digest(unpack(found.version_bytes(version))) == run.digests[version]


def test_grids_before_and_after_show_the_same_prompts_at_the_same_size(run: Run) -> None:
    before, after = (Image.open(run.folder / "samples" / f"round-{round_:06d}.png") for round_ in (0, 3))
    evaluation = RECIPE["evaluation"]
    width = evaluation["grid_images"] * (CELL_PX + GAP_PX) + GAP_PX
    height = evaluation["grid_prompts"] * (CAPTION_PX + CELL_PX + GAP_PX) + GAP_PX + CAPTION_PX + GAP_PX
    assert before.format == after.format == "PNG"
    assert before.size == after.size == (width, height)
    assert len(before.convert("RGB").getcolors(maxcolors=2**24)) > 100
    assert before.tobytes() != after.tobytes()


def tuned_policy(run: Run, workshop: Path) -> Policy:
    recipe = read_recipe(run.folder)
    policy = Policy(str(workshop / "model"), trainable=recipe.model.trainable, seed=recipe.seed)
    policy.load_trainable_state(run.weights())
    return policy


@torch.no_grad()
def noise_prediction(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    states, embeddings = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 12, 16, generator=generator)
    output: torch.Tensor = unet.eval()(states, torch.tensor([3, 700]), encoder_hidden_states=embeddings).sample
    return output


def test_the_export_gives_a_plain_pipeline_the_tuned_model(run: Run, workshop: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(workshop / "model")
    base = noise_prediction(pipeline.unet)
    pipeline.load_lora_weights(run.folder / "export")
    tuned = noise_prediction(tuned_policy(run, workshop).denoiser)
    torch.testing.assert_close(noise_prediction(pipeline.unet), tuned, rtol=0, atol=1e-6)
    assert float((tuned - base).abs().max()) > 1e-4


def test_full_fine_tuning_exports_a_unet(full_run: Run, workshop: Path) -> None:
    exported = UNet2DConditionModel.from_pretrained(full_run.folder / "export" / "unet")
    assert torch.equal(noise_prediction(exported), noise_prediction(tuned_policy(full_run, workshop).denoiser))


def test_full_fine_tuning_starts_at_its_reference_and_leaves_it(full_run: Run) -> None:
    first, *later = [row["kl"] for row in full_run.metrics]
    assert first == 0
    assert all(kl > 0 for kl in later)


def test_the_digest_is_the_last_line_for_every_version(run: Run, workshop: Path) -> None:
    newest = sfumato_here("digest", run.folder, cwd=workshop)
    assert newest.stdout.splitlines()[-1] == run.digest == weights_digest(run.weights())
    first = sfumato_here("digest", run.folder, "--version", "0", cwd=workshop)
    assert first.stdout.splitlines()[-1] == run.ledger[0]["digest"]


def test_an_evaluation_compares_each_reward_with_the_base_at_the_same_seeds(run: Run, workshop: Path) -> None:
    out = workshop / "evaluation.json"
    done = sfumato_here("evaluate", run.folder, "--json", out, cwd=workshop, env={"COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    assert "wins" in done.stdout
    assert "jpeg_compressibility" in done.stdout
    result = json.loads(out.read_text())
    assert (result["version"], result["num_prompts"], result["images_per_prompt"]) == (3, 3, 2)
    assert result["rewards"].keys() == {"mean", "jpeg_compressibility"}
    for row in result["rewards"].values():
        assert row["difference"]["mean"] == pytest.approx(row["tuned"]["mean"] - row["base"]["mean"], abs=1e-5)
        assert all(row[part]["standard_error"] > 0 for part in ("base", "tuned", "difference"))
        assert 0 <= row["win_rate"]["mean"] <= 1


def test_an_evaluation_takes_other_prompts_and_repeats_itself(run: Run, workshop: Path) -> None:
    (workshop / "others.txt").write_text("a green one\na blue seven\n")
    command = ("evaluate", run.folder, "--prompts", "others.txt")
    tables = [run_it(*command, cwd=workshop).stdout for run_it in (sfumato, sfumato_here)]
    assert "others.txt" in tables[0]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("source", ["run", "model"])
def test_samples_of_a_run_and_of_a_model_are_pictures(run: Run, workshop: Path, source: str) -> None:
    out, folder = workshop / f"{source}.png", run.folder if source == "run" else workshop / "model"
    arguments = ["--prompt", "a red one", "--num-images", "3", "--num-steps", "4", "--out", out]
    done = sfumato_here("sample", folder, *arguments, cwd=workshop)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    with Image.open(out) as picture:
        assert (picture.format, picture.size) == ("PNG", (48, 16))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_run_that_is_asked_to_end_saves_what_it_has_learnt(
    workshop: Path, tmp_path: Path, number: int, code: int
) -> None:
    arguments = ("recipe.yaml", "rounds=60", "checkpoints.every_rounds=100", "lag=1", "learner.world_size=2")
    with Driver(tmp_path / "run", arguments, cwd=workshop) as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 2)
        driver.ask_to_end(number)
        driver.wait_for_failure(code)
        assert "Traceback" not in driver.output()
        assert f"go on with --resume --run-dir {tmp_path / 'run'}" in driver.output()
    stopped = Run(tmp_path / "run")
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert found.meta.round == len(stopped.metrics) < 60
    digests, rounds = stopped.digests, f"rounds={found.meta.round + 1}"
    process = sfumato("train", *arguments, rounds, "--run-dir", tmp_path / "run", "--resume", cwd=workshop)
    resumed = finished(process, tmp_path / "run").digests
    assert {version: resumed[version] for version in digests} == digests
