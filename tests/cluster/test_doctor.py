"""The doctor finds nothing wrong with what is sound, names what is broken, and survives what it examines."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cluster.cli import run_command_line
from cluster.doctor import against_diffusers as doctor_diffusers
from cluster.doctor import diagnosis as doctor
from cluster.doctor import machine as doctor_machine
from cluster.doctor import model as doctor_model
from cluster.doctor import packages as doctor_packages
from cluster.doctor.finding import Finding, guarded
from cluster.doctor.reference import PlainPipeline
from cluster.redis_server import RedisServer
from diffusion.chain import Chain
from diffusion.policy import Policy
from diffusion.weights import weights_digest
from learner.batching import stack_groups
from protocol.recipe import Recipe
from protocol.recipe_file import parse_recipe
from protocol.stream import connect
from tests.loras import write_kohya
from tests.models import make_tiny_model

SAMPLER = {"num_steps": 4, "guidance_scale": 2.0}
CPU_FACTS = {
    "torch": "2.13.0+cpu",
    "torch_error": "",
    "torchvision": None,
    "torchvision_error": "",
    "cuda": None,
    "gpus": [],
    "capabilities": [],
    "kernels": [],
    "bf16": None,
    "nccl": None,
    "gloo": True,
}
GPU_FACTS = CPU_FACTS | {
    "torch": "2.13.0+cu130",
    "cuda": "13.0",
    "gpus": ["NVIDIA H200"],
    "capabilities": ["sm_90"],
    "kernels": ["sm_80", "sm_90", "sm_100"],
    "bf16": True,
    "nccl": "2.28.3",
}
DRIVER = ["NVIDIA H200, 143771 MiB, 143000 MiB, 580.65"]
NMS = "operator torchvision::nms does not exist"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_model(tmp_path_factory.mktemp("doctor") / "model")


@pytest.fixture
def changed_model(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the model and changes its scheduler's configuration."""

    def change(**settings: Any) -> Path:
        folder = tmp_path / "-".join(["changed", *settings])
        shutil.copytree(model, folder)
        config = folder / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | settings))
        return folder

    return change


def recipe_of(source: Path | str, **changes: Any) -> Recipe:
    document = {
        "rounds": 1,
        "model": {"path": str(source)},
        "prompts": {"train": "assets/prompts_train.txt"},
        "batch": {"num_groups": 2, "group_size": 3},
        "sampler": SAMPLER,
        "rewards": [{"name": "jpeg_compressibility"}],
        "algorithm": {"name": "prdp", "kl_weight": 1.0, "clip_eps": 1e-2},
    }
    return parse_recipe({**document, **changes}, source="a test")


def patient_of(recipe: Recipe) -> doctor_model.Patient:
    chain = Chain(Policy.from_recipe(recipe, with_decoder=False), recipe.sampler)
    groups = doctor_model.draw_groups(recipe, chain)
    return doctor_model.Patient(recipe, chain, stack_groups(groups, chain.policy.device))


def tables_of(recipe: Recipe) -> Iterator[Finding]:
    policy = Policy.from_recipe(recipe, with_decoder=False)
    pipeline = PlainPipeline(recipe.model.path, policy.dtype, "cpu")
    return doctor_diffusers.check_tables(Chain(policy, recipe.sampler), pipeline)


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


# --- the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_sound_model_has_no_finding_and_every_comparison_has_a_number(
    model: Path, changed_model: Any, prediction_type: str
) -> None:
    folder = changed_model(prediction_type=prediction_type)
    findings = {finding.name: finding for finding in doctor_model.model_findings(recipe_of(folder), "cpu", "cpu")}
    assert not [finding for finding in findings.values() if finding.verdict != "ok"]
    compared = {
        "scheduler tables",
        "last step",
        "prediction, unguided",
        "prediction, guided",
        "guidance 1",
        "log-probability",
        "batch size",
        "adapter fused",
        "dtype",
    }
    assert findings.keys() == {"base model", *compared}
    assert findings["dtype"].number is not None
    for name in compared - {"dtype"}:
        number, limit = findings[name].number, findings[name].limit
        assert number is not None
        assert limit is not None
        assert 0 <= number <= limit


def test_the_base_with_a_lora_is_held_against_diffusers_with_that_lora(model: Path, tmp_path: Path) -> None:
    lora = {"path": str(write_kohya(tmp_path / "style.safetensors", model)), "scale": 0.5}
    recipe = recipe_of(model, model={"path": str(model), "lora": lora})
    chain = Chain(Policy.from_recipe(recipe, with_decoder=False), recipe.sampler)
    found = {f.name: f for f in doctor_diffusers.check_against_diffusers(chain, str(model), recipe.model.lora)}
    assert found["prediction, guided"].verdict == "ok"
    without = {f.name: f for f in doctor_diffusers.check_against_diffusers(chain, str(model), None)}
    assert without["prediction, guided"].verdict == "error"


@pytest.mark.parametrize(
    "sampler",
    [
        {"kernel": "ddim", "num_steps": 5, "eta": 0.5},
        {"kernel": "ddim", "num_steps": 50, "eta": 1.0, "last_step": "clamp"},
        {"kernel": "ddim", "num_steps": 10, "eta": 0.0},
        {"kernel": "ddpm", "num_steps": 20},
        {"kernel": "ddpm", "num_steps": 20, "last_step": "clamp"},
    ],
    ids=str,
)
def test_steps_are_those_of_diffusers_scheduler_for_every_kernel(model: Path, sampler: dict[str, Any]) -> None:
    recipe = recipe_of(model, algorithm={"name": "sft"}, sampler=sampler)
    tables, last_step = tables_of(recipe)
    assert (tables.verdict, last_step.verdict) == ("ok", "ok"), (tables, last_step)
    assert tables.number is not None
    assert tables.number < 1e-5


def test_a_scheduler_that_bounds_its_estimates_disagrees_with_our_tables(changed_model: Any) -> None:
    tables, last_step = tables_of(recipe_of(changed_model(thresholding=True)))
    assert (tables.verdict, last_step.verdict) == ("error", "error")
    assert "thresholding True" in tables.found
    assert "scheduler_config.json" in tables.do


@pytest.mark.parametrize("outdated", [{"clip_sample": True}, {"steps_offset": 0}], ids=str)
def test_what_the_pipeline_corrects_by_itself_we_correct_too(changed_model: Any, outdated: dict[str, Any]) -> None:
    """Stable Diffusion's pipeline switches clipping off and moves timesteps by one, whatever its files say."""
    assert [finding.verdict for finding in tables_of(recipe_of(changed_model(**outdated)))] == ["ok", "ok"]


def test_timesteps_other_than_the_pipelines_are_found(model: Path, changed_model: Any) -> None:
    recipe = recipe_of(changed_model(timestep_spacing="trailing"))
    chain = Chain(Policy.from_recipe(recipe, with_decoder=False), recipe.sampler)
    found = only(doctor_diffusers.check_tables(chain, PlainPipeline(str(model), torch.float32, "cpu")))
    assert (found.name, found.verdict) == ("scheduler tables", "error")
    assert "ours [999, 749, 499, 249], diffusers' [751, 501, 251, 1]" in found.found
    assert "scheduler_config.json" in found.do


def test_a_grid_that_diffusers_strides_past_is_told_from_wrong_tables(changed_model: Any) -> None:
    """1000 timesteps do not divide into 30 steps: diffusers goes 33 back from each, wherever the next one is."""
    folder = changed_model(timestep_spacing="trailing")
    for num_steps, verdict in ((25, "ok"), (30, "warning")):
        tables, _ = tables_of(recipe_of(folder, sampler={"num_steps": num_steps}))
        assert tables.verdict == verdict
    assert "divides 1000" in tables.do


def test_a_network_other_than_the_pipelines_is_found(model: Path) -> None:
    recipe = recipe_of(model)
    chain = Chain(Policy.from_recipe(recipe, with_decoder=False), recipe.sampler)
    pipeline = PlainPipeline(str(model), torch.float32, "cpu")
    assert {finding.verdict for finding in doctor_diffusers.check_predictions(chain, pipeline)} == {"ok"}
    with torch.no_grad():
        chain.policy.denoiser.conv_out.bias += 1e-2
    assert {finding.verdict for finding in doctor_diffusers.check_predictions(chain, pipeline)} == {"error"}


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.5, "ok"), (1.5, "error"), (float("nan"), "error")], ids=["below", "above", "nan"]
)
def test_a_stored_log_probability_beyond_the_tolerance_is_an_error(model: Path, shift: float, verdict: str) -> None:
    """The recipe's window is 1e-2 in latent_mean, and its tolerance a tenth of it."""
    patient = patient_of(recipe_of(model))
    assert patient.limit == pytest.approx(1e-3)
    moved = patient.batch.log_prob_PGT + shift * 1e-3 * patient.batch.num_latent_entries
    other = dataclasses.replace(patient, batch=dataclasses.replace(patient.batch, log_prob_PGT=moved))
    finding = doctor_model.check_log_probabilities(other)
    assert finding.verdict == verdict
    assert ("parity_tolerance" in finding.do) == (verdict == "error")


def test_log_probabilities_are_no_concern_of_an_algorithm_without_them(model: Path) -> None:
    patient = patient_of(recipe_of(model, algorithm={"name": "sft"}))
    moved = dataclasses.replace(patient.batch, log_prob_PGT=patient.batch.log_prob_PGT + 1e3)
    finding = doctor_model.check_log_probabilities(dataclasses.replace(patient, batch=moved))
    assert (finding.verdict, finding.limit) == ("ok", None)


def test_a_deterministic_sampler_is_examined_with_noise(model: Path) -> None:
    recipe = recipe_of(model, algorithm={"name": "sft"}, sampler={"num_steps": 3, "eta": 0.0})
    findings = {finding.name: finding for finding in doctor_model.model_findings(recipe, "cpu", "cpu")}
    assert {finding.verdict for finding in findings.values()} == {"ok"}
    assert findings["log-probability"].number is not None


def test_fusing_leaves_the_policy_as_it_was_and_sees_a_fusion_that_is_wrong(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = patient_of(recipe_of(model))
    policy = patient.chain.policy
    before = weights_digest(policy.trainable_state()), patient.scores(3)
    assert doctor_model.check_fused(patient).verdict == "ok"
    assert weights_digest(policy.trainable_state()) == before[0]
    torch.testing.assert_close(patient.scores(3), before[1], rtol=1e-6, atol=1e-3)
    fuse = policy.denoiser.fuse_lora
    monkeypatch.setattr(doctor_model, "ADAPTER_SPREAD", 0.5)
    monkeypatch.setattr(policy.denoiser, "fuse_lora", lambda: fuse(lora_scale=0.5))
    finding = doctor_model.check_fused(patient)
    assert finding.verdict == "warning"
    assert finding.number is not None
    assert finding.number > patient.limit


def test_full_fine_tuning_has_nothing_to_fuse(model: Path) -> None:
    patient = patient_of(recipe_of(model, model={"path": str(model), "trainable": {"form": "full"}}))
    assert "no adapters" in doctor_model.check_fused(patient).found


def test_half_precision_under_a_narrow_window_is_warned_of_and_single_precision_is_not(model: Path) -> None:
    narrow = {"name": "prdp", "kl_weight": 1.0, "clip_eps": 1e-6}
    found = {
        precision: doctor_model.check_dtype(
            patient_of(recipe_of(model, algorithm=narrow, learner={"precision": precision}))
        )
        for precision in ("fp32", "bf16")
    }
    assert (found["fp32"].verdict, found["bf16"].verdict) == ("ok", "warning")
    assert found["bf16"].number is not None
    assert found["bf16"].number > 1e-7
    assert "fp32" in found["bf16"].do


def test_a_model_without_its_unet_is_a_finding(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "broken")
    shutil.rmtree(folder / "unet")
    finding = only(doctor_model.model_findings(recipe_of(folder), "cpu", "cpu"))
    assert (finding.name, finding.verdict) == ("base model", "error")
    assert "unet" in finding.found


# --- the machine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "driver", "wanted", "verdict", "told"),
    [
        (CPU_FACTS, [], 0, "ok", "everything computes on CPUs"),
        (CPU_FACTS, [], 1, "warning", "none"),
        (CPU_FACTS, DRIVER, 0, "warning", "a build for CPUs cannot use it"),
        (CPU_FACTS, DRIVER, 1, "error", "a build for CPUs cannot use it"),
        (GPU_FACTS | {"gpus": []}, DRIVER, 1, "error", "does not see it"),
        (GPU_FACTS, DRIVER, 1, "ok", "580.65"),
        (GPU_FACTS, DRIVER, 2, "warning", "ask for 2 GPUs"),
        (GPU_FACTS | {"capabilities": ["sm_120"]}, DRIVER, 1, "error", "no kernels for sm_120"),
        (GPU_FACTS | {"capabilities": ["sm_89"]}, DRIVER, 1, "ok", "H200"),
        (GPU_FACTS | {"bf16": False}, DRIVER, 1, "error", "no bf16"),
        (CPU_FACTS | {"torch": None}, [], 1, "warning", "torch cannot be imported"),
    ],
)
def test_gpus_are_judged_by_driver_build_and_recipe(
    facts: dict[str, Any], driver: list[str], wanted: int, verdict: str, told: str
) -> None:
    recipe = recipe_of("embedded", learner={"num_gpus": wanted, "precision": "bf16"}) if wanted else None
    if wanted == 2:
        recipe = recipe_of("embedded", learner={"num_gpus": 1, "precision": "bf16"}, rollout_worker={"num_gpus": 1})
    finding = doctor_machine.check_gpu(facts, driver, recipe)
    assert (finding.verdict, told in finding.found) == (verdict, True), finding


def test_a_gang_on_gpus_needs_nccl_and_one_on_cpus_does_not() -> None:
    on_gpus = recipe_of("embedded", learner={"num_gpus": 1})
    assert doctor_machine.check_nccl(GPU_FACTS, on_gpus).verdict == "ok"
    assert doctor_machine.check_nccl(GPU_FACTS | {"nccl": None}, on_gpus).verdict == "error"
    assert doctor_machine.check_nccl(CPU_FACTS, recipe_of("embedded")).verdict == "ok"


def shadow(folder: Path, name: str, code: str, version: str = "") -> None:
    """Puts a module, and what tells of its package, where imports look first."""
    (folder / f"{name}.py").write_text(code)
    if version:
        information = folder / f"{name}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_torchvision_of_another_build_is_told_from_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In real processes: transformers finds the broken one, and diffusers cannot be imported any more."""
    shadow(tmp_path, "torchvision", f"raise RuntimeError({NMS!r})", "0.28.0+cu130")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = doctor_packages.torch_facts()
    answers = doctor_packages.try_imports(
        {name: doctor_packages.NEEDED[name] for name in ("transformers", "diffusers")}
    )
    assert facts["torch"] == torch.__version__
    finding = doctor_packages.judge_torchvision(facts, answers)
    assert finding.verdict == "error", answers
    assert all(told in finding.found for told in (NMS, "another build", "diffusers cannot be imported"))
    assert "pip uninstall torchvision" in finding.do
    assert doctor_packages.judge_needed(answers).verdict == "error"


def test_a_matching_pair_and_torch_alone_are_both_well() -> None:
    sound = {"transformers": ("ok", "5"), "diffusers": ("ok", "0.42")}
    pair = doctor_packages.judge_torchvision(CPU_FACTS | {"torchvision": "0.28.0"}, sound)
    alone = doctor_packages.judge_torchvision(CPU_FACTS, sound)
    broken_but_harmless = doctor_packages.judge_torchvision(CPU_FACTS | {"torchvision_error": NMS}, sound)
    no_torch = doctor_packages.judge_torchvision(CPU_FACTS | {"torch": None, "torch_error": "no libtorch"}, sound)
    assert [found.verdict for found in (pair, alone, broken_but_harmless, no_torch)] == ["ok", "ok", "warning", "error"]
    assert "a pair that works" in pair.found
    assert "alone" in alone.found


def test_an_environment_with_torch_only_is_told_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lacking_one", "lacking_two"):
        shadow(tmp_path, name, f"raise ModuleNotFoundError('no', name={name!r})")
    shadow(tmp_path, "lying", "import os\nos._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor_packages.judge_needed(
        doctor_packages.try_imports({"json": "", "lacking_one": "", "lacking_two": ""})
    )
    assert (finding.verdict, finding.found) == ("error", "not installed: lacking_one, lacking_two")
    assert "make install" in finding.do
    dead = doctor_packages.judge_needed(doctor_packages.try_imports({"lying": ""}))
    assert dead.verdict == "error"
    assert "ended with 3" in dead.found


def test_versions_other_than_those_tested_are_named(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# tested\nnumpy==0.0.1\npydantic==2  # a remark\nno-such-package==1\n")
    _, finding = doctor_packages.check_packages(constraints)
    assert finding.verdict == "warning"
    assert finding.number == 2
    assert "(tested: 0.0.1)" in finding.found
    assert "no-such-package" not in finding.found
    constraints.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    _, finding = doctor_packages.check_packages(constraints)
    assert (finding.verdict, finding.number) == ("ok", 0)


def test_a_package_that_is_too_old_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_packages.check_ranges().verdict == "ok"
    shadow(tmp_path, "peft", "", "0.1.0")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    finding = doctor_packages.check_ranges()
    assert (finding.verdict, finding.found) == ("error", "peft is 0.1.0, not >=0.21")


def test_a_cluster_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, verdict in (("", "ok"), ("local", "ok"), ("127.0.0.1:1", "error"), ("10.0.0.4", "error")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert doctor_machine.check_ray().verdict == verdict
    with socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        assert doctor_machine.check_ray().verdict == "ok"


def test_our_own_redis_is_started_and_ended(tmp_path: Path) -> None:
    finding = doctor_machine.check_redis_server(None)
    assert finding.verdict == "ok"
    assert "our own, started and ended" in finding.found


def test_a_redis_that_nobody_serves_is_an_error_without_its_password() -> None:
    finding = doctor_machine.check_redis_server(recipe_of("embedded", redis={"url": "redis://:secret@127.0.0.1:1/0"}))
    assert finding.verdict == "error"
    assert "the connection failed" in finding.found
    assert "secret" not in finding.found


def test_a_redis_is_judged_by_its_limit_and_by_what_it_does_when_full(own_redis_server: RedisServer) -> None:
    recipe = recipe_of("embedded", redis={"url": own_redis_server.url})
    with connect(own_redis_server.url, timeout_s=5.0) as client:
        found = {}
        for policy in ("noeviction", "volatile-lru", "allkeys-lru"):
            client.config_set("maxmemory-policy", policy)
            found[policy] = doctor_machine.check_redis_server(recipe).verdict
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 2**20)
        too_small = doctor_machine.check_redis_server(recipe)
    assert found == {"noeviction": "ok", "volatile-lru": "warning", "allkeys-lru": "error"}
    assert too_small.verdict == "error"
    assert "too small" in too_small.found


def test_too_little_room_is_told_before_it_runs_out(tmp_path: Path) -> None:
    recipe = recipe_of("embedded", rollouts=40)
    assert doctor_machine.check_memory(None, 2**20).verdict == "error"
    assert doctor_machine.check_memory(None, 2**34).verdict == "ok"
    assert doctor_machine.check_memory(recipe, 2**33).verdict == "warning"
    assert doctor_machine.check_cores(recipe, 8).verdict == "warning"
    assert doctor_machine.check_cores(recipe, 64).verdict == "ok"
    assert doctor_machine.check_shared_memory(tmp_path / "nowhere").verdict == "warning"
    assert doctor_machine.check_disk(None, Path("/proc/nowhere/run")).verdict == "error"
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", "/proc/nowhere")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "yet"))
    ours, hub = doctor_machine.check_caches()
    assert (ours.name, ours.verdict) == ("SFUMATO_CACHE", "error")
    assert hub.verdict == "ok"
    assert not list(tmp_path.iterdir())


def test_a_check_that_fails_is_a_finding_and_keeps_what_it_found_before() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("one", "ok", "")
        raise OSError("the disk is on fire\nsecond line")

    first, second = guarded("two", check)
    assert (first.name, second.name, second.verdict) == ("one", "two", "error")
    assert second.found == "OSError: the disk is on fire"


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def desk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, and a machine about which there is one thing to say."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_of(model).model_dump(mode="json")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "machine_findings", lambda recipe, folder: iter([Finding("disk", "ok", "vast")]))
    return tmp_path


def test_the_command_ends_with_0_and_its_json_holds_every_row(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_command_line(["doctor", "recipe.yaml", "sampler.num_steps=3", "--json", "out.json", "--device", "cpu"]) == 0
    )
    printed = capsys.readouterr().out
    document = json.loads(Path("out.json").read_text())
    rows = document["findings"]
    assert document["num_error"] == 0
    assert document["num_ok"] + document["num_warning"] == len(rows)
    assert {row["part"] for row in rows} == {"machine", "recipe", "model"}
    assert all(row["found"] in printed for row in rows)
    assert "2 of 3 steps are scored" in printed
    assert printed.splitlines()[-1] == f"{document['num_ok']} ok, {document['num_warning']} warnings, 0 errors"


def test_an_error_ends_the_command_with_2_and_is_in_the_json(desk: Path, changed_model: Any) -> None:
    folder = changed_model(thresholding=True)
    assert run_command_line(["doctor", str(folder), "sampler.num_steps=3", "--json", "out.json"]) == 2
    rows = json.loads(Path("out.json").read_text())["findings"]
    assert [row["name"] for row in rows if row["verdict"] == "error"] == ["scheduler tables", "last step"]


def test_without_a_model_the_machine_alone_is_examined(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 ok, 0 warnings, 0 errors"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_a_device_that_is_not_there_is_an_error(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["doctor", "recipe.yaml", "--device", "cuda"]) == 2
    assert "error    model    base model: " in capsys.readouterr().out


def test_where_imports_fail_the_model_is_not_touched(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Finding("imports", "error", "diffusers cannot be imported")
    monkeypatch.setattr(doctor, "machine_findings", lambda recipe, folder: iter([broken]))
    assert run_command_line(["doctor", "recipe.yaml", "--json", "out.json"]) == 2
    rows = json.loads(Path("out.json").read_text())["findings"]
    assert rows[-1]["found"].startswith("not examined")


def test_a_number_that_is_none_is_null_in_json(tmp_path: Path) -> None:
    finding = Finding("log-probability", "error", "nan", number=float("nan"), limit=1e-3)
    doctor.write_json(doctor.Diagnosis("m", ("cpu", "cpu"), {"model": [finding]}), tmp_path / "out.json")
    (row,) = json.loads((tmp_path / "out.json").read_text())["findings"]
    assert (row["number"], row["limit"]) == (None, 1e-3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["./nowhere"], "neither a recipe nor a model"),
        (["nowhere.yaml"], "nowhere.yaml does not exist"),
        (["recipe.yaml", "roundz=2"], "unknown key roundz"),
        (["recipe.yaml", "--json", "nowhere/out.json"], "of --json does not exist"),
    ],
)
def test_what_cannot_be_examined_is_refused(
    desk: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert run_command_line(["doctor", *arguments]) == 2
    assert told in capsys.readouterr().err
