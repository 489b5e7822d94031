"""Model families: what differs between base models, one class a page. A family is found by the pipeline's name in
`model_index.json`; another one is a class with what `StableDiffusion` has, a line here and a line in
`protocol.models.FAMILIES`."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from diffusion.families.flux import Flux
from diffusion.families.stable_diffusion import StableDiffusion
from diffusion.families.stable_diffusion_3 import StableDiffusion3
from diffusion.families.stable_diffusion_xl import StableDiffusionXl
from protocol.errors import ModelError
from protocol.models import check_family

Family = StableDiffusion | StableDiffusionXl | StableDiffusion3 | Flux

FAMILIES: dict[str, type[Family]] = {
    family.pipeline.__name__: family for family in (StableDiffusion, StableDiffusionXl, StableDiffusion3, Flux)
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
    return FAMILIES[check_family(index.get("_class_name"), source)]
