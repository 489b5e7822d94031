"""What `sfumato doctor` says of a model: does the sampler agree with diffusers, and the learner with the sampler?

    against diffusers    see `against_diffusers`
    sampler and learner  log-probabilities stored and computed again, as a round's parity check does
    what moves them      another dtype, another batch, adapters fused into the weights

Log-probabilities are compared in latent_mean units, against `learner.parity.tolerance`. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cluster.doctor.against_diffusers import USUAL_PROMPTS, check_against_diffusers, check_guidance_one
from cluster.doctor.finding import Finding, Verdict, guarded
from diffusion.chain import Chain
from diffusion.noise import normal
from diffusion.policy import Policy
from learner.batching import RoundBatch, items_where, micro_batches, stack_groups
from learner.parity import tolerance
from learner.probes import TransitionProbe
from protocol.errors import ModelError
from protocol.groups import Group
from protocol.paths import model_source
from protocol.prompt_sets import make_lists
from protocol.recipe import Lora, Recipe
from protocol.seeds import Purpose, derive_seed

NUM_PROMPTS, MAX_SIBLINGS, MAX_SCORED_STEPS = 2, 4, 6
"""What is examined, at most: two groups of four siblings, six of their steps."""

ADAPTER_SPREAD = 0.02
"""Standard deviation of what is added to adapters, which start as nothing, to have something to fuse."""


@dataclass(frozen=True)
class Patient:
    """What is examined: the learner's chain, and groups that the sampler drew, as the learner stacks them."""

    recipe: Recipe
    chain: Chain
    batch: RoundBatch

    @property
    def limit(self) -> float:
        """The largest acceptable gap of a log-probability, latent_mean."""
        return tolerance(self.recipe, self.batch.num_latent_entries)

    @property
    def item_N3(self) -> Tensor:
        """Some of the (group, sibling, step) items that have a density, over the whole trajectory."""
        scored = self.batch.scored_PT[0].nonzero().flatten()
        some = scored[torch.linspace(0, len(scored) - 1, min(MAX_SCORED_STEPS, len(scored))).round().long()]
        wanted_PGT = torch.zeros_like(self.batch.log_prob_PGT, dtype=torch.bool)
        wanted_PGT[:, :, some] = True
        return items_where(wanted_PGT)

    def scores(self, size: int, chain: Chain | None = None) -> Tensor:
        """Returns the items' log-probabilities as the learner computes them, in micro-batches of `size`, (N,) fp64."""
        probe, scored = TransitionProbe(chain or self.chain, self.batch), []
        with torch.no_grad():
            for items in micro_batches(self.item_N3, size):
                scored.append(probe(probe.chain.policy.denoiser, items).cpu())
        return torch.cat(scored)

    def stored(self) -> Tensor:
        """Returns what the sampler stored of the items."""
        return self.batch.log_prob_PGT[tuple(self.item_N3.unbind(1))].cpu()

    def gap(self, one_N: Tensor, other_N: Tensor) -> Tensor:
        """Returns differences of log-probabilities, latent_mean."""
        return (one_N - other_N).abs() / self.batch.num_latent_entries


def model_findings(recipe: Recipe, device: str, learner_device: str) -> Iterator[Finding]:
    """Examines a recipe's model with its sampler, on the devices of rollouts and learner, in this process."""
    threads = torch.get_num_threads()
    try:
        yield from _model_findings(recipe, device, learner_device)
    except ModelError as error:
        yield Finding("base model", "error", str(error), do="correct model.path")
    finally:
        torch.set_num_threads(threads)


def _model_findings(recipe: Recipe, device: str, learner_device: str) -> Iterator[Finding]:
    source = model_source(recipe.model.path)
    torch.set_num_threads(recipe.rollout_worker.threads)
    policy = Policy.from_recipe(recipe, device, with_decoder=False)
    sampled = recipe
    if not recipe.sampler.num_scored_steps:
        sampled = recipe.model_copy(update={"sampler": recipe.sampler.model_copy(update={"eta": 1.0})})
    chain = Chain(policy, sampled.sampler)
    kind = f"{policy.prediction_type}, latents {policy.latent_shape_CHW}, {policy.dtype} on {device}"
    yield Finding("base model", "ok", f"{recipe.model.path}: {kind}, digest {policy.base_digest[:16]}")
    yield from guarded("diffusers", lambda: check_against_diffusers(chain, source, recipe.model.lora))
    yield from guarded("guidance 1", lambda: [check_guidance_one(chain)])
    groups = draw_groups(sampled, chain)
    torch.set_num_threads(recipe.learner.threads)
    if learner_device != device:
        chain = Chain(Policy.from_recipe(recipe, learner_device, with_decoder=False), sampled.sampler)
    patient = Patient(sampled, chain, stack_groups(groups, chain.policy.device))
    yield from guarded("log-probability", lambda: [check_log_probabilities(patient)])
    yield from guarded("batch size", lambda: [check_batch_size(patient)])
    yield from guarded("adapter fused", lambda: [check_fused(patient)])
    yield from guarded("dtype", lambda: [check_dtype(patient)])


def draw_groups(recipe: Recipe, chain: Chain) -> list[Group]:
    """Draws groups as rollouts do."""
    groups = []
    for index, prompt in enumerate(_prompts(recipe)):
        seeds = [derive_seed(recipe.seed, Purpose.SIBLING, "doctor", index, g) for g in range(_num_siblings(recipe))]
        drawn = chain.sample(prompt, seeds)
        arrays = {
            "latents_GSCHW": drawn.latents_GSCHW.numpy(),
            "log_prob_GT": drawn.log_prob_GT.numpy(),
            "scored_T": drawn.scored_T.numpy(),
        }
        groups.append(_group(index, prompt, chain, arrays))
    return groups


def _group(index: int, prompt: str, chain: Chain, arrays: dict[str, np.ndarray]) -> Group:
    return Group(
        ticket_id=f"doctor-{index}",
        round=0,
        index=index,
        prompt=prompt,
        version=0,
        weights_digest="",
        sampler=chain.description,
        fingerprint="",
        worker="doctor",
        rollout_s=0.0,
        reward_s=0.0,
        num_images=0,
        num_evaluations=0,
        arrays=arrays,
    )


def check_log_probabilities(patient: Patient) -> Finding:
    """What a round's parity check compares: stored by the sampler, computed again by the learner."""
    gap_N = patient.gap(patient.scores(patient.recipe.learner.micro_batch_size), patient.stored())
    found = f"stored and computed again differ by {_told(gap_N)}"
    do = "give rollout_worker and learner equal threads and device; or widen the window (clip_eps, clip_range), or set "
    do += "learner.parity_tolerance if you accept the gap"
    return _judge(patient, "log-probability", found, gap_N, do, worst="error")


def check_batch_size(patient: Patient) -> Finding:
    """A sampler's batch is a group; the learner's is whatever micro_batch_size makes of a round."""
    size = patient.batch.log_prob_PGT.shape[1]
    gap_N = patient.gap(patient.scores(1), patient.scores(size))
    found = f"batches of 1 and of {size} differ by {_told(gap_N)}"
    do = f"make learner.micro_batch_size a multiple of the group's size, {patient.recipe.batch.group_size}"
    return _judge(patient, "batch size", found, gap_N, do)


def check_dtype(patient: Patient) -> Finding:
    """What a rollout in another dtype than the learner's would do. In a run both have the recipe's."""
    recipe, own = patient.recipe, patient.recipe.learner.precision
    other = "bf16" if own == "fp32" else "fp32"
    changed = recipe.model_copy(update={"learner": recipe.learner.model_copy(update={"precision": other})})
    policy = Policy.from_recipe(changed, patient.chain.policy.device, with_decoder=False)
    size = patient.batch.log_prob_PGT.shape[1]
    gap_N = patient.gap(patient.scores(size, Chain(policy, recipe.sampler)), patient.scores(size))
    found = f"{own} and {other} differ by {_told(gap_N)}"
    largest = float(gap_N.max())
    if own == "fp32" and math.isfinite(largest):
        # One learner.precision serves rollouts and learner, and fp32 is the exact one.
        found += "; more than the tolerance, so one dtype must serve both sides, as it does" * (largest > patient.limit)
        return Finding("dtype", "ok", found, number=largest)
    do = f"rounding to {own} is as large as the window, so all that differs between rollouts and learner (device, "
    do += "batch, kernel) shows: set learner.precision=fp32, or widen the window"
    return _judge(patient, "dtype", found, gap_N, do)


def check_fused(patient: Patient) -> Finding:
    """Adapters beside the weights, as rollouts and learner have them, against adapters added into them."""
    policy, name = patient.chain.policy, "adapter fused"
    if not isinstance(patient.recipe.model.trainable, Lora):
        return Finding(name, "ok", "no adapters: all weights are trained")
    before = {tensor_name: tensor.clone() for tensor_name, tensor in policy.trainable_state().items()}
    size = patient.batch.log_prob_PGT.shape[1]
    try:
        policy.load_trainable_state(
            {key: tensor + _spread(number, tensor) for number, (key, tensor) in enumerate(sorted(before.items()))}
        )
        beside_N = patient.scores(size)
        policy.denoiser.fuse_lora()
        fused_N = patient.scores(size)
        policy.denoiser.unfuse_lora()
    finally:
        policy.load_trainable_state(before)
    gap_N, effect_N = patient.gap(fused_N, beside_N), patient.gap(beside_N, patient.scores(size))
    found = f"fused and beside the weights differ by {_told(gap_N)}; the adapter's own effect is {effect_N.max():.1g}"
    do = "sample with adapters beside the weights, as rollouts do; what is exported fused is a little other"
    return _judge(patient, name, found, gap_N, do)


def _spread(number: int, like: Tensor) -> Tensor:
    return (ADAPTER_SPREAD * normal(number, like.shape)).to(like.device, like.dtype)


def _judge(patient: Patient, name: str, found: str, gap_N: Tensor, do: str, worst: Verdict = "warning") -> Finding:
    """Holds a gap against the recipe's tolerance; it can stop only what learns from log-probabilities."""
    gap, limit = float(gap_N.max()), patient.limit
    if gap <= limit:
        return Finding(name, "ok", found, number=gap, limit=limit)
    if patient.recipe.content != "trajectories":
        return Finding(name, "ok", f"{found}; this algorithm uses no log-probabilities", number=gap)
    return Finding(name, worst, found, do=do, number=gap, limit=limit)


def _told(gap_N: Tensor) -> str:
    return f"{gap_N.max():.2g} at most, {gap_N.mean():.2g} on average (latent_mean)"


def _num_siblings(recipe: Recipe) -> int:
    return min(recipe.batch.group_size, MAX_SIBLINGS)


def _prompts(recipe: Recipe) -> list[str]:
    """Returns the first of the recipe's own prompts, where there are any."""
    try:
        own = list(make_lists(recipe.prompts).train or ()) if recipe.prompts.train else []
    except ModelError:
        own = []
    return [*own, *USUAL_PROMPTS][:NUM_PROMPTS]
