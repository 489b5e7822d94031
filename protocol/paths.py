"""Where files are: what a recipe names, looked up from the working directory, then from our own root."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

from protocol.errors import ModelError

ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds our packages, recipes and assets."""

EMBEDDED_MODEL = ROOT / "assets" / "digits-base"


SINGLE_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")


def find_file(path: str) -> Path:
    """Returns the absolute path of an existing file named relative to the working directory or to ROOT."""
    for candidate in (Path(path).expanduser(), ROOT / path):
        if candidate.is_file():
            return candidate.resolve()
    raise ModelError(
        f"the file {path} does not exist",
        expected=f"a file relative to {Path.cwd()} or to {ROOT}, or an absolute path",
        do="correct the path in the recipe or on the command line",
    )


def model_source(path: str) -> str:
    """Returns what `from_pretrained` is to be given: a folder's absolute path, or a hub id as it stands."""
    if path == "embedded":
        return str(EMBEDDED_MODEL)
    for candidate in (Path(path).expanduser(), ROOT / path):
        if (candidate / "model_index.json").is_file():
            return str(candidate.resolve())
    if _looks_like_hub_id(path) and not Path(path).exists():
        return path
    raise ModelError(
        "model.path is not a model",
        value=path,
        expected="`embedded`, a hub id such as CompVis/stable-diffusion-v1-4, or a folder in diffusers layout "
        "(with model_index.json)",
        do=f"correct model.path{_hint(Path(path).expanduser())}",
    )


def _hint(place: Path) -> str:
    """Returns what helps with a path that holds something else than a model."""
    if run := run_of_checkpoint(place):
        return f": checkpoints are for resuming; `sfumato export {run} --out DIR --form pipeline` makes a model of one"
    if (place / "run.json").is_file():
        return f": this is a run; `sfumato export {place} --out DIR --form pipeline` makes a model of it"
    if place.is_file() and place.suffix in SINGLE_FILES:
        code = f"from diffusers import StableDiffusionPipeline as P; P.from_single_file('{place}')"
        code += f".save_pretrained('{place.stem}')"
        return (
            f": diffusers makes a folder of a single-file checkpoint (of XL by StableDiffusionXLPipeline; a pickle may "
            f'run code): python -c "{code}"; if it is a LoRA, give its base model here, and it as model.lora.path'
        )
    if (place / "pytorch_lora_weights.safetensors").is_file():
        return ": this is a LoRA; give its base model here, and the LoRA as model.lora.path"
    return ""


def run_of_checkpoint(place: Path) -> Path | None:
    """Returns the run among whose checkpoints a path is; None for any other path."""
    place = place.resolve()
    return next((f.parent for f in (place, *place.parents) if f.name == "checkpoints" and _is_run(f.parent)), None)


def _is_run(folder: Path) -> bool:
    return (folder / "run.json").is_file()


def manifest_path(run_dir: Path, number: int) -> Path:
    """Returns where a run keeps the usable rows of its recipe's dataset of that number."""
    return run_dir / f"data-{number}.jsonl"


def _looks_like_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def read_prompts(path: str) -> list[str]:
    """Returns the prompts of a text file: one a line; empty lines and lines starting with # are skipped."""
    file = find_file(path)
    lines = [line.strip() for line in read_text(file).splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ModelError(f"the prompt file {file} has no prompts", expected="one prompt a line", do="add prompts to it")
    return prompts


def read_text(file: Path) -> str:
    """Returns a prompt file's text, unpacked if its name ends in .gz. Raises ModelError."""
    try:
        content = file.read_bytes()
        return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(
            f"the prompt file {file} is not text: {error.reason} at byte {error.start}",
            expected="UTF-8 text, one prompt a line, or a .jsonl, .json, .csv, .tsv or .parquet file",
            do="save the file as UTF-8",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ModelError(
            f"the prompt file {file} cannot be read: {getattr(error, 'strerror', None) or error}",
            do="check its permissions, and whether it is whole",
        ) from error


def spread(prompts: Sequence[str], at_most: int | None) -> list[str]:
    """Returns at most so many prompts, evenly spaced over the sequence."""
    if at_most is None or at_most >= len(prompts):
        return list(prompts)
    return [prompts[position * len(prompts) // at_most] for position in range(at_most)]
