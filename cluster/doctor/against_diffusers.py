"""Does our sampler agree with diffusers? The scheduler's steps, the last step, predictions guided and unguided."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cluster.doctor.finding import Finding, Verdict
from diffusion.chain import Chain
from diffusion.kernels import Transition, transition
from diffusion.noise import normal
from diffusion.policy import Policy
from diffusion.schedules import StepConstants
from protocol.starting_lora import StartingLora, fetch

if TYPE_CHECKING:
    # At run time diffusers must not be imported before our own package has silenced transformers.
    from cluster.doctor.reference import PlainPipeline

USUAL_PROMPTS = ("a red seven on a blue ground", "a photograph of a lighthouse at dusk")
USUAL_GUIDANCE = 5.0
PLAIN_STEPS = 3
"""Steps of the plain pipeline."""

TABLE_LIMIT = 1e-4
"""Share of the largest entry; diffusers has its constants in fp32."""

OUTPUT_LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Share of a prediction's largest entry, by compute dtype: kernels may differ with the shape of a batch."""


@dataclass(frozen=True)
class Kind:
    """A kind of scheduler: what of a step is compared with diffusers', and what is said of it."""

    compared: Callable[[Transition, StepConstants, Tensor, Tensor], Tensor]
    """What is compared of N drawn steps: from their constants, states and network outputs, (N, C, H, W)."""
    remark: str
    settings: tuple[str, ...]
    """Of the scheduler's configuration: those that make a step another one."""
    do: str


def _next_state(drawn: Transition, *_: object) -> Tensor:
    return drawn.next_state_NCHW


def _without_noise(drawn: Transition, constants: StepConstants, state_NCHW: Tensor, velocity_NCHW: Tensor) -> Tensor:
    """A flow's mean, less what an SDE of its sigma adds to keep the marginals: sigma^2/2 times the score -(x + (1 - s)
    v)/s (algorithms.md 0.6). What is left is the ODE's step, for every eta."""
    signal, share, sigma = (
        value_N.float().view(-1, 1, 1, 1) for value_N in (constants.signal_N, constants.noise_N, constants.sigma_N)
    )
    return drawn.mean_NCHW + sigma**2 / 2 * (state_NCHW + signal * velocity_NCHW) / share


DIFFUSION = Kind(
    _next_state,
    "",
    ("clip_sample", "thresholding", "rescale_betas_zero_snr", "variance_type", "timestep_spacing"),
    "set clip_sample, thresholding and rescale_betas_zero_snr to false in scheduler_config.json: a clipped step has no "
    "such density; a variance_type other than fixed_small has another one",
)
FLOW = Kind(
    _without_noise,
    ", the noise and what it adds to the mean left out: diffusers has no such SDE",
    ("shift", "use_dynamic_shifting", "shift_terminal", "invert_sigmas"),
    "please report this model and recipe",
)


def check_against_diffusers(chain: Chain, source: str, lora: StartingLora | None) -> Iterator[Finding]:
    """Loads the model a second time, as a plain pipeline, with the LoRA beside its weights."""
    from cluster.doctor.reference import PlainPipeline

    pipeline = PlainPipeline(source, chain.policy.dtype, str(chain.policy.device))
    if lora is not None:
        pipeline.add_lora(fetch(lora.path), lora.scale)
    yield from check_tables(chain, pipeline)
    yield from check_predictions(chain, pipeline)


def check_tables(chain: Chain, pipeline: PlainPipeline) -> Iterator[Finding]:
    """Our steps against those of diffusers' scheduler, from the same states, network outputs and noise."""
    kind, seed = FLOW if chain.sampler.is_flow else DIFFUSION, 1
    shape, schedule = (2, *chain.policy.latent_shape_CHW), chain.schedule.to(torch.device("cpu"))
    state_NCHW, output_NCHW = normal(seed, shape), normal(seed + 1, shape)
    theirs = pipeline.steps(chain.sampler, state_NCHW, output_NCHW, seed)
    if not _equal(schedule.timestep_N, theirs.timestep_T):
        found = f"other timesteps: ours {_short(schedule.timestep_N)}, diffusers' {_short(theirs.timestep_T)}"
        do = "hold scheduler_config.json against that of the original model; if it is the same, please report the model"
        yield Finding("scheduler tables", "error", found, do=do)
        return
    ours = []
    for step in range(len(schedule)):
        constants, noise_NCHW = schedule.at(torch.full((2,), step)), normal(seed + step, shape)
        predicted = chain.policy.prediction_type
        drawn = transition(state_NCHW, output_NCHW, constants, prediction_type=predicted, noise_NCHW=noise_NCHW)
        ours.append(kind.compared(drawn, constants, state_NCHW, output_NCHW))
    gap_T = _shares(torch.stack(ours), theirs.next_TNCHW)
    yield _judge_tables(kind, gap_T[:-1], theirs.to_next_T[:-1], theirs.config)
    yield _judge_last_step(chain, float(gap_T[-1]), bool(theirs.to_next_T[-1]), theirs.config)


def _equal(ours_T: Tensor, theirs_T: Tensor) -> bool:
    """A flow's timesteps are fp32."""
    return len(ours_T) == len(theirs_T) and torch.allclose(ours_T.double(), theirs_T.double(), rtol=1e-6, atol=0)


def _short(timestep_T: Tensor) -> list[float]:
    return [round(timestep, 2) for timestep in timestep_T.tolist()]


def _judge_tables(kind: Kind, gap_T: Tensor, to_next_T: Tensor, config: dict[str, object]) -> Finding:
    name, num_steps = "scheduler tables", len(gap_T)
    worst = float(gap_T[to_next_T].max()) if to_next_T.any() else 0.0
    found = f"steps differ from diffusers' {config['_class_name']} by {worst:.1g} of the largest entry{kind.remark}"
    if not worst <= TABLE_LIMIT:
        settings = ", ".join(f"{setting} {config[setting]}" for setting in kind.settings if setting in config)
        return Finding(name, "error", f"{found}: {settings}", do=kind.do, number=worst, limit=TABLE_LIMIT)
    if not to_next_T.all():
        found += f"; {int((~to_next_T).sum())} of {num_steps} were left out, since diffusers steps by a rounded stride "
        found += "and not to its own next timestep, as we do"
        do = "choose a sampler.num_steps that divides 1000, if other tools' images at the same seed are to be equal"
        return Finding(name, "warning", found, do=do, number=worst, limit=TABLE_LIMIT)
    return Finding(name, "ok", found, number=worst, limit=TABLE_LIMIT)


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
        found = f"guidance {scale:g}{', told to the network' * policy.family.embeds_guidance}: differs from "
        found += f"{pipeline.name}'s by {gap:.1g} of the largest entry"
        do = "compare text encoders, tokenizers and the model's files with the original's; diffusers must load it alike"
        verdict: Verdict = "ok" if gap <= limit else "error"
        yield Finding(f"prediction, {name}", verdict, found, "" if gap <= limit else do, gap, limit)


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
    if policy.family.embeds_guidance:
        return Finding(name, "ok", "no branches: the network is told the guidance, and evaluated once")
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


def _shares(ours_TX: Tensor, theirs_TX: Tensor) -> Tensor:
    """Returns the largest difference of each of T entries, as a share of its own largest value, (T,)."""
    return (ours_TX - theirs_TX).abs().flatten(1).amax(1) / theirs_TX.abs().flatten(1).amax(1)
