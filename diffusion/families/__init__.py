"""Model families: what differs between base models, one class a page. A family is found by the pipeline's name in
`model_index.json`; another one is a class with `pipeline`, `networks`, `encode` and `call`, and a line here."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from diffusion.families.stable_diffusion import StableDiffusion
from diffusion.families.stable_diffusion_xl import StableDiffusionXl
from protocol.errors import ModelError

Family = StableDiffusion | StableDiffusionXl

FAMILIES: dict[str, type[Family]] = {
    family.pipeline.__name__: family for family in (StableDiffusion, StableDiffusionXl)
}


def family_of(source: str) -> type[Family]:
    """Returns the family of a model folder or hub id. Raises ModelError for one that is not supported."""
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(source)
    except Exception as error:  # diffusers raises many types for an unusable folder
        raise ModelError(
            "the base model's model_index.json cannot be read",
            value=source,
            expected="a model in diffusers layout",
            do="check model.path; a hub id needs the network or a filled cache",
        ) from error
    name = index.get("_class_name")
    if name not in FAMILIES:
        raise ModelError(
            "the base model is of a family that is not supported",
            value=f"{name} in {source}",
            expected=f"one of {', '.join(FAMILIES)}",
            do="choose a base model of one of these",
        )
    return FAMILIES[str(name)]
