"""`sfumato sample`: images of one prompt, by a run's newest weights or by any model."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from pydantic import ValidationError

from actors.evaluator import draw_images
from cluster.device import own_device
from cluster.run_dir import read_recipe
from diffusion.chain import Chain
from diffusion.policy import Policy
from diffusion.weights import unpack
from learner.checkpoint import latest_checkpoint
from protocol.errors import ModelError, RecipeError, RunDirError
from protocol.paths import model_source
from protocol.recipe import Lora, Sampler


def sample_to_file(
    source: str,
    prompt: str,
    out: Path,
    *,
    num_images: int,
    seed: int,
    num_steps: int | None,
    guidance_scale: float | None,
    live: bool = False,
) -> None:
    """Writes a PNG of `num_images` images beside each other, at their own size. `live` leaves the moving average of a
    run's weights aside."""
    if num_images < 1:
        raise RecipeError("--num-images is too small", value=num_images, expected="1 or more")
    if not out.absolute().parent.is_dir():
        raise RecipeError("the folder of --out does not exist", value=str(out), do="make it, or correct --out")
    is_run = (Path(source) / "run.json").is_file()
    policy, sampler = _load_run(Path(source), live=live) if is_run else _load_model(source)
    changes: dict[str, float | None] = {"num_steps": num_steps, "guidance_scale": guidance_scale}
    images = draw_images(Chain(policy, _changed(sampler, changes)), prompt, num_images, seed)
    height, width = images.shape[1:3]
    picture = Image.new("RGB", (num_images * width, height))
    for number, image in enumerate(images):
        picture.paste(Image.fromarray(image), (number * width, 0))
    picture.save(out, format="PNG")


def _changed(sampler: Sampler, changes: dict[str, float | None]) -> Sampler:
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return Sampler.model_validate(sampler.model_dump() | given)
    except ValidationError as error:
        reasons = "; ".join(f"--{str(part['loc'][0]).replace('_', '-')}: {part['msg']}" for part in error.errors())
        raise RecipeError(f"images cannot be drawn so: {reasons}", value=given) from None


def _load_run(run_dir: Path, *, live: bool) -> tuple[Policy, Sampler]:
    recipe = read_recipe(run_dir)
    found = latest_checkpoint(run_dir)
    if found is None:
        raise RunDirError(f"the run {run_dir} has no checkpoint yet", do="wait for it, or resume the run")
    policy = Policy.from_recipe(recipe, own_device())
    policy.load_trainable_state(unpack(found.result_bytes(live=live)))
    return policy, recipe.sampler


def _load_model(source: str) -> tuple[Policy, Sampler]:
    try:
        path = model_source(source)
    except ModelError as error:
        raise ModelError(
            "this is neither a run directory nor a model",
            value=source,
            expected="a folder made by `sfumato train`, a model folder in diffusers layout, or a hub id",
        ) from error
    return Policy(path, trainable=Lora(), seed=0, device=own_device()), Sampler(num_steps=50)
