"""Numbers that follow from a recipe: printed at start and by `--dry-run`, so that people can check them."""

from __future__ import annotations

import json
import math
from pathlib import Path

from protocol.errors import ModelError, RecipeError
from protocol.paths import model_source, read_prompts
from protocol.recipe import Recipe

BYTES = {"float16": 2, "float32": 4}
MEMORY_HEADROOM = 4
"""The embedded Redis may hold four times what tickets allow to be in flight: duplicates, and its own overhead."""

MIN_REDIS_BYTES = 64 * 2**20
MAX_GROUP_BYTES = 256 * 2**20
"""Redis refuses entries that approach 512 MiB; groups stay well below."""


def latent_shape(source: str) -> tuple[int, int, int] | None:
    """Returns (C, H, W) of a model folder's latents, or None for a hub id, which is not read here."""
    folder = Path(source)
    if not folder.is_dir():
        return None
    try:
        config = json.loads((folder / "unet" / "config.json").read_text())
        size = config["sample_size"]
        height, width = size if isinstance(size, list) else (size, size)
        return config["in_channels"], height, width
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the model folder {folder} has no readable unet/config.json: {error}",
            expected="a text-to-image model in diffusers layout with a U-Net",
            do="correct model.path",
        ) from error


def image_size(source: str) -> int | None:
    """Returns the side of a model folder's images in pixels, or None for a hub id: its VAE halves at each block but
    the last."""
    shape_CHW = latent_shape(source)
    if shape_CHW is None:
        return None
    config = json.loads((Path(source) / "vae" / "config.json").read_text())
    side: int = shape_CHW[1] * 2 ** (len(config["block_out_channels"]) - 1)
    return side


def group_bytes(recipe: Recipe, shape_CHW: tuple[int, int, int]) -> int:
    """Returns the size of a group's tensors on the wire."""
    sampler, group_size = recipe.sampler, recipe.batch.group_size
    latents = (sampler.num_steps + 1) * math.prod(shape_CHW) * BYTES[sampler.wire_dtype]
    return group_size * (latents + 8 * sampler.num_steps + 4 * (1 + len(recipe.rewards)))


def in_flight_bytes(recipe: Recipe, shape_CHW: tuple[int, int, int]) -> int:
    """Returns the size of the lag + 1 rounds that tickets permit to be out at once."""
    return (recipe.lag + 1) * recipe.batch.num_groups * group_bytes(recipe, shape_CHW)


def redis_bytes(recipe: Recipe, shape_CHW: tuple[int, int, int]) -> int:
    """Returns the memory limit of an embedded server. Raises RecipeError if the recipe's own is too small."""
    needed = in_flight_bytes(recipe, shape_CHW)
    limit = recipe.redis.maxmemory_bytes
    if limit is not None and limit < needed + MIN_REDIS_BYTES // 4:
        raise RecipeError(
            "redis.maxmemory_bytes is too small for what may be in flight",
            value=limit,
            expected=f"at least {needed + MIN_REDIS_BYTES // 4}: lag + 1 rounds and the server's own needs",
            do="raise it, leave it null, or lower lag, batch or sampler.num_steps",
        )
    return limit or max(MIN_REDIS_BYTES, MEMORY_HEADROOM * needed)


def check_before_start(recipe: Recipe) -> None:
    """Raises for what can be seen to fail without starting anything: model, prompts, sizes."""
    shape_CHW = latent_shape(model_source(recipe.model.path))
    read_prompts(recipe.prompts.train)
    if recipe.prompts.held_out is not None:
        read_prompts(recipe.prompts.held_out)
    if shape_CHW is None:
        return
    redis_bytes(recipe, shape_CHW)
    size_bytes = group_bytes(recipe, shape_CHW)
    if size_bytes > MAX_GROUP_BYTES:
        raise RecipeError(
            "a group is too large for one Redis entry",
            value=f"{size_bytes / 2**20:.0f} MiB",
            expected=f"at most {MAX_GROUP_BYTES // 2**20} MiB",
            do="set sampler.wire_dtype: float16, or lower batch.group_size or sampler.num_steps",
        )


def derived_numbers(recipe: Recipe) -> dict[str, str]:
    """Returns what people should check before they spend a week of GPU time, in reading order."""
    algorithm, batch, sampler, learner = recipe.algorithm, recipe.batch, recipe.sampler, recipe.learner
    num_steps = recipe.rounds * algorithm.num_steps_per_round
    items = batch.num_trajectories * sampler.num_scored_steps // learner.world_size
    numbers = {
        "training prompts": f"{len(read_prompts(recipe.prompts.train))}",
        "images and reward queries a round": f"{batch.num_trajectories} ({batch.num_groups} groups of "
        f"{batch.group_size})",
        "images in all": f"{recipe.rounds * batch.num_trajectories}",
        "optimizer steps": f"{num_steps} ({algorithm.num_steps_per_round} a round)",
        "scored steps of a trajectory": f"{sampler.num_scored_steps} of {sampler.num_steps}",
        "groups a rank a round": f"{batch.num_groups // learner.world_size}",
        "micro-batches of a pass, a rank": f"{math.ceil(items / learner.micro_batch_size)}",
        "U-Net forwards to sample a round": f"{batch.num_trajectories * sampler.num_steps * sampler.num_branches}",
        "U-Net forwards to learn a round, at most": f"{_learner_forwards(recipe)}",
        "versions kept": f"{recipe.lag + 1}",
    }
    shape_CHW = latent_shape(model_source(recipe.model.path))
    if shape_CHW is None:
        return {**numbers, "latent shape": f"known once {recipe.model.path} is on disk"}
    return {**numbers, **_latent_numbers(recipe, shape_CHW)}


def _learner_forwards(recipe: Recipe) -> int:
    """Reference once, old once or reused; each update a pass A and a pass B, its backward costing two forwards."""
    per_traversal = recipe.batch.num_trajectories * recipe.sampler.num_scored_steps * recipe.sampler.num_branches
    return per_traversal * (1 + recipe.algorithm.num_updates * 4)


def _latent_numbers(recipe: Recipe, shape_CHW: tuple[int, int, int]) -> dict[str, str]:
    algorithm, num_entries = recipe.algorithm, math.prod(shape_CHW)
    latent = num_entries if algorithm.latent_reduce == "latent_mean" else 1
    steps = recipe.sampler.num_scored_steps if algorithm.time_reduce == "time_mean" else 1
    numbers = {
        "latent shape, entries": f"{shape_CHW}, {num_entries}",
        "a group on the wire": f"{group_bytes(recipe, shape_CHW) / 2**20:.2f} MiB",
        "in flight at most": f"{in_flight_bytes(recipe, shape_CHW) / 2**20:.1f} MiB",
        "beta of the trajectory KL, sum_sum": f"{algorithm.kl_weight / (latent * steps):.3g}",
    }
    if algorithm.clip_eps is not None:
        drift = algorithm.clip_eps * math.sqrt(num_entries) * (latent / num_entries)
        numbers["window as a mean shift, in sigma an entry"] = f"{drift:.3g}"
    return numbers
