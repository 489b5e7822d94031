"""What `sfumato doctor` says of a model: does the sampler agree with diffusers, and the learner with the sampler?

    against diffusers    scheduler's steps, the last step's rule, noise predictions with guidance and without
    sampler and learner  log-probabilities stored and computed again, as a round's parity check does
    what moves them      another dtype, another batch, adapters fused into the weights

Log-probabilities are compared in latent_mean units, against `learner.parity.tolerance`. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cluster.finding import Finding, Verdict, guarded
from diffusion.chain import Chain
from diffusion.kernels import transition
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
from protocol.starting_lora import StartingLora, fetch

if TYPE_CHECKING:
    # At run time diffusers must not be imported before our own package has silenced transformers.
    from cluster.doctor_reference import PlainPipeline

USUAL_PROMPTS = ("a red seven on a blue ground", "a photograph of a lighthouse at dusk")
USUAL_GUIDANCE = 5.0
NUM_PROMPTS, MAX_SIBLINGS, MAX_SCORED_STEPS, PLAIN_STEPS = 2, 4, 6, 3
"""What is examined, at most: two groups of four siblings, six of their steps, three steps of the plain pipeline."""

TABLE_LIMIT = 1e-4
"""Share of the largest entry; diffusers has its constants in fp32."""

OUTPUT_LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Share of a prediction's largest entry, by compute dtype: kernels may differ with the shape of a batch."""

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


def check_against_diffusers(chain: Chain, source: str, lora: StartingLora | None) -> Iterator[Finding]:
    """Loads the model a second time, as a plain pipeline, with the LoRA beside its weights."""
    from cluster.doctor_reference import PlainPipeline

    pipeline = PlainPipeline(source, chain.policy.dtype, str(chain.policy.device))
    if lora is not None:
        pipeline.add_lora(fetch(lora.path), lora.scale)
    yield from check_tables(chain, pipeline)
    yield from check_predictions(chain, pipeline)


def check_tables(chain: Chain, pipeline: PlainPipeline) -> Iterator[Finding]:
    """Our steps against those of diffusers' scheduler, from the same states, network outputs and noise."""
    from cluster.doctor_reference import plain_steps

    policy, sampler, seed = chain.policy, chain.sampler, 1
    shape = (2, *policy.latent_shape_CHW)
    state_NCHW, output_NCHW = normal(seed, shape), normal(seed + 1, shape)
    theirs = plain_steps(pipeline.scheduler_config, sampler, state_NCHW, output_NCHW, seed)
    if theirs.timestep_T.tolist() != chain.schedule.timestep_N.tolist():
        found = f"ours {chain.schedule.timestep_N.tolist()}, diffusers' {theirs.timestep_T.tolist()}"
        do = "set steps_offset to 1 in scheduler_config.json, which the pipeline does by itself"
        yield Finding("scheduler tables", "error", f"other timesteps: {found}", do=do)
        return
    ours_TNCHW = torch.stack(
        [
            transition(
                state_NCHW,
                output_NCHW,
                chain.schedule.to(torch.device("cpu")).at(torch.full((2,), step)),
                prediction_type=policy.prediction_type,
                noise_NCHW=normal(seed + step, shape),
            ).next_state_NCHW
            for step in range(len(chain.schedule))
        ]
    )
    gap_T = _shares(ours_TNCHW, theirs.next_TNCHW)
    yield _judge_tables(gap_T[:-1], theirs.to_next_T[:-1], theirs.config)
    yield _judge_last_step(chain, float(gap_T[-1]), bool(theirs.to_next_T[-1]), theirs.config)


def _judge_tables(gap_T: Tensor, to_next_T: Tensor, config: dict[str, object]) -> Finding:
    name, num_steps = "scheduler tables", len(gap_T)
    worst = float(gap_T[to_next_T].max()) if to_next_T.any() else 0.0
    found = f"steps differ from diffusers' {config['_class_name']} by {worst:.1g} of the largest entry"
    if not worst <= TABLE_LIMIT:
        do = "set clip_sample, thresholding and rescale_betas_zero_snr to false in scheduler_config.json: a clipped "
        do += "step has no such density; a variance_type other than fixed_small has another one"
        return Finding(name, "error", f"{found}: {_unusual(config)}", do=do, number=worst, limit=TABLE_LIMIT)
    if not to_next_T.all():
        found += f"; {int((~to_next_T).sum())} of {num_steps} were left out, since diffusers steps by a rounded stride "
        found += "and not to its own next timestep, as we do"
        do = "choose a sampler.num_steps that divides 1000, if other tools' images at the same seed are to be equal"
        return Finding(name, "warning", found, do=do, number=worst, limit=TABLE_LIMIT)
    return Finding(name, "ok", found, number=worst, limit=TABLE_LIMIT)


def _unusual(config: dict[str, object]) -> str:
    """Returns the settings that make a step something else than a linear function of state and network output."""
    settings = ("clip_sample", "thresholding", "rescale_betas_zero_snr", "variance_type", "timestep_spacing")
    return ", ".join(f"{name} {config[name]}" for name in settings if name in config)


def _judge_last_step(chain: Chain, gap: float, to_end: bool, config: dict[str, object]) -> Finding:
    name, sampler, schedule = "last step", chain.sampler, chain.schedule
    rule, num_scored = sampler.last_step, int(schedule.scored_N.sum())
    landing = "on the clean latent, without a density" if rule == "unscored" else "at timestep 0, with one"
    found = f"{rule}: it ends {landing}; {num_scored} of {len(schedule)} steps are scored"
    if num_scored != sampler.num_scored_steps:
        found += f", where the recipe counts {sampler.num_scored_steps}"
        return Finding(name, "error", found, do="please report this model and recipe")
    if sampler.kernel == "ddpm" and rule == "clamp":
        return Finding(name, "ok", f"{found}; diffusers' DDPM scheduler has no such rule to compare with")
    if not to_end:
        found += f"; diffusers' own would stop above timestep 0 ({config['timestep_spacing']} spacing)"
        return Finding(name, "ok", found)
    found += f"; it differs from diffusers' by {gap:.1g} of the largest entry"
    if not gap <= TABLE_LIMIT:
        return Finding(name, "error", found, do="as for the scheduler's tables", number=gap, limit=TABLE_LIMIT)
    return Finding(name, "ok", found, number=gap, limit=TABLE_LIMIT)


def check_predictions(chain: Chain, pipeline: PlainPipeline) -> Iterator[Finding]:
    """Network outputs that the plain pipeline gives its scheduler, against ours at the same states."""
    policy = chain.policy
    guided = chain.sampler.guidance_scale if chain.sampler.guidance_scale > 1 else USUAL_GUIDANCE
    prompt, noise_CHW = USUAL_PROMPTS[0], normal(3, policy.latent_shape_CHW)
    for name, scale in (("unguided", 1.0), ("guided", guided)):
        run = pipeline.run(prompt, noise_CHW, PLAIN_STEPS, scale)
        gap = float(_shares(predictions(policy, prompt, run.state_TCHW, run.timestep_T, scale), run.output_TCHW).max())
        limit = OUTPUT_LIMITS[policy.dtype]
        found = f"guidance {scale:g}: differs from {pipeline.name}'s by {gap:.1g} of the largest entry"
        do = "compare text encoders, tokenizers and the model's files with the original's; diffusers must load it alike"
        verdict: Verdict = "ok" if gap <= limit else "error"
        yield Finding(f"noise prediction, {name}", verdict, found, "" if gap <= limit else do, gap, limit)


@torch.no_grad()
def predictions(policy: Policy, prompt: str, state_TCHW: Tensor, timestep_T: Tensor, guidance_scale: float) -> Tensor:
    """Returns our guided outputs at T states, one by one as the pipeline has them, (T, C, H, W) on the CPU."""
    outputs = [
        policy.predict(
            policy.denoiser,
            state_CHW[None].to(policy.device),
            timestep[None].to(policy.device),
            policy.condition([prompt]),
            guidance_scale,
        )
        for state_CHW, timestep in zip(state_TCHW, timestep_T, strict=True)
    ]
    return torch.cat(outputs).cpu()


def check_guidance_one(chain: Chain) -> Finding:
    """With guidance 1 one branch is evaluated; just above 1 there are two, and all must come to the same."""
    policy, name = chain.policy, "guidance 1"
    timestep_T = chain.schedule.timestep_N[:: max(1, len(chain.schedule) // PLAIN_STEPS)].cpu()
    state_TCHW = normal(4, (len(timestep_T), *policy.latent_shape_CHW))
    one, two = (
        predictions(policy, USUAL_PROMPTS[1], state_TCHW, timestep_T, scale) for scale in (1.0, math.nextafter(1.0, 2))
    )
    gap, limit = float(_shares(two, one).max()), OUTPUT_LIMITS[policy.dtype]
    found = f"one branch and two differ by {gap:.1g} of the largest entry"
    if not gap <= limit:
        return Finding(name, "error", found, do="please report this model", number=gap, limit=limit)
    return Finding(name, "ok", found, number=gap, limit=limit)


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


def _shares(ours_TX: Tensor, theirs_TX: Tensor) -> Tensor:
    """Returns the largest difference of each of T entries, as a share of its own largest value, (T,)."""
    return (ours_TX - theirs_TX).abs().flatten(1).amax(1) / theirs_TX.abs().flatten(1).amax(1)


def _num_siblings(recipe: Recipe) -> int:
    return min(recipe.batch.group_size, MAX_SIBLINGS)


def _prompts(recipe: Recipe) -> list[str]:
    """Returns the first of the recipe's own prompts, where there are any."""
    try:
        own = list(make_lists(recipe.prompts).train or ()) if recipe.prompts.train else []
    except ModelError:
        own = []
    return [*own, *USUAL_PROMPTS][:NUM_PROMPTS]
