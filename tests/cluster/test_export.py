"""An export is what the run's own sampler draws with, to plain diffusers, in a process that has none of our code."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from actors.evaluator import Estimate, draw_images
from cluster.cli import run_command_line
from cluster.evaluate import Comparison, Evaluation, evaluate_run, write_json
from cluster.export import export_run
from cluster.model_card import LORA_FILE, METHODS, pipeline_arguments
from cluster.run_dir import read_recipe
from diffusion.chain import Chain
from diffusion.fingerprint import fingerprint
from diffusion.policy import Policy
from diffusion.weights import pack, unpack, weights_digest
from learner.checkpoint import AVERAGE, Meta, begin, commit, latest_checkpoint
from protocol.base_model import pinned
from protocol.paths import ROOT
from protocol.recipe import Recipe
from protocol.recipe_file import dump_recipe, load_recipe, parse_recipe
from protocol.seeds import Purpose, derive_seed
from protocol.tickets import evaluation_seeds
from sfumato import PACKAGES
from tests.loras import write_kohya
from tests.models import make_tiny_flux_model, make_tiny_model, make_tiny_sd3_model
from tests.rewards.hub_cache import add_repository

PROMPTS = ("a red seven", "a blue one", "a green two")
PROMPT, NUM_IMAGES, SEED = PROMPTS[0], 3, 5
VERSIONS = (1, 2)
FP32 = {"precision": "fp32"}

PLAIN = f"""
import json, os, sys
import numpy as np, torch

torch.set_num_threads(1)
jobs, out = json.load(open(sys.argv[1])), sys.argv[2]
drawn = {{}}
for job in jobs:
    os.chdir(job["folder"])
    names = {{}}
    exec(job["code"], names)
    pipeline = names["pipeline"]
    drawn[job["name"]] = pipeline(
        {PROMPT!r},
        generator=[torch.Generator().manual_seed(seed) for seed in job["seeds"]],
        num_images_per_prompt=len(job["seeds"]),
        output_type="np",
        **job["arguments"],
    ).images
np.savez(out, modules=np.array(sorted({{name.split(".")[0] for name in sys.modules}})), **drawn)
"""
"""Runs each card's code in its own folder, then draws by the pipeline that it made."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A run, the version of it that was exported, and where to."""

    run: Path
    version: int
    folder: Path

    @property
    def card(self) -> str:
        return (self.folder / "README.md").read_text()

    @property
    def code(self) -> str:
        return block(self.card, "python")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def block(card: str, language: str) -> str:
    """The text of the one code block of a language."""
    (text,) = re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, re.M | re.S)
    return str(text[1])


def a_recipe(base: Path, **changes: Any) -> Recipe:
    document = {
        "rounds": 2,
        "model": {"path": str(base), "trainable": {"form": "lora", "rank": 4, "alpha": 6.0}},
        "prompts": {"train": "prompts.txt", "held_out": "held_out.txt"},
        "batch": {"num_groups": 3, "group_size": 2},
        "sampler": {"num_steps": 3},
        "rewards": [{"name": "jpeg_compressibility", "weight": 2.0, "kwargs": {"note": "a ```fence``` in it"}}],
        "evaluation": {"rewards": [{"name": "jpeg_incompressibility"}]},
        "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2},
        "redis": {"url": "redis://secret-host:6390"},
    }
    return parse_recipe({**document, **changes}, source="test")


def make_run(folder: Path, recipe: Recipe) -> Path:
    """Writes a run of two rounds with a checkpoint of each, whose weights are random and far from the base's; an
    average is half of them."""
    folder.mkdir()
    policy = Policy.from_recipe(recipe, with_decoder=False)
    generator = torch.Generator().manual_seed(3)
    first = {name: tensor.clone() for name, tensor in policy.trainable_state().items()}
    (folder / "run.json").write_text(json.dumps({"run_id": "abc", "attempt": 0, "started": 0.0}))
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    (folder / "samples").mkdir()
    for version in (0, *VERSIONS):
        Image.new("RGB", (8, 8), (80 * version, 0, 0)).save(folder / "samples" / f"round-{version:06d}.png")
    for version in VERSIONS:
        state = {k: v + 0.1 * torch.randn(v.shape, generator=generator).to(v.dtype) for k, v in first.items()}
        digest = weights_digest(state)
        meta = Meta(version, version, 0, 1, 0, recipe.learner.precision, {str(version): digest}, {})
        draft = begin(folder, version)
        if recipe.learner.ema:
            average = {name: tensor.float() / 2 for name, tensor in state.items()}
            meta = dataclasses.replace(meta, average_digest=weights_digest(average), average_steps=version)
            (draft / AVERAGE).write_bytes(pack(average))
        (draft / "consolidated.safetensors").write_bytes(b"for resuming")
        commit(draft, meta, {version: pack(state)}, keep_last=2)
        with (folder / "ledger.jsonl").open("a") as ledger:
            ledger.write(json.dumps(ledger_line(version, digest, policy)) + "\n")
    return folder


def ledger_line(version: int, digest: str, policy: Policy) -> dict[str, Any]:
    return {
        **{"round": version - 1, "version": version - 1, "digest": "", "published_version": version},
        **{"published_digest": digest, "tickets": [], "checksums": [], "workers": [], "fingerprint_of": []},
        **{"fingerprints": [fingerprint(policy.device, policy.base_digest)], "made_good": {}, "world_size": 1},
    }


def an_evaluation(version: int) -> Evaluation:
    def comparison(tuned: float) -> Comparison:
        return Comparison(Estimate(1.0, 0.5), Estimate(tuned, 0.25), Estimate(tuned - 1, 0.125), Estimate(0.75, 0.0625))

    rewards = {"mean": 8.0, "jpeg_compressibility": 4.0, "jpeg_incompressibility": -2.0}
    table = {label: comparison(tuned) for label, tuned in rewards.items()}
    return Evaluation("run", version, "held_out.txt", 12, 4, 12345, table)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny-base")


@pytest.fixture(scope="module")
def exports(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """One of each kind; the last two say the same of what is sampled otherwise."""
    desk = tmp_path_factory.mktemp("exports")
    lora = make_run(desk / "lora", a_recipe(model))
    write_json(an_evaluation(2), lora / "evaluation.json")
    full = make_run(desk / "full", a_recipe(model, model={"path": str(model), "trainable": {"form": "full"}}))
    half = make_run(desk / "half", a_recipe(model, learner={"precision": "bf16"}))
    sampler = {"num_steps": 4, "guidance_scale": 3.0, "last_step": "clamp"}
    guided = make_run(desk / "guided", a_recipe(model, sampler=sampler))
    lora_and_scale = {"path": str(write_kohya(desk / "style.safetensors", model)), "scale": 0.75}
    settings = {"path": str(model), "lora": lora_and_scale, "trainable": {"form": "lora", "rank": 3, "alpha": 12.0}}
    started = make_run(desk / "started", pinned(a_recipe(model, model=settings)))
    flow = {"kernel": "flow_grpo", "eta": 0.7, "num_steps": 3, "guidance_scale": 3.0}
    sd3, flux = (
        make_run(desk / name, a_recipe(model, model={**settings, "path": str(path), "lora": None}, sampler=flow))
        for name, path, settings in (
            ("sd3", make_tiny_sd3_model(desk / "sd3-base"), settings),
            ("flux", make_tiny_flux_model(desk / "flux-base"), {**settings, "resolution": 16}),
        )
    )
    made = {
        "adapter": Exported(lora, 2, desk / "a"),
        "older adapter": Exported(lora, 1, desk / "b"),
        "fused": Exported(lora, 2, desk / "c"),
        "full": Exported(full, 2, desk / "d"),
        "fused in half precision": Exported(half, 2, desk / "e"),
        "guided adapter": Exported(guided, 2, desk / "f"),
        "adapter on a lora": Exported(started, 2, desk / "g"),
        "fused on a lora": Exported(started, 2, desk / "h"),
        "adapter of SD 3": Exported(sd3, 2, desk / "i"),
        "fused FLUX": Exported(flux, 2, desk / "j"),
    }
    export_run(sd3, made["adapter of SD 3"].folder)
    export_run(flux, made["fused FLUX"].folder, form="pipeline")
    export_run(lora, made["adapter"].folder)
    export_run(lora, made["older adapter"].folder, version=1)
    export_run(lora, made["fused"].folder, form="pipeline")
    export_run(full, made["full"].folder)
    export_run(half, made["fused in half precision"].folder, form="pipeline")
    export_run(guided, made["guided adapter"].folder)
    export_run(started, made["adapter on a lora"].folder)
    export_run(started, made["fused on a lora"].folder, form="pipeline")
    return made


KINDS = (
    *("adapter", "older adapter", "fused", "full", "fused in half precision", "guided adapter"),
    *("adapter on a lora", "fused on a lora", "adapter of SD 3", "fused FLUX"),
)


@pytest.fixture(scope="module")
def drawn(exports: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Images, float (N, H, W, 3) in [0, 1], that plain diffusers draws of each export, and the modules it had."""
    desk = tmp_path_factory.mktemp("plain")
    jobs = [
        {
            "name": name,
            "folder": str(export.folder),
            # A card of a bf16 run loads it so; pixels are compared in fp32, which CPUs agree about.
            "code": export.code.replace(", torch_dtype=torch.bfloat16", ""),
            "seeds": [derive_seed(s, Purpose.INITIAL_NOISE, 0) for s in evaluation_seeds(SEED, PROMPT, NUM_IMAGES)],
            "arguments": {
                "num_inference_steps": read_recipe(export.run).sampler.num_steps,
                **{name: v for name, v in pipeline_arguments(read_recipe(export.run)).items() if name != "eta"},
            },
        }
        for name, export in exports.items()
    ]
    (desk / "plain.py").write_text(PLAIN)
    (desk / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-P", "plain.py", "jobs.json", str(desk / "drawn.npz")],
        cwd=desk,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.load(desk / "drawn.npz")


def our_images(export: Exported, *, tuned: bool = True) -> np.ndarray:
    """What our sampler draws of a version, without noise in its steps, as uint8 (N, H, W, 3)."""
    recipe = read_recipe(export.run)
    policy = Policy.from_recipe(recipe.model_copy(update={"learner": recipe.learner.model_copy(update=FP32)}))
    torch.set_num_threads(1)
    if tuned:
        (file,) = export.run.glob(f"checkpoints/*/versions/{export.version:06d}.safetensors")
        policy.load_trainable_state(unpack(file.read_bytes()))
    return draw_images(Chain(policy, recipe.sampler.model_copy(update={"eta": 0.0})), PROMPT, NUM_IMAGES, SEED)


@pytest.mark.parametrize("name", KINDS)
def test_a_plain_pipeline_draws_our_samplers_pixels(exports: dict[str, Exported], drawn: Any, name: str) -> None:
    """Ours are its numbers, rounded: to within a hundredth of a grey level, as its scheduler computes in fp32."""
    ours, base = our_images(exports[name]), our_images(exports[name], tuned=False)
    assert np.abs(drawn[name] * 255 - ours).max() <= 0.51
    assert np.abs(ours.astype(int) - base).max() > 2


def test_the_plain_process_has_none_of_our_code(drawn: Any) -> None:
    modules = set(drawn["modules"].tolist())
    assert "diffusers" in modules
    assert not modules & {*PACKAGES, "sfumato"}


def test_each_cards_code_has_drawn_an_image(exports: dict[str, Exported], drawn: Any) -> None:
    for export in exports.values():
        with Image.open(export.folder / "image.png") as image:
            assert image.size == (16, 16)
    assert "torch_dtype=torch.bfloat16" in exports["fused in half precision"].code


def files(folder: Path) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found - {"image.png"}  # What the card's code has drawn.


CARD_AND_IMAGES = {"README.md", "images/before.png", "images/after.png"}


def test_an_adapter_comes_with_its_card_and_images_alone(exports: dict[str, Exported]) -> None:
    assert files(exports["adapter"].folder) == {"pytorch_lora_weights.safetensors", *CARD_AND_IMAGES}


@pytest.mark.parametrize("name", ["fused", "full", "fused in half precision"])
def test_a_pipeline_is_the_bases_files_but_for_the_unet(exports: dict[str, Exported], model: Path, name: str) -> None:
    folder = exports[name].folder
    assert files(folder) == files(model) | CARD_AND_IMAGES
    same = {file for file in files(model) if (folder / file).read_bytes() == (model / file).read_bytes()}
    assert files(model) - same <= {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    weights = "unet/diffusion_pytorch_model.safetensors"
    tuned, base = load_file(folder / weights), load_file(model / weights)
    assert {key: tensor.shape for key, tensor in tuned.items()} == {key: base[key].shape for key in base}
    assert {tensor.dtype for tensor in tuned.values()} == {torch.float32}


def test_of_a_run_from_a_lora_the_text_encoder_is_written_anew(exports: dict[str, Exported], model: Path) -> None:
    folder = exports["fused on a lora"].folder
    same = {file for file in files(model) if (folder / file).read_bytes() == (model / file).read_bytes()}
    anew = {file.split("/")[0] for file in files(model) - same}
    assert anew == {"unet", "text_encoder"}
    assert files(exports["adapter on a lora"].folder) == {"pytorch_lora_weights.safetensors", *CARD_AND_IMAGES}


def test_the_card_names_the_lora_that_a_run_started_from(exports: dict[str, Exported]) -> None:
    lora = read_recipe(exports["adapter on a lora"].run).model.lora
    assert lora is not None
    for name, told in (("adapter", "holds both, for the plain base model"), ("fused", "has it added in")):
        card = exports[f"{name} on a lora"].card
        assert f"The run started from the LoRA `{lora.path}` at scale 0.75; what is here {told}" in card
        assert f"| LoRA that it started from, its file | `{lora.digest}` |" in card
        assert "| base model's U-Net, and LoRA |" in card
    assert "started from the LoRA" not in exports["adapter"].card


@pytest.fixture
def averaged(model: Path, tmp_path: Path) -> Path:
    """A run that keeps an average."""
    changes = {"learner": {"ema": {"decay": 0.99}}, "rewards": [{"name": "jpeg_compressibility"}]}
    return make_run(tmp_path / "averaged", a_recipe(model, **changes))


@pytest.mark.parametrize("weights", ["average", "live"])
def test_of_a_run_with_an_average_that_is_exported_and_the_weights_if_asked_for(
    averaged: Path, tmp_path: Path, weights: str
) -> None:
    policy, found = Policy.from_recipe(read_recipe(averaged), with_decoder=False), latest_checkpoint(averaged)
    file = found.folder / (AVERAGE if weights == "average" else "versions/000002.safetensors")
    policy.load_trainable_state(load_file(file))
    policy.export(tmp_path / "expected")
    told = export_run(averaged, tmp_path / "out", live=weights == "live")
    own, expected = (load_file(tmp_path / name / LORA_FILE) for name in ("out", "expected"))
    assert weights_digest(own) == weights_digest(expected)
    card = (tmp_path / "out" / "README.md").read_text()
    digest = found.meta.average_digest if weights == "average" else found.meta.digests["2"]
    assert f"`{digest}`" in card
    words = "a moving average of those trained, of decay 0.99" if weights == "average" else "as trained"
    assert f"Its weights are {words}." in card
    assert told["weights"] == words
    # The run's last pictures are of what it leaves.
    assert ("images/after.png" in files(tmp_path / "out")) == (weights == "average")


def test_an_evaluation_is_of_the_average_and_shown_beside_that_alone(
    averaged: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    scores = {}
    (averaged / "three.txt").write_text("a red seven\n")
    for live in (False, True):
        result = evaluate_run(averaged, str(averaged / "three.txt"), live=live)
        assert result.weights == ("live" if live else "average")
        write_json(result, averaged / "evaluation.json")
        scores[live] = result.rewards["jpeg_compressibility"].tuned.mean
        assert result.rewards["jpeg_compressibility"].base.mean not in scores.values()
    assert scores[False] != scores[True]
    assert export_run(averaged, tmp_path / "a")["held-out table"].startswith("none")
    assert export_run(averaged, tmp_path / "b", live=True)["held-out table"] == "1 prompts"
    told = refused(averaged, "--out", tmp_path / "c", "--evaluation", averaged / "evaluation.json")
    assert "of another version, or of other weights of it" in told


def test_samples_of_a_run_are_its_averages(averaged: Path, tmp_path: Path) -> None:
    def drawn(*options: str) -> bytes:
        out = tmp_path / "drawn.png"
        command = ["sample", str(averaged), "--prompt", PROMPT, "--out", str(out), "--num-images", "1", *options]
        assert run_command_line(command) == 0
        return out.read_bytes()

    average, live = drawn(), drawn("--live")
    assert average != live
    shutil.copy(
        latest_checkpoint(averaged).folder / AVERAGE, latest_checkpoint(averaged).folder / "versions/000002.safetensors"
    )
    assert drawn("--live") == average


def test_a_version_whose_average_was_not_kept_is_refused_unless_its_weights_are_asked_for(
    averaged: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    older, newer = sorted((averaged / "checkpoints").iterdir())
    metas = [json.loads((folder / "meta.json").read_text()) for folder in (older, newer)]
    (older / "versions" / "000001.safetensors").rename(newer / "versions" / "000001.safetensors")
    (newer / "meta.json").write_text(json.dumps({**metas[1], "digests": metas[0]["digests"] | metas[1]["digests"]}))
    assert export_run(averaged, tmp_path / "a", version=1)["version"].startswith("1, ")
    shutil.rmtree(older)
    assert "but not their average" in refused(averaged, "--out", tmp_path / "c", "--version", "1")
    assert export_run(averaged, tmp_path / "b", version=1, live=True)["weights"] == "as trained"


def test_a_damaged_average_is_refused(averaged: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = latest_checkpoint(averaged).folder
    shutil.copy(folder / "versions" / "000002.safetensors", folder / AVERAGE)
    assert "is damaged" in refused(averaged, "--out", tmp_path / "out")


def test_of_a_full_run_every_weight_is_the_published_one(exports: dict[str, Exported]) -> None:
    export = exports["full"]
    found = latest_checkpoint(export.run)
    assert found is not None
    exported = load_file(export.folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights_digest(exported) == found.meta.digests["2"]


# --- the card -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_cards_first_lines_are_what_the_hub_reads(exports: dict[str, Exported], name: str) -> None:
    _, front, _ = exports[name].card.split("---\n", 2)
    is_adapter = "adapter" in name
    facts = yaml.safe_load(front)
    assert facts == {
        "base_model": read_recipe(exports[name].run).model.path,
        "base_model_relation": "adapter" if is_adapter else "finetune",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": "unknown",
        "tags": ["diffusers", "text-to-image", *(["lora"] if is_adapter else []), "sfumato", "prdp"],
    }


def test_the_card_tells_what_was_trained_on_what_by_what_and_how_well(exports: dict[str, Exported]) -> None:
    export = exports["adapter"]
    card, recipe = export.card, read_recipe(export.run)
    base = Policy.from_recipe(recipe, with_decoder=False)
    found = latest_checkpoint(export.run)
    assert found is not None
    assert "# tiny-base, fine-tuned by prdp\n\nA LoRA adapter of rank 4 for " in card
    assert "[arXiv 2402.08714](https://arxiv.org/abs/2402.08714)" in card
    assert f"| weights | `{found.meta.digests['2']}` |" in card
    assert f"| base model's U-Net | `{base.base_digest}` |" in card
    assert "3 prompts of `prompts.txt`" in card
    assert block(card, "text") == "\n".join(PROMPTS)
    assert "| `jpeg_compressibility` | 2 | none | trained on |" in card
    assert "| `jpeg_incompressibility` |  |  | held out, by evaluation |" in card
    assert "| trained sum | yes | 1.000 ± 0.500 | 8.000 ± 0.250 | 7.000 ± 0.125 | 75.0 ± 6.2 % |" in card
    assert "| `jpeg_compressibility` | yes | 1.000 ± 0.500 | 4.000 ± 0.250 |" in card
    assert "| `jpeg_incompressibility` | no | 1.000 ± 0.500 | -2.000 ± 0.250 |" in card


def test_the_cards_recipe_is_the_runs_without_the_address_of_its_redis(exports: dict[str, Exported]) -> None:
    export = exports["adapter"]
    recipe = parse_recipe(yaml.safe_load(block(export.card, "yaml")), source="card")
    assert recipe.identity() == read_recipe(export.run).identity()
    assert "secret-host" in (export.run / "recipe.yaml").read_text()
    assert "secret-host" not in export.card


def test_the_card_shows_the_samples_of_its_version(exports: dict[str, Exported]) -> None:
    for name, version in (("adapter", 2), ("older adapter", 1)):
        export, samples = exports[name], exports[name].run / "samples"
        assert "![before](images/before.png) | ![after](images/after.png)" in export.card
        for picture, round_ in (("before", 0), ("after", version)):
            copied = (export.folder / "images" / f"{picture}.png").read_bytes()
            assert copied == (samples / f"round-{round_:06d}.png").read_bytes()


def test_an_evaluation_of_another_version_is_left_out(exports: dict[str, Exported]) -> None:
    assert "## Held-out evaluation" in exports["adapter"].card
    assert "## Held-out evaluation" not in exports["older adapter"].card


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_algorithm_of_a_recipe_is_named_with_its_paper(path: Path) -> None:
    assert re.search(r"arXiv \d{4}\.\d{5}", METHODS[load_recipe(path).algorithm.name])


# --- what is refused ------------------------------------------------------------------------------------


@pytest.fixture
def run(exports: dict[str, Exported], tmp_path: Path) -> Path:
    """A LoRA run of its own for each test."""
    return shutil.copytree(exports["adapter"].run, tmp_path / "run")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs an export that must be refused, and leave nothing; returns the message."""

    def refused_(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert run_command_line(["export", *map(str, arguments)]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    return refused_


def test_the_command_writes_a_folder_and_says_what_is_in_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    write_json(an_evaluation(1), tmp_path / "given.json")
    arguments = ["--out", str(tmp_path / "out"), "--version", "1", "--evaluation", str(tmp_path / "given.json")]
    assert run_command_line(["export", str(run), *arguments]) == 0
    told = capsys.readouterr().out
    assert re.search(r"version +1, digest [0-9a-f]{64}\n", told)
    assert re.search(r"held-out table +12 prompts\n", told)
    assert "## Held-out evaluation" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.json", "out", "run"]


def test_a_follower_is_exported_as_a_run_is(run: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "learners").mkdir(parents=True)
    shutil.copy(run / "run.json", home)
    (run / "prompts.txt").rename(home / "prompts.txt")
    shutil.rmtree(run / "samples")  # Pictures are of the first learner's weights.
    run.rename(home / "learners" / "other")
    export_run(home / "learners" / "other", tmp_path / "out")
    assert files(tmp_path / "out") == {"README.md", "pytorch_lora_weights.safetensors"}
    assert "3 prompts of `prompts.txt`" in (tmp_path / "out" / "README.md").read_text()


def test_without_samples_of_its_version_no_images_are_shown(run: Path, tmp_path: Path) -> None:
    (run / "samples" / "round-000002.png").unlink()
    assert export_run(run, tmp_path / "deep" / "out")["images"].startswith("none")
    assert files(tmp_path / "deep" / "out") == {"README.md", "pytorch_lora_weights.safetensors"}
    assert "## Before and after" not in (tmp_path / "deep" / "out" / "README.md").read_text()


def test_what_is_no_run_or_has_no_checkpoint_is_refused(refused: Callable[..., str], run: Path, tmp_path: Path) -> None:
    assert "this is not a run directory" in refused(tmp_path, "--out", tmp_path / "out")
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet" in refused(run, "--out", tmp_path / "out")


def test_a_version_that_no_checkpoint_keeps_is_refused_and_those_kept_are_named(
    refused: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    message = refused(run, "--out", tmp_path / "out", "--version", 7)
    assert "Got: 7. Expected: one of 1, 2." in message


def test_a_place_that_is_taken_is_refused(refused: Callable[..., str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for taken in ("full", "full/file", "dangling"):
        assert "--out is not an empty folder" in refused(run, "--out", tmp_path / taken)
    assert "cannot be made" in refused(run, "--out", tmp_path / "full" / "file" / "out")


def test_a_place_among_the_checkpoints_is_refused(refused: Callable[..., str], run: Path) -> None:
    for place in (run / "checkpoints" / "export", run / "samples" / ".." / "checkpoints" / "a" / "b"):
        assert "--out is among the checkpoints, which are for resuming" in refused(run, "--out", place)


def test_an_adapter_asked_of_a_full_run_is_refused(
    refused: Callable[..., str], exports: dict[str, Exported], tmp_path: Path
) -> None:
    message = refused(exports["full"].run, "--out", tmp_path / "out", "--form", "lora")
    assert "trains the whole denoiser, so there is no adapter" in message
    assert "--form lora" in message


def test_an_evaluation_that_is_none_or_of_another_version_is_refused(
    refused: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    given = tmp_path / "given.json"
    arguments = (run, "--out", tmp_path / "out", "--evaluation", given)
    assert "No such file" in refused(*arguments)
    given.write_text("{}")
    assert "what `sfumato evaluate RUN --json FILE` writes" in refused(*arguments)
    write_json(an_evaluation(1), given)
    message = refused(*arguments)
    assert "is of another version. Got: '1, live'. Expected: 2, live." in message


def test_weights_that_are_not_those_published_are_refused(
    refused: Callable[..., str], run: Path, tmp_path: Path
) -> None:
    (file,) = run.glob("checkpoints/*/versions/000002.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "is damaged: its version 2 has other weights" in refused(run, "--out", tmp_path / "out")


def copied_base(run: Path, model: Path, folder: Path) -> Path:
    """Gives a run a copy of its base model that a test may change."""
    base = shutil.copytree(model, folder)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["path"] = str(base)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return base


def test_another_base_model_than_the_runs_is_refused(
    refused: Callable[..., str], run: Path, model: Path, tmp_path: Path
) -> None:
    base = copied_base(run, model, tmp_path / "base")
    other = make_tiny_model(tmp_path / "other")
    policy = Policy(str(other), trainable=read_recipe(run).model.trainable, seed=0)
    policy.denoiser.unload_lora()
    next(policy.denoiser.parameters()).data.add_(1)
    policy.denoiser.save_pretrained(base / "unet")
    message = refused(run, "--out", tmp_path / "out")
    assert f"the base model {base} is not the one that this run was trained from" in message


def test_a_base_model_that_cannot_be_copied_whole_is_refused_for_a_pipeline_alone(
    refused: Callable[..., str], run: Path, model: Path, tmp_path: Path
) -> None:
    weights = copied_base(run, model, tmp_path / "base") / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = refused(run, "--out", tmp_path / "out", "--form", "pipeline")
    assert "the vae of the base model has no files that could be copied" in message
    assert "export with --form lora" in message
    export_run(run, tmp_path / "out")


def test_variants_and_pickles_of_the_base_are_not_copied(run: Path, model: Path, tmp_path: Path) -> None:
    base = copied_base(run, model, tmp_path / "base")
    for name in (
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "whole.safetensors",
    ):
        (base / name).write_bytes(b"more of the same")
    export_run(run, tmp_path / "out", form="pipeline")
    assert files(tmp_path / "out") == files(model) | CARD_AND_IMAGES


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning")
def test_a_base_from_the_hub_is_copied_from_its_cache(
    model: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = add_repository(tmp_path / "hub-home", "someone/tiny", {})
    shutil.copytree(model, snapshot, dirs_exist_ok=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-home" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["path"] = "someone/tiny"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    export_run(run, tmp_path / "out", form="pipeline")
    assert files(tmp_path / "out") == files(model) | CARD_AND_IMAGES
    assert "base_model: someone/tiny\n" in (tmp_path / "out" / "README.md").read_text()
