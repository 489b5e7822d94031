"""How much memory a recipe needs, before anything is started: what each process holds, item by item.

    a learner rank    weights, adapters, AdamW's state by ZeRO stage, a micro-batch's activations, its part of a round;
                      where it samples too, also what a rollout actor holds, but for the weights
    a rollout actor   weights, autoencoder, what passes through either for a group
    beside them       Redis, the weight store, the first rank's checkpoint

Weights are exact; activations and what an optimizer step makes are known to `activations.MARGIN`. Rewards' own models
are not counted. On a CPU all of it is main memory; on a GPU the rest of a process stays in main memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from protocol.activations import (
    Activations,
    decoder_passing,
    encoder_passing,
    latent_shape_CHW,
    num_text_tokens,
    transformer_activations,
    unet_activations,
)
from protocol.algorithms import PolicyGradient, SharpeningRlhf, SharpeningSft, SpinExact
from protocol.derived import BYTES, group_bytes, in_flight_bytes
from protocol.model_files import ModelFiles, read_model_files
from protocol.models import evaluations
from protocol.paths import model_source
from protocol.recipe import Full, Lora, Recipe
from protocol.roles import Learner, Placement

GIB = 2**30
PROCESS_BYTES = 700 * 2**20
"""What a process takes that has imported torch, diffusers and Ray."""

MAX_CACHED_PROMPTS = 2048
"""Encoded prompts that a process keeps: some 0.5 GB for Stable Diffusion 1.x; far more than a round has."""

BUCKET_ENTRIES = 500_000_000
"""Gradients that DeepSpeed reduces at once by default; the array is that large however few there are."""

LIVE_ENTRIES = 1_000_000_000
"""Parameters that ZeRO-3 keeps whole at once by default."""

LOWER_BATCH = "lower learner.micro_batch_size, or set learner.gradient_checkpointing=true"
SHARD = "raise learner.zero_stage, or learner.world_size with it, or set learner.offload_optimizer=true"
ADAPT = "train adapters (model.trainable.form=lora) or in bf16 (learner.precision=bf16)"
STEP = "the optimizer step's own arrays"
HALVE = "set learner.precision=bf16, or choose a smaller base model"


@dataclass(frozen=True)
class Item:
    """One thing that is held: `Item("AdamW's moments", 6_876_176_384, "device", "raise learner.zero_stage")`. `device`
    is where the process computes, `host` is main memory."""

    name: str
    size_bytes: int
    place: str
    do: str


@dataclass(frozen=True)
class Process:
    """One process of a role, of which there are `count`: what it holds, and what it asks of Ray."""

    role: str
    count: int
    placement: Placement
    items: tuple[Item, ...]

    @property
    def is_on_gpu(self) -> bool:
        """True if `device` is a GPU's memory."""
        return self.placement.num_gpus > 0

    def held(self, place: str) -> tuple[Item, ...]:
        """Returns what is in a GPU's memory (`gpu`) or in main memory (`host`), the largest first."""
        places = {
            "gpu": {"device"} if self.is_on_gpu else set(),
            "host": {"host"} if self.is_on_gpu else {"host", "device"},
        }
        return tuple(sorted((i for i in self.items if i.place in places[place]), key=lambda item: -item.size_bytes))

    def size_bytes(self, place: str) -> int:
        """Returns the sum of what is held there."""
        return sum(item.size_bytes for item in self.held(place))


def estimate(recipe: Recipe) -> list[Process] | None:
    """Returns what each kind of process holds at most, or None where the model is not on disk."""
    files = read_model_files(model_source(recipe.model.path), recipe.model.resolution)
    if files is None:
        return None
    followers = {follower.name: recipe.of_follower(follower.name) for follower in recipe.followers}
    return [
        _learner_rank(recipe, files, "a learner rank", samples=recipe.is_colocated),
        *(_learner_rank(own, files, f"a rank of {name}") for name, own in followers.items()),
        *([_rollout_actor(recipe, files)] if recipe.rollouts.max else []),
        _beside(recipe, files),
    ]


def num_trained(recipe: Recipe, files: ModelFiles) -> int:
    """Returns how many parameters are trained."""
    trainable = recipe.model.trainable
    return _num_adapter(trainable, files) if isinstance(trainable, Lora) else files.num_denoiser


def _num_adapter(lora: Lora, files: ModelFiles) -> int:
    """An adapter of a layer (out, in, *kernel) is (rank, in, *kernel) and (out, rank)."""
    endings = tuple(f".{target}.weight" for target in lora.targets)
    shapes = [shape for name, shape in files.shapes.items() if f".{name}".endswith(endings)]
    return sum(lora.rank * (math.prod(shape[1:]) + shape[0]) for shape in shapes)


def _learner_rank(recipe: Recipe, files: ModelFiles, role: str, *, samples: bool = False) -> Process:
    learner, width = recipe.learner, _width(recipe)
    trained, shape_CHW = num_trained(recipe, files), latent_shape_CHW(files.denoiser)
    items = [
        *_denoiser(recipe, files, learner),
        Item("text encoders", width * files.num_text, "device", HALVE),
        *optimizer_items(learner, trained),
        *_of_a_round(recipe, shape_CHW),
        _encodings(recipe, files, recipe.batch.num_groups // learner.world_size),
        Item("this process", PROCESS_BYTES, "host", "lower learner.world_size"),
        Item("versions kept", (_num_versions(recipe) + 1) * width * trained, "host", "lower lag"),
    ]
    activations = _of_micro_batch(recipe, files)
    step = step_bytes(learner, trained)
    if learner.offload_optimizer:
        items.append(Item(STEP, step, "host", SHARD))
    else:
        # Activations are gone when the optimizer steps: its arrays take their place.
        items.append(Item(STEP, max(0, step - activations.size_bytes), "device", SHARD))
    items.append(activations)
    if samples:
        # Sampling and learning take turns in the same memory.
        freed = activations.size_bytes if learner.offload_optimizer else max(step, activations.size_bytes)
        items += _of_turns(recipe, files, freed)
    return Process(role, learner.world_size, learner, _not_empty(items))


def _of_turns(recipe: Recipe, files: ModelFiles, freed_bytes: int) -> Iterator[Item]:
    """What sampling adds to a rank, in whose memory learning has left so much free."""
    width, shape_CHW = _width(recipe), latent_shape_CHW(files.denoiser)
    passing = _passing(recipe, files, shape_CHW)
    yield Item("autoencoder", width * files.num_vae, "device", HALVE)
    yield replace(passing, size_bytes=max(0, passing.size_bytes - freed_bytes))
    yield Item("a group on its way", group_bytes(recipe, shape_CHW), "host", "lower batch.group_size")
    if recipe.learner.num_gpus:
        beside = width * (files.num_text + files.num_vae)
        yield Item("text encoders and autoencoder, set aside", beside, "host", HALVE)
    if recipe.lag or recipe.iterations or recipe.behaviour == "base":
        # The rank's own, and those that sample, as bytes and as tensors.
        yield Item("weights that change places", 3 * width * num_trained(recipe, files), "host", "set lag=0")


def _denoiser(recipe: Recipe, files: ModelFiles, learner: Learner) -> Iterator[Item]:
    width, num_ranks = _width(recipe), learner.world_size
    is_full = isinstance(recipe.model.trainable, Full)
    total = files.num_denoiser + (0 if is_full else num_trained(recipe, files))
    if learner.offload_parameters:
        yield Item("the denoiser's weights, this rank's part", width * total // num_ranks, "host", HALVE)
        yield Item("weights while they are used", width * min(total, LIVE_ENTRIES), "device", HALVE)
    elif learner.sharded_stage == 3 and num_ranks > 1:
        yield Item("the denoiser's weights, this rank's part", width * total // num_ranks, "device", HALVE)
        whole = min(total, LIVE_ENTRIES) * (num_ranks - 1) // num_ranks
        yield Item("weights gathered from other ranks", width * whole, "device", "set learner.zero_stage=2")
    else:
        yield Item("the denoiser's weights", width * total, "device", HALVE)
    if is_full:
        yield Item("the frozen reference", width * files.num_denoiser, "device", ADAPT)


def optimizer_items(learner: Learner, trained: int) -> Iterator[Item]:
    """AdamW as DeepSpeed shards it: fp32 all of it, but for gradients on their way."""
    stage, is_half = learner.sharded_stage, learner.precision != "fp32"
    width = 2 if is_half else 4
    part = trained // learner.world_size if stage else trained
    place = "host" if learner.offload_optimizer else "device"
    if stage:
        yield Item("fp32 masters", 4 * part, place, SHARD)
    yield Item("AdamW's moments", (2 if learner.optimizer == "adamw_8bit" else 8) * part, place, SHARD)
    if learner.ema is not None:
        yield Item("the moving average", 4 * part, place, SHARD)
    # In fp32 the backward pass leaves whole gradients, which are reduced once, at the end.
    yield Item("gradients", width * trained, "device", ADAPT)
    if stage and not (is_half and stage == 2):
        yield Item("fp32 sums of gradients", 4 * (trained if is_half and stage == 1 else part), place, SHARD)
    if learner.num_gpus and (stage > 1 or (stage == 1 and not is_half)):
        # On a CPU only what is written to becomes real memory.
        yield Item("DeepSpeed's bucket of gradients", width * BUCKET_ENTRIES, "device", "set learner.zero_stage=1")


def step_bytes(learner: Learner, trained: int) -> int:
    """What AdamW's step makes, in all of this rank's part at once: the denominator; sharded and in bf16, or in stage 3,
    a flat copy of the gradients; offloaded, one more on its way back."""
    if learner.sharded_stage == 0:
        return 4 * trained
    num_copies = 1 + (learner.precision != "fp32" or learner.sharded_stage == 3) + learner.offload_optimizer
    return 4 * num_copies * trained // learner.world_size


def _of_micro_batch(recipe: Recipe, files: ModelFiles) -> Item:
    learner = recipe.learner
    held = _activations(files, full=isinstance(recipe.model.trainable, Full))
    on_trajectories = recipe.algorithm.content == "trajectories"
    num_items = min(learner.micro_batch_size, _num_items(recipe))
    num_latents = num_items * (_num_branches(recipe, files) if on_trajectories else 1)
    entries = held.checkpointed if learner.gradient_checkpointing else held.kept
    name = f"activations of {num_latents} latents"
    return Item(name, _width(recipe) * entries * num_latents, "device", LOWER_BATCH)


def _num_items(recipe: Recipe) -> int:
    """Returns at most how many latents a pass of a rank has, less than a micro-batch where rounds are small."""
    algorithm, group_size = recipe.algorithm, recipe.batch.group_size
    if algorithm.content == "trajectories":
        of_a_group = group_size * recipe.sampler.num_scored_steps * (2 if isinstance(algorithm, SpinExact) else 1)
    elif isinstance(algorithm, SharpeningSft | SharpeningRlhf):
        of_a_group = group_size * algorithm.excursion.num_states
    else:
        # All pairs of siblings, or of a real image with each.
        of_a_group = group_size * (group_size + 1)
    num_groups = recipe.batch.num_groups // recipe.learner.world_size // algorithm.inner_minibatches
    return num_groups * of_a_group


def _activations(files: ModelFiles, *, full: bool) -> Activations:
    is_unet = "block_out_channels" in files.denoiser
    return (unet_activations if is_unet else transformer_activations)(files.denoiser, full=full)


def _of_a_round(recipe: Recipe, shape_CHW: tuple[int, int, int]) -> Iterator[Item]:
    """What was read from the wire waits in main memory; what is learnt from is stacked, in fp32, beside the network."""
    algorithm, sampler, num_ranks = recipe.algorithm, recipe.sampler, recipe.learner.world_size
    arrived = in_flight_bytes(recipe, shape_CHW) // num_ranks
    do = "lower batch, lag or sampler.num_steps, set sampler.wire_dtype=float16, or raise learner.world_size"
    yield Item("groups of the rounds in flight", arrived, "host", do)
    stacked = recipe.batch.num_groups * group_bytes(recipe, shape_CHW) // num_ranks * 4 // BYTES[sampler.wire_dtype]
    copies = 1
    if isinstance(algorithm, SpinExact) or (isinstance(algorithm, PolicyGradient) and algorithm.kl_coef > 0):
        copies = 2
    elif algorithm.content != "trajectories":
        # Noised states, the noise in them, and the images.
        copies = 3
    yield Item("the round's latents", copies * stacked, "device", do)


def _rollout_actor(recipe: Recipe, files: ModelFiles) -> Process:
    width, is_full = _width(recipe), isinstance(recipe.model.trainable, Full)
    total = files.num_denoiser + (0 if is_full else num_trained(recipe, files))
    shape_CHW = latent_shape_CHW(files.denoiser)
    largest = width * max(files.num_denoiser, files.num_text)
    items = [
        Item("the denoiser's weights", width * total, "device", HALVE),
        Item("autoencoder", width * files.num_vae, "device", HALVE),
        Item("text encoders", width * files.num_text, "device", HALVE),
        _passing(recipe, files, shape_CHW),
        _encodings(recipe, files, recipe.batch.num_groups),
        Item("this process", PROCESS_BYTES, "host", "lower rollouts"),
        Item(
            "a group and the version it is sampled with",
            group_bytes(recipe, shape_CHW) + width * num_trained(recipe, files),
            "host",
            "lower batch.group_size",
        ),
    ]
    if recipe.rollout_worker.num_gpus:
        items.append(Item("a part of the model while it is loaded", largest, "host", HALVE))
    return Process("a rollout actor", recipe.rollouts.min, recipe.rollout_worker, _not_empty(items))


def _passing(recipe: Recipe, files: ModelFiles, shape_CHW: tuple[int, int, int]) -> Item:
    """Siblings are sampled in one batch, and so decoded; a sample grid likewise. Real images are encoded one by one."""
    area, full = math.prod(shape_CHW[1:]), isinstance(recipe.model.trainable, Full)
    num_images = max(recipe.batch.group_size, recipe.evaluation.grid_images)
    sampled = num_images * _num_branches(recipe, files) * _activations(files, full=full).passing
    num_states = 1
    if isinstance(recipe.algorithm, SharpeningSft | SharpeningRlhf) and recipe.algorithm.select_on != "final_x0":
        num_states = recipe.algorithm.excursion.num_states
    num_decoded = max(num_images, recipe.batch.group_size * num_states)
    encoded = encoder_passing(files.vae, area) if recipe.data else 0
    entries = max(sampled, num_decoded * decoder_passing(files.vae, area), encoded)
    do = "lower batch.group_size or evaluation.grid_images"
    return Item(f"sampling and decoding {num_decoded} images", _width(recipe) * entries, "device", do)


def _encodings(recipe: Recipe, files: ModelFiles, num_groups: int) -> Item:
    """The prompts that a process meets, each encoded once."""
    num_prompts = min(MAX_CACHED_PROMPTS, recipe.rounds * num_groups)
    config = files.denoiser
    # Of Stable Diffusion 3 and FLUX, whose configurations say how wide a prompt is, but not how long.
    width, num_words = config.get("joint_attention_dim"), num_text_tokens(config)
    if width is None:
        width, num_words = config["cross_attention_dim"], files.text[0]["max_position_embeddings"]
    size_bytes = num_prompts * num_words * width * _width(recipe)
    return Item(f"{num_prompts} encoded prompts", size_bytes, "device", HALVE)


def _beside(recipe: Recipe, files: ModelFiles) -> Process:
    trained = num_trained(recipe, files)
    versions = _width(recipe) * trained * (recipe.lag + 2)
    saved = (12 + _width(recipe) * _num_versions(recipe)) * trained
    num_rewards = sum(reward.replicas for reward in recipe.scored_rewards)
    items = [
        Item("Redis", in_flight_bytes(recipe, latent_shape_CHW(files.denoiser)), "host", "lower batch or lag"),
        Item("the weight store", versions, "host", "lower lag"),
        Item("a checkpoint while it is written", saved, "host", ADAPT),
        Item("driver and rewards without their models", (1 + num_rewards) * PROCESS_BYTES, "host", "lower replicas"),
    ]
    return Process("beside them", 1, Placement(), _not_empty(items))


def _num_versions(recipe: Recipe) -> int:
    return 2 if recipe.iterations else recipe.lag + 1


def _num_branches(recipe: Recipe, files: ModelFiles) -> int:
    """Evaluations of a sampling step, in one batch."""
    return evaluations(recipe.sampler.guidance_scale, embeds_guidance=bool(files.denoiser.get("guidance_embeds")))


def _width(recipe: Recipe) -> int:
    """Bytes of the compute dtype."""
    return 4 if recipe.learner.precision == "fp32" else 2


def _not_empty(items: list[Item]) -> tuple[Item, ...]:
    return tuple(item for item in items if item.size_bytes)


def memory_numbers(recipe: Recipe) -> dict[str, str]:
    """Returns the estimate as people read it: a row a kind of process and place, largest items first."""
    processes = estimate(recipe)
    if processes is None:
        return {"memory": f"known once {recipe.model.path} is on disk"}
    numbers = {}
    for process in processes:
        for place, words in (("gpu", "GPU memory"), ("host", "main memory")):
            if held := process.held(place):
                numbers[f"{words}, {process.role}"] = describe(held)
    return numbers


def describe(held: tuple[Item, ...], num_shown: int = 4) -> str:
    """Returns a sum and its largest parts: `9.1 GiB: activations of 8 latents 7.0, the denoiser's weights 1.6, ...`."""
    parts = ", ".join(f"{item.name} {item.size_bytes / GIB:.2f}" for item in held[:num_shown])
    more = f", {len(held) - num_shown} more" if len(held) > num_shown else ""
    return f"{sum(item.size_bytes for item in held) / GIB:.2f} GiB: {parts}{more}"
