"""What a base model's files tell before anything is started: its family, its parts, and whether a LoRA fits it."""

from __future__ import annotations

from pathlib import Path

from protocol.errors import ModelError
from protocol.lora_file import LayerSize, check_fits, read_layers
from protocol.models import parts_of
from protocol.paths import model_source
from protocol.recipe import Model, Recipe
from protocol.starting_lora import StartingLora, check_digest, fetch, local_file
from protocol.tensor_header import PICKLES, read_part_shapes, weight_files

WITHOUT_WEIGHTS = ("tokenizer", "scheduler")


def check_base_model(source: str) -> None:
    """Raises ModelError for a model folder of another family, or with parts missing, or with pickles for weights. A hub
    id is not read here."""
    folder = Path(source)
    if not folder.is_dir():
        return
    for part in parts_of(folder):
        if not (folder / part).is_dir() or not any((folder / part).iterdir()):
            raise ModelError(
                f"the {part} of the base model is missing",
                value=str(folder / part),
                expected=f"a folder for each of {', '.join(parts_of(folder))}",
                do="complete the base model: fetch it again",
            )
        if not part.startswith(WITHOUT_WEIGHTS):
            _check_weights(folder, part)


def _check_weights(folder: Path, part: str) -> None:
    files = weight_files(folder / part)
    if files and all(file.is_file() for file in files):
        return
    pickled = [file for file in sorted((folder / part).iterdir()) if file.suffix in PICKLES]
    if not pickled:
        missing = next((file for file in files if not file.is_file()), folder / part)
        raise ModelError(
            f"the {part} of the base model has no weights that are read",
            value=str(missing),
            expected="diffusion_pytorch_model.safetensors or model.safetensors, or their shards with an index",
            do="complete the base model; of one that is there as a variant alone (fp16), save it without `variant`",
        )
    code = "from diffusers import DiffusionPipeline as P; "
    code += f"P.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder.name}-safetensors')"
    raise ModelError(
        f"the {part} of the base model is a pickle, which may run code when it is read",
        value=str(pickled[0]),
        expected="weights as .safetensors",
        do=f'if you trust it, convert it once: python -c "{code}"',
    )


def check_starting_lora(model: Model) -> dict[tuple[str, str], LayerSize]:
    """Returns the layers of the LoRA that a run starts from, by part and module; none without one, or for one on the
    hub. Raises ModelError for a file that is another than the recipe's, is no LoRA or does not fit the base model."""
    file = local_file(model.lora.path) if model.lora else None
    if model.lora is None or file is None:
        return {}
    check_digest(file, model.lora)
    folder = Path(model_source(model.path))
    if not folder.is_dir():
        return read_layers(file, None)
    parts = parts_of(folder)
    layers = read_layers(file, parts[0])
    networks = [part for part in parts if not part.startswith((*WITHOUT_WEIGHTS, "vae"))]
    check_fits(file, layers, {part: read_part_shapes(folder / part) for part in networks})
    return layers


def pinned(recipe: Recipe) -> Recipe:
    """Returns a recipe that names its starting LoRA by content, so that a resumed run cannot have another one."""
    lora = recipe.model.lora
    if lora is None:
        return recipe
    named = lora.model_copy(update={"digest": check_digest(fetch(lora.path), lora)})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": named})})


def told(lora: StartingLora, layers: dict[tuple[str, str], LayerSize]) -> str:
    """Returns a line about a starting LoRA for people."""
    if not layers:
        return f"{lora.path}, scale {lora.scale:g}; its layers are known once it is on disk"
    ranks = sorted({size.rank for size in layers.values()})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    parts = ", ".join(dict.fromkeys(part for part, _ in sorted(layers)))
    return f"{lora.path}, scale {lora.scale:g}: {len(layers)} layers of {rank} in {parts}"
