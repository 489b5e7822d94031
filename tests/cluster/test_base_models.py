"""A base model or a LoRA that cannot be used is refused before anything starts, and so is another one on resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cluster.cli import run_command_line
from cluster.run_dir import RunDir, read_recipe
from diffusion.policy import Policy
from protocol.base_model import check_base_model, pinned
from protocol.errors import ModelError, RunDirError
from protocol.models import FAMILIES as PARTS
from protocol.recipe import Recipe
from protocol.recipe_file import load_recipe
from protocol.starting_lora import LORA_FILE, StartingLora, fetch
from protocol.tensor_header import digest_of
from tests.loras import write_kohya
from tests.models import make_tiny_model, make_tiny_xl_model
from tests.rewards.hub_cache import add_repository

RECIPE = {
    "rounds": 2,
    "model": {"path": "./model", "lora": {"path": "./style.safetensors", "scale": 0.5}},
    "prompts": {"train": "prompts.txt"},
    "batch": {"num_groups": 4, "group_size": 4},
    "sampler": {"num_steps": 4},
    "rewards": [{"name": "jpeg_compressibility"}],
    "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
}

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and LoRAs, to be copied."""
    folder = tmp_path_factory.mktemp("shelf")
    model, xl = make_tiny_model(folder / "model"), make_tiny_xl_model(folder / "xl")
    write_kohya(folder / "style.safetensors", model)
    write_kohya(folder / "other.safetensors", model, seed=1)
    write_kohya(folder / "xl.safetensors", xl, parts=("unet",))
    return folder


@pytest.fixture
def desk(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a recipe that would run."""
    shutil.copytree(shelf / "model", tmp_path / "model")
    for file in shelf.glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    (tmp_path / "prompts.txt").write_text("a red seven\na blue one\n")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Makes a dry run that must be refused; returns the message."""

    def refused_(*overrides: str) -> str:
        assert run_command_line(["train", "recipe.yaml", "--dry-run", *overrides]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        return message

    return refused_


def a_run(folder: Path) -> Path:
    """As much of a run as tells that it is one, with what it keeps for resuming."""
    versions = folder / "checkpoints" / "round-000001" / "versions"
    versions.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    save_file({"mid_block.a.to_q.lora_A.default.weight": torch.ones(2, 2)}, versions / "000001.safetensors")
    return folder


def test_a_dry_run_tells_what_lora_a_run_starts_from(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["train", "recipe.yaml", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "./style.safetensors, scale 0.5: " in told
    assert "layers of rank 2 in text_encoder, unet" in told


# --- the base model -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_are_refused_by_name_with_how_to_convert_them(refused: Refused, desk: Path, part: str) -> None:
    (file,) = (desk / "model" / part).glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    message = refused()
    assert f"the {part} of the base model is a pickle" in message
    assert str(file.with_suffix(".bin")) in message
    assert "use_safetensors=False).save_pretrained('model-safetensors')" in message


@pytest.mark.parametrize("part", PARTS["StableDiffusionPipeline"])
def test_a_missing_part_is_named(refused: Refused, desk: Path, part: str) -> None:
    shutil.rmtree(desk / "model" / part)
    assert f"the {part} of the base model is missing" in refused()


def test_weights_that_are_there_as_a_variant_alone_are_refused(refused: Refused, desk: Path) -> None:
    (file,) = (desk / "model" / "unet").glob("*.safetensors")
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert "the unet of the base model has no weights that are read" in refused()


def test_shards_are_read_by_their_index_and_a_missing_one_is_named(desk: Path) -> None:
    (file,) = (desk / "model" / "unet").glob("*.safetensors")
    names = sorted(load_file(file))
    shards = {name: f"diffusion_pytorch_model-0000{1 + (name > names[9])}-of-00002.safetensors" for name in names}
    for shard in set(shards.values()):
        own = {name: tensor for name, tensor in load_file(file).items() if shards[name] == shard}
        save_file(own, file.with_name(shard))
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": shards}))
    file.unlink()
    assert run_command_line(["train", "recipe.yaml", "--dry-run"]) == 0
    (desk / "model" / "unet" / shards[names[-1]]).unlink()
    with pytest.raises(ModelError, match="00002-of-00002"):
        check_base_model(str(desk / "model"))


def test_another_family_is_refused_with_those_that_are_supported(refused: Refused, desk: Path) -> None:
    index = desk / "model" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "KandinskyPipeline"}))
    message = refused()
    assert "KandinskyPipeline" in message
    assert all(name in message for name in PARTS)
    index.write_text("[")
    assert "the base model's model_index.json cannot be read" in refused()


@pytest.mark.parametrize("name", ["whole.safetensors", "whole.ckpt"])
def test_a_single_file_is_refused_with_how_to_convert_it(refused: Refused, desk: Path, name: str) -> None:
    (desk / name).touch()
    assert f"from_single_file('{name}').save_pretrained('whole')" in refused(f"model.path={name}")


def test_a_run_its_checkpoints_and_a_lora_are_no_base_models(refused: Refused, desk: Path) -> None:
    run = a_run(desk / "runs" / "a")
    for place in ("checkpoints", "checkpoints/round-000001", "checkpoints/round-000001/versions/000001.safetensors"):
        message = refused(f"model.path={run / place}")
        assert f"checkpoints are for resuming; `sfumato export {run} --out DIR --form pipeline`" in message
    assert f"this is a run; `sfumato export {run}" in refused(f"model.path={run}")
    (run / "export").mkdir()
    shutil.copy(desk / "style.safetensors", run / "export" / LORA_FILE)
    assert "this is a LoRA; give its base model here" in refused(f"model.path={run / 'export'}")


# --- the LoRA -------------------------------------------------------------------------------------------


def test_a_lora_of_another_base_is_refused(refused: Refused, desk: Path) -> None:
    message = refused("model.lora.path=./xl.safetensors")
    assert "the LoRA xl.safetensors was made for another base model" in message


@pytest.mark.parametrize(
    "name", ["style.bin", "style.pt", "style.ckpt", f"folder/{LORA_FILE.replace('safetensors', 'bin')}"]
)
def test_a_pickled_lora_is_refused_with_how_to_convert_it(refused: Refused, desk: Path, name: str) -> None:
    (desk / name).parent.mkdir(exist_ok=True)
    torch.save(load_file(desk / "style.safetensors"), desk / name)
    path = "folder" if name.startswith("folder") else name
    message = refused(f"model.lora.path=./{path}")
    assert "is a pickle" in message
    code = message.split('python -c "')[1].split('"')[0]
    # What it says works.
    folder = (desk / name).parent
    exec(code.replace("torch.load('", f"torch.load('{folder}/").replace("}, '", f"}}, '{folder}/"))
    assert (
        run_command_line(
            [
                "train",
                "recipe.yaml",
                "--dry-run",
                f"model.lora.path=./{path.removesuffix(Path(name).suffix)}"
                + ("" if path == "folder" else ".safetensors"),
            ]
        )
        == 0
    )


def test_checkpoints_are_no_loras_but_an_export_is_one(refused: Refused, desk: Path) -> None:
    run = a_run(desk / "runs" / "a")
    version = run / "checkpoints" / "round-000001" / "versions" / "000001.safetensors"
    for place in (run / "checkpoints", version):
        message = refused(f"model.lora.path={place}")
        assert "among a run's checkpoints, which are for resuming" in message
        assert str(run / "export") in message
    shutil.copy(version, desk / "copied.safetensors")
    assert "holds an adapter's state" in refused("model.lora.path=./copied.safetensors")
    recipe = load_recipe("recipe.yaml")
    Policy.from_recipe(recipe, with_decoder=False).export(run / "export")
    arguments = ["train", "recipe.yaml", "--dry-run", f"model.lora.path={run / 'export'}"]
    assert run_command_line(arguments) == 0


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere", "nowhere", "a/b/c/d", "model", "prompts.txt"])
def test_what_holds_no_lora_is_refused(refused: Refused, path: str) -> None:
    assert "model.lora.path" in refused(f"model.lora.path={path}")


def test_a_lora_of_the_hub_is_read_from_its_cache(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (desk / "style.safetensors").read_bytes()
    add_repository(desk / "hub-home", "someone/style", {LORA_FILE: content, "mine.safetensors": content})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(desk / "hub-home" / "hub"))
    for path in ("someone/style", "someone/style/mine.safetensors"):
        recipe = load_recipe("recipe.yaml", [f"model.lora.path={path}"])
        named = pinned(recipe).model.lora
        assert named is not None
        assert named.digest == digest_of(desk / "style.safetensors")
        assert run_command_line(["train", "recipe.yaml", "--dry-run", f"model.lora.path={path}"]) == 0
    with pytest.raises(ModelError, match=r"cannot be fetched from the hub.*hf download someone/other"):
        fetch("someone/other")
    with pytest.raises(ModelError, match="is a pickle"):
        fetch("someone/style/mine.bin")


# --- resuming -------------------------------------------------------------------------------------------


def start(path: Path, recipe: Recipe, *, resume: bool) -> None:
    RunDir(path, pinned(recipe), resume=resume).release()


def test_a_run_keeps_the_lora_that_it_began_with_by_content(desk: Path, tmp_path: Path) -> None:
    recipe = load_recipe("recipe.yaml")
    start(tmp_path / "run", recipe, resume=False)
    kept = read_recipe(tmp_path / "run")
    assert kept.model.lora == StartingLora(
        path="./style.safetensors", scale=0.5, digest=digest_of(desk / "style.safetensors")
    )
    start(tmp_path / "run", recipe, resume=True)
    (desk / "style.safetensors").rename(desk / "moved.safetensors")
    start(tmp_path / "run", load_recipe("recipe.yaml", ["model.lora.path=./moved.safetensors"]), resume=True)
    shutil.copy(desk / "other.safetensors", desk / "style.safetensors")
    with pytest.raises(RunDirError, match=r"another recipe, which differs in model\.lora\.digest"):
        start(tmp_path / "run", recipe, resume=True)
    changed = load_recipe("recipe.yaml", ["model.lora.path=./moved.safetensors", "model.lora.scale=1"])
    with pytest.raises(RunDirError, match=r"differs in model\.lora\.scale"):
        start(tmp_path / "run", changed, resume=True)
    with pytest.raises(RunDirError, match=r"differs in model\.lora"):
        start(tmp_path / "run", load_recipe("recipe.yaml", ["model.lora=null"]), resume=True)
    with pytest.raises(ModelError, match="is another than the recipe's"):
        Policy.from_recipe(kept, with_decoder=False)
