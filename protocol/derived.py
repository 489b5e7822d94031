"""Numbers that follow from a recipe: printed at start and by `--dry-run`, so that people can check them."""

from __future__ import annotations

import math

from protocol.algorithms import (
    Cpo,
    Ddpo,
    Dpo,
    NcpCpo,
    NcpDpo,
    NcpSft,
    PolicyGradient,
    Prdp,
    Sft,
    SharpeningRlhf,
    SharpeningSft,
    SourceKind,
    Spin,
    SpinExact,
)
from protocol.base_model import check_base_model, check_starting_lora, told
from protocol.datasets import locate
from protocol.errors import RecipeError
from protocol.models import ModelFacts, evaluations, read_facts
from protocol.paths import model_source
from protocol.prompt_sets import check_exists, make_lists
from protocol.recipe import Recipe
from protocol.requirements import check_model, is_sampled, warnings

BYTES = {"float16": 2, "float32": 4}
MEMORY_HEADROOM = 4
"""The embedded Redis may hold four times what tickets allow to be in flight: duplicates, and its own overhead."""

MIN_REDIS_BYTES = 64 * 2**20
MAX_GROUP_BYTES = 256 * 2**20
"""Redis refuses entries that approach 512 MiB; groups stay well below."""


def facts_of(recipe: Recipe) -> ModelFacts | None:
    """Returns what the files of a recipe's base model say, or None for a hub id. Raises ModelError."""
    return read_facts(model_source(recipe.model.path), recipe.model.resolution)


def latent_shape(recipe: Recipe) -> tuple[int, int, int] | None:
    """Returns (C, H, W) of a recipe's latents, or None for a hub id, which is not read here."""
    facts = facts_of(recipe)
    return facts.latent_shape_CHW if facts else None


def group_bytes(recipe: Recipe, shape_CHW: tuple[int, int, int]) -> int:
    """Returns the size of a group's tensors on the wire: of several sources the largest."""
    return max(_group_bytes(recipe, kind, math.prod(shape_CHW)) for kind in recipe.source_kinds)


def _group_bytes(recipe: Recipe, kind: SourceKind, num_entries: int) -> int:
    algorithm, sampler, group_size = recipe.algorithm, recipe.sampler, recipe.batch.group_size
    num_real = {"prompts": 0, "images": 1, "pairs": 2}[kind]
    num_latents, num_scores = 0, 0
    if is_sampled(recipe, kind):
        num_scores = len(recipe.rewards)
        num_latents = 1
        if recipe.content == "trajectories":
            num_latents, num_scores = sampler.num_steps + 1, num_scores + 2 * sampler.num_steps
        elif isinstance(algorithm, SharpeningSft | SharpeningRlhf):
            num_states = algorithm.excursion.num_states
            num_latents, num_scores = num_states + 1, num_scores * num_states
    return (group_size * num_latents + num_real) * num_entries * BYTES[sampler.wire_dtype] + 4 * group_size * num_scores


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
    check_base_model(model_source(recipe.model.path))
    check_starting_lora(recipe.model)
    facts = facts_of(recipe)
    if facts is not None:
        check_model(recipe, facts.prediction_type)
    for name in (recipe.prompts.train, recipe.prompts.held_out):
        if name is not None:
            check_exists(name)
    for dataset in recipe.data:
        locate(dataset.path)
    if facts is None:
        return
    redis_bytes(recipe, facts.latent_shape_CHW)
    size_bytes = group_bytes(recipe, facts.latent_shape_CHW)
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
    numbers = {
        **_lora(recipe),
        **_sources(recipe),
        "groups a round": f"{batch.num_groups}, {batch.num_groups // learner.world_size} a rank",
        "optimizer steps": f"{num_steps} ({algorithm.num_steps_per_round} a round)",
    }
    if recipe.rollouts.min < recipe.rollouts.max:
        numbers["rollout actors"] = f"{recipe.rollouts}, as the run needs them"
    if recipe.is_colocated:
        numbers["sampling"] = "by the learner's ranks, in turns with learning"
    if any(is_sampled(recipe, kind) for kind in recipe.source_kinds):
        numbers |= {
            "images sampled a round, at most": f"{batch.num_trajectories} ({batch.num_groups} groups of "
            f"{batch.group_size}), {recipe.rounds * batch.num_trajectories} in all",
            "network evaluations to sample a round": f"{rollout_forwards(recipe)}",
        }
    if algorithm.content == "trajectories":
        per_sample = 2 if isinstance(algorithm, SpinExact) else 1
        items = batch.num_trajectories * per_sample * sampler.num_scored_steps // learner.world_size
        numbers |= {
            "scored steps of a trajectory": f"{sampler.num_scored_steps} of {sampler.num_steps}",
            "micro-batches of a pass, a rank": f"{math.ceil(items / learner.micro_batch_size)}",
        }
    numbers |= {
        "network evaluations to learn a round, at most": f"{learner_forwards(recipe)}",
        "versions kept": "the opponent's and the newest" if recipe.iterations else f"{recipe.lag + 1}",
        **_firewall(recipe),
        **({"note": "; ".join(notes)} if (notes := warnings(recipe)) else {}),
    }
    shape_CHW = latent_shape(recipe)
    if shape_CHW is None:
        return {**numbers, "latent shape": f"known once {recipe.model.path} is on disk"}
    return {**numbers, **_latent_numbers(recipe, shape_CHW)}


def _lora(recipe: Recipe) -> dict[str, str]:
    lora = recipe.model.lora
    return {"starts from the LoRA": told(lora, check_starting_lora(recipe.model))} if lora else {}


def _firewall(recipe: Recipe) -> dict[str, str]:
    if (firewall := recipe.firewall) is None:
        return {}
    names = ", ".join(reward.label for reward in firewall.rewards)
    drawn = f"{firewall.num_prompts * firewall.images_per_prompt} images every {firewall.every_rounds} rounds"
    return {"firewall": f"{names}, on {drawn}; a trip: {firewall.on_trip.replace('_', ' ')}"}


def _sources(recipe: Recipe) -> dict[str, str]:
    """Sets on the hub are not read here: a dry run needs no network."""
    settings, lists = recipe.prompts, make_lists(recipe.prompts)
    names = [f"{dataset.kind} of {dataset.path}" for dataset in recipe.data]
    if settings.train is not None:
        names.insert(0, f"prompts of {settings.train}" if lists.train is None else f"{len(lists.train)} prompts")
    numbers = {"tickets start from": ", ".join(names)}
    if lists.held_out is not None:
        numbers["prompts held out"] = f"{len(lists.held_out)}{lists.shared}"
    elif settings.held_out is not None or settings.held_out_share is not None:
        numbers["prompts held out"] = settings.held_out or f"{settings.held_out_share:.1%} of them"
    return {**numbers, **({"prompts dropped": lists.dropped} if lists.dropped else {})}


def num_branches(recipe: Recipe) -> int:
    """Returns how often a sampling step evaluates the network: twice with guidance, but for a model that is told it."""
    facts = facts_of(recipe)
    embeds_guidance = facts is not None and facts.embeds_guidance
    return evaluations(recipe.sampler.guidance_scale, embeds_guidance=embeds_guidance)


def rollout_forwards(recipe: Recipe) -> int:
    """Returns the network's evaluations by rollouts in a round, at most: excursions take the conditional branch."""
    num_steps = 0
    if "prompts" in recipe.source_kinds or recipe.iterations:
        num_steps = recipe.sampler.num_steps * num_branches(recipe)
    if isinstance(recipe.algorithm, SharpeningSft | SharpeningRlhf):
        num_steps += recipe.algorithm.excursion.num_states
    return recipe.batch.num_trajectories * num_steps


def learner_forwards(recipe: Recipe) -> int:
    """Returns the network evaluations that the learner makes in a round, at most; a backward pass counts as two."""
    algorithm, batch, sampler = recipe.algorithm, recipe.batch, recipe.sampler
    traversal = batch.num_trajectories * sampler.num_scored_steps * num_branches(recipe)
    passes = algorithm.num_updates
    match algorithm:
        case Prdp():
            return traversal * (1 + 4 * passes)
        case PolicyGradient() | Ddpo():
            return traversal * (4 * passes + (isinstance(algorithm, PolicyGradient) and algorithm.kl_coef > 0))
        case SpinExact():
            return 2 * traversal * (1 + 4 * passes)
        case Sft() | NcpSft():
            return batch.num_groups * 3 * passes
        case Cpo() | NcpCpo():
            return batch.num_groups * _pairs_of_a_group(recipe) * 6 * passes
        case Dpo() | NcpDpo():
            return batch.num_groups * _pairs_of_a_group(recipe) * 8 * passes
        case Spin():
            return batch.num_trajectories * 8 * passes
        case SharpeningSft():
            return batch.num_groups * algorithm.excursion.num_states * 3 * passes
        case SharpeningRlhf():
            return batch.num_groups * algorithm.excursion.num_states * 8 * passes


def _pairs_of_a_group(recipe: Recipe) -> int:
    algorithm, group_size = recipe.algorithm, recipe.batch.group_size
    assert isinstance(algorithm, Dpo | Cpo | NcpDpo | NcpCpo)
    one = algorithm.pairs.rule == "best_worst" or "prompts" not in recipe.source_kinds
    return 1 if one else group_size * (group_size - 1) // 2


def _latent_numbers(recipe: Recipe, shape_CHW: tuple[int, int, int]) -> dict[str, str]:
    algorithm, num_entries = recipe.algorithm, math.prod(shape_CHW)
    numbers = {
        "latent shape, entries": f"{shape_CHW}, {num_entries}",
        "a group on the wire, at most": f"{group_bytes(recipe, shape_CHW) / 2**20:.2f} MiB",
        "in flight at most": f"{in_flight_bytes(recipe, shape_CHW) / 2**20:.1f} MiB",
    }
    if isinstance(algorithm, Prdp):
        latent = num_entries if algorithm.latent_reduce == "latent_mean" else 1
        steps = recipe.sampler.num_scored_steps if algorithm.time_reduce == "time_mean" else 1
        numbers["beta of the trajectory KL, sum_sum"] = f"{algorithm.kl_weight / (latent * steps):.3g}"
    if isinstance(algorithm, Prdp | PolicyGradient | Ddpo) and algorithm.window is not None:
        latent = num_entries if algorithm.latent_reduce == "latent_mean" else 1
        drift = algorithm.window * math.sqrt(num_entries) * (latent / num_entries)
        numbers["window as a mean shift, in sigma an entry"] = f"{drift:.3g}"
    if isinstance(algorithm, Dpo | Cpo | Spin):
        betas = [i.beta for i in algorithm.iterations] if isinstance(algorithm, Spin) else [_beta_full(algorithm)]
        numbers["beta per latent entry"] = ", ".join(f"{beta / num_entries:.3g}" for beta in betas)
    return numbers


def _beta_full(algorithm: Dpo | Cpo) -> float:
    return algorithm.beta if isinstance(algorithm, Dpo) else algorithm.beta_full
