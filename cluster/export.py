"""`sfumato export`: a version of a run as files that other tools load, with a model card. For *inference* alone.

checkpoints/round-N/ -> weights or their average, checked -> pytorch_lora_weights.safetensors   --form lora
                                                        `-> its network, beside the base's     --form pipeline
recipe.yaml  samples/  evaluation.json ------------------> README.md  images/                  (cluster/model_card.py)

The folder is written beside its place and then renamed: it is complete or not there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from cluster.evaluate import Evaluation
from cluster.model_card import AFTER, BEFORE, Card, Form, model_card
from cluster.run_dir import home_of, read_recipe
from cluster.sources import read_plan
from cluster.verify import Row, read_lines
from diffusion.policy import Policy
from diffusion.weights import unpack, weights_digest
from learner.checkpoint import Checkpoint, Weights, checkpoints_in
from protocol.errors import ModelError, RecipeError, RunDirError
from protocol.recipe import Full, Recipe

INDEX = "model_index.json"
COPIED = ("*.json", "*.txt", "*.model", "*.safetensors")
"""Files of a pipeline's part that are copied: configurations, vocabularies, and weights, of those never pickles."""
VARIANTS = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*")
"""The same weights once more; a pipeline is loaded from the plain ones."""


def export_run(
    run_dir: Path,
    out: Path,
    *,
    version: int | None = None,
    form: Form | None = None,
    evaluation_file: Path | None = None,
    live: bool = False,
) -> dict[str, str]:
    """Writes a version, by default the newest in a checkpoint, to a new folder: the moving average of the weights at
    that version where one is kept, or, `live`, these themselves. Returns what was written, in reading order. Raises
    RecipeError, RunDirError or ModelError, and leaves no part of an export behind then."""
    recipe = read_recipe(run_dir)
    form = _form(recipe, form)
    _refuse_taken(out, run_dir)
    found, version = find_version(run_dir, version)
    weights = found.meta.result(live=live)
    evaluation = _evaluation(run_dir, version, weights, evaluation_file)
    state, digest = _weights(found, version, weights)
    base = Policy.from_recipe(recipe, with_decoder=False)
    _check_base(base, run_dir)
    pictures = _pictures(run_dir, version) if weights == found.meta.result() else {}
    card = Card(
        recipe=recipe,
        form=form,
        version=version,
        weights=weights,
        digest=digest,
        base_digest=base.base_digest,
        sources=read_plan(recipe, home_of(run_dir)).sources,
        evaluation=evaluation,
        has_images=bool(pictures),
        part=base.family.part,
    )
    _write(out, _tuned_policy(base, recipe, state, form), card, pictures)
    return _numbers(card, out)


def _numbers(card: Card, out: Path) -> dict[str, str]:
    held_out = f"{card.evaluation.num_prompts} prompts" if card.evaluation else "none: there is no evaluation of it"
    return {
        "version": f"{card.version}, digest {card.digest}",
        "weights": card.weights_words,
        "form": "LoRA adapter" if card.form == "lora" else "whole pipeline",
        "held-out table": held_out,
        "images": "before and after" if card.has_images else "none: samples/ has none of this version",
        "written to": f"{out}, its model card is README.md",
    }


def find_version(run_dir: Path, version: int | None) -> tuple[Checkpoint, int]:
    """Returns a checkpoint that keeps a version, or the newest one, and the version. Raises RunDirError."""
    found = checkpoints_in(run_dir)
    if not found:
        raise RunDirError(f"the run {run_dir} has no checkpoint yet", do="wait for it, or resume the run")
    holders = {int(kept): checkpoint for checkpoint in found for kept in checkpoint.meta.digests}
    # Of its newest version a checkpoint keeps the average as well.
    holders |= {checkpoint.meta.round: checkpoint for checkpoint in found}
    wanted = found[-1].meta.round if version is None else version
    if wanted not in holders:
        raise RunDirError(
            f"no checkpoint of the run {run_dir} keeps this version",
            value=wanted,
            expected=f"one of {', '.join(map(str, sorted(holders)))}",
            do="give one of these; checkpoints.keep_last and every_rounds say which a run keeps",
        )
    return holders[wanted], wanted


def _form(recipe: Recipe, form: Form | None) -> Form:
    if isinstance(recipe.model.trainable, Full):
        if form == "lora":
            raise RecipeError(
                "this run trains the whole denoiser, so there is no adapter to export",
                value="--form lora",
                expected="--form pipeline, which is its default",
            )
        return "pipeline"
    return form or "lora"


def _refuse_taken(out: Path, run_dir: Path) -> None:
    if (run_dir / "checkpoints").resolve() in (out.resolve(), *out.resolve().parents):
        raise RunDirError(
            "--out is among the checkpoints, which are for resuming", value=str(out), do="give another folder"
        )
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise RunDirError(
            "--out is not an empty folder", value=str(out), expected="a new or empty folder", do="give another one"
        )


def _evaluation(run_dir: Path, version: int, weights: Weights, file: Path | None) -> Evaluation | None:
    """Returns the evaluation that was given, or that of RUN/evaluation.json if it is of this version and weights."""
    path = file or run_dir / "evaluation.json"
    if file is None and not path.is_file():
        return None
    try:
        evaluation = TypeAdapter(Evaluation).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RecipeError(
            f"the evaluation {path} cannot be read: {str(error).splitlines()[0]}",
            expected="what `sfumato evaluate RUN --json FILE` writes",
            do="make it again, or correct --evaluation",
        ) from error
    if (evaluation.version, evaluation.weights) == (version, weights):
        return evaluation
    if file is None:
        return None
    raise RecipeError(
        f"the evaluation {path} is of another version"
        + ", or of other weights of it" * (evaluation.version == version),
        value=f"{evaluation.version}, {evaluation.weights}",
        expected=f"{version}, {weights}",
        do="evaluate this version, or export that one by --version, or --live",
    )


def _weights(found: Checkpoint, version: int, weights: Weights) -> tuple[dict[str, Tensor], str]:
    """Returns a version's weights, or their average at that version, and the digest. Raises RunDirError unless they are
    those that the run wrote."""
    if weights == "average" and version != found.meta.round:
        raise RunDirError(
            f"of version {version} the run kept the weights, but not their average",
            do="add --live to export the weights, or give a version that a checkpoint is of",
        )
    try:
        state = unpack(found.result_bytes() if weights == "average" else found.version_bytes(version))
    except FileNotFoundError as error:
        raise RunDirError(
            f"{found.folder.name} is gone meanwhile: the run is in progress", do="export again, or when it is done"
        ) from error
    digest = weights_digest(state)
    published = found.meta.average_digest if weights == "average" else found.meta.digests[str(version)]
    if digest != published:
        raise RunDirError(
            f"{found.folder.name} is damaged: its version {version} has other weights",
            value=digest,
            expected=str(published),
            do="export another version",
        )
    return state, digest


def _tuned_policy(base: Policy, recipe: Recipe, state: dict[str, Tensor], form: Form) -> Policy:
    """Returns the policy to write. Added to weights of half precision, most of what an adapter has learnt would be
    rounded away, so that one to be fused gets its base in fp32."""
    policy = base
    if form == "pipeline" and not isinstance(base.trainable, Full) and recipe.learner.precision != "fp32":
        learner = recipe.learner.model_copy(update={"precision": "fp32"})
        policy = Policy.from_recipe(recipe.model_copy(update={"learner": learner}), with_decoder=False)
    policy.load_trainable_state(state)
    return policy


def _check_base(policy: Policy, run_dir: Path) -> None:
    """Raises ModelError if the rollouts of the run, by its ledger, had another base model than this one."""
    rows, _ = read_lines(run_dir / "ledger.jsonl", Row)
    known = {facts.get("base_model") for row in rows for facts in row.fingerprints}
    if known and policy.base_digest[:16] not in known:
        raise ModelError(
            f"the base model {policy.source} is not the one that this run was trained from",
            value=policy.base_digest[:16],
            expected=f"a {policy.family.part} (with its starting LoRA) whose digest starts with "
            f"{' or '.join(sorted(map(str, known)))}",
            do="put the base model, or the LoRA that the run started from, back in its place",
        )


def _pictures(run_dir: Path, version: int) -> dict[str, Path]:
    """Returns the sample grids of before and of this version, by their names in the export; none unless both exist."""
    samples = run_dir / "samples"
    grids = {BEFORE: samples / "round-000000.png", AFTER: samples / f"round-{version:06d}.png"}
    return grids if version and all(file.is_file() for file in grids.values()) else {}


def _write(out: Path, policy: Policy, card: Card, pictures: dict[str, Path]) -> None:
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = tempfile.TemporaryDirectory(prefix=".tmp-export-", dir=out.parent)
    except OSError as error:
        raise RunDirError(f"the folder of --out cannot be made: {error.strerror}", value=str(out)) from error
    with draft as name:
        folder = Path(name) / "export"
        folder.mkdir()
        if card.form == "pipeline":
            _copy_base(policy.source, folder, policy.changed_networks.keys())
            _fuse(policy)
            policy.save_networks(folder)
        else:
            policy.export(folder)
        (folder / "README.md").write_text(model_card(card), encoding="utf-8")
        for relative, file in pictures.items():
            (folder / relative).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / relative)
        folder.rename(out)


def _fuse(policy: Policy) -> None:
    """Adds the adapters to the weights that they adapt; of a full fine-tuning there are none."""
    if not isinstance(policy.trainable, Full):
        policy.denoiser.fuse_lora()
        policy.denoiser.unload_lora()


def _copy_base(source: str, folder: Path, changed: Collection[str]) -> None:
    """Copies all parts of a base pipeline but those that are written anew, byte for byte. Raises ModelError for parts
    that cannot be copied."""
    base = _base_folder(source, changed)
    index = json.loads((base / INDEX).read_text())
    shutil.copyfile(base / INDEX, folder / INDEX)
    for part, kind in index.items():
        if part in changed or not isinstance(kind, list) or kind[0] is None:
            continue
        files = _files(base / part)
        has_weights = any(file.suffix == ".safetensors" for file in files)
        if not files or ((base / part / "config.json").is_file() and not has_weights):
            raise ModelError(
                f"the {part} of the base model has no files that could be copied",
                value=str(base / part),
                expected="a configuration, and weights as .safetensors",
                do="complete the base model, converted to safetensors; or export with --form lora",
            )
        for file in files:
            target = folder / part / file.relative_to(base / part)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*")) if folder.is_dir() else []
    return [file for file in found if file.is_file() and _matches(file, COPIED) and not _matches(file, VARIANTS)]


def _matches(file: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in patterns)


def _base_folder(source: str, changed: Collection[str]) -> Path:
    """Returns where the base model's files are: its folder, or the cache of what the hub has of it."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    wanted = [INDEX, *(f"*/{pattern}" for pattern in COPIED)]
    never = [*(f"{part}/*" for part in changed), *VARIANTS]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=never))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the base model {source} cannot be had whole: {str(error).strip().splitlines()[0][:200]}",
            do=f"fetch it where there is a network, by `hf download {source}`; or export with --form lora",
        ) from error
