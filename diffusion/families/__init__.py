"""Model families: what differs between base models, one class a page. A family is found by the pipeline's name in
`model_index.json`; another one is a class with `pipeline`, `part` (what its denoiser is called there), `networks`,
`encode` and `call`, a line here, and one in `protocol/base_model.py`."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from diffusion.families.stable_diffusion import StableDiffusion
from diffusion.families.stable_diffusion_xl import StableDiffusionXl
from protocol.base_model import check_family
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
    return FAMILIES[check_family(index.get("_class_name"), source)]
