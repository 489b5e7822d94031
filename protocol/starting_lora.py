"""The LoRA that a run may start from: where it is, and that it is the one that was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

from pydantic import Field

from protocol.errors import ModelError
from protocol.paths import ROOT, run_of_checkpoint
from protocol.section import Section
from protocol.tensor_header import PICKLES, digest_of

LORA_FILE = "pytorch_lora_weights.safetensors"
"""What diffusers calls a LoRA in a folder, and so what our exports call theirs."""


class StartingLora(Section):
    """A LoRA that is added into the base model before anything else. The run's reference is base and LoRA together."""

    path: str
    """A .safetensors file, a folder or hub id with pytorch_lora_weights.safetensors, or a file of a hub id
    (owner/name/file.safetensors). Layers of text encoders are added too."""
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What its update is multiplied by, beside its own alpha / rank."""
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the file, as `sha256sum` prints it; another file is refused. null: whatever is there when a run
    starts, whose own recipe.yaml then names it."""


def local_file(path: str) -> Path | None:
    """Returns the file of a LoRA, or None for one on the hub. Raises ModelError for pickles, for what is for resuming,
    and for what is not there."""
    for candidate in (Path(path).expanduser(), ROOT / path):
        if candidate.exists():
            return _checked(candidate.absolute())
    if (place := _hub_place(path)) is None:
        raise ModelError(
            "model.lora.path is not there",
            value=path,
            expected=f"a .safetensors file, a folder with {LORA_FILE}, or a hub id",
            do="correct model.lora.path",
        )
    if place[1].endswith(PICKLES):
        _refuse_pickle(Path(place[1]))
    return None


def fetch(path: str) -> Path:
    """Returns the file of a LoRA, downloaded if it is on the hub and not yet in the cache. Raises ModelError."""
    if (file := local_file(path)) is not None:
        return file
    from huggingface_hub import hf_hub_download

    repository, name = _hub_place(path) or ("", "")
    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the LoRA cannot be fetched from the hub: {str(error).strip().splitlines()[0][:200]}",
            value=path,
            expected=f"a repository with {LORA_FILE}, or owner/name/file.safetensors, and the hub within reach",
            do=f"check model.lora.path; without a network here, run `hf download {repository} {name}` where one is",
        ) from error


def check_digest(file: Path, lora: StartingLora) -> str:
    """Returns the digest of a LoRA's file. Raises ModelError if another one was meant."""
    digest = digest_of(file)
    if lora.digest not in (None, digest):
        raise ModelError(
            f"the file of model.lora.path, {file}, is another than the recipe's",
            value=digest,
            expected=f"SHA-256 {lora.digest}",
            do="put the file back that the run was started with, or start a new run without model.lora.digest",
        )
    return digest


def _checked(place: Path) -> Path:
    if run := run_of_checkpoint(place):
        raise ModelError(
            "model.lora.path is among a run's checkpoints, which are for resuming",
            value=str(place),
            expected="weights for inference",
            do=f"use {run / 'export'}, or `sfumato export {run} --out DIR`",
        )
    file = place / LORA_FILE if place.is_dir() else place
    pickled = place / LORA_FILE.replace(".safetensors", ".bin") if place.is_dir() else place
    if not file.is_file() and pickled.is_file():
        file = pickled
    if file.suffix in PICKLES:
        _refuse_pickle(file)
    if not file.is_file() or file.suffix != ".safetensors":
        raise ModelError(
            "model.lora.path holds no LoRA",
            value=str(place),
            expected=f"a .safetensors file, or a folder with {LORA_FILE}",
            do="give the path of the file itself; of a run that trains all weights, export a pipeline as model.path",
        )
    return file


def _refuse_pickle(file: Path) -> NoReturn:
    code = f"import torch, safetensors.torch as s; d = torch.load('{file.name}', map_location='cpu', weights_only=True)"
    raise ModelError(
        f"the LoRA {file.name} is a pickle, which may run code when it is read",
        value=str(file),
        expected="a .safetensors file",
        do=f'convert it once: python -c "{code}; s.save_file({{k: v.contiguous() for k, v in d.items()}}, '
        f"'{file.stem}.safetensors')\"",
    )


def _hub_place(path: str) -> tuple[str, str] | None:
    """Returns a repository and the name of a file in it; None for what can be no place on the hub."""
    parts = path.split("/")
    if path.startswith((".", "/", "~")) or not all(parts) or len(parts) not in (2, 3):
        return None
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else LORA_FILE
