"""Excursions: a few sampling steps from a noised latent, and the clean image predicted at each state.

Diffusion-Sharpening's candidates (arXiv 2502.12146, Section 3). The first state is a latent noised to timestep tau_1,
the next are DDIM's (a flow model's: Euler's), a stride apart:

    x_1 = A x_0 + S noise  at tau_1,      x_{j+1} = DDIM(x_j)  at tau_{j+1} = tau_j - stride

The network's conditional branch alone is evaluated, without guidance. Every state is rounded to the wire's dtype
before it is fed on, so that whoever reads a group evaluates the network on the very states that were visited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.chain import Chain
from diffusion.kernels import PredictionType, noised, predicted_noise_and_clean, transition
from diffusion.noise import initial_noise, step_noise
from diffusion.process import Process
from diffusion.schedules import StepConstants
from protocol.algorithms import Excursion
from protocol.seeds import Purpose, derive_seed

Network = Callable[[Tensor, Tensor], Tensor]
"""(state_NCHW, timestep_N of training) -> the network's output, (N, C, H, W)."""


@dataclass(frozen=True)
class Start:
    """Where the excursions of a group begin: each candidate's clean latent and noise, and one timestep for all.

    A worked example, siblings under shared noise: timestep 613, x0_GCHW (8, 4, 64, 64) fp32, the ends of 8
    trajectories; noise_GCHW the same shape with 8 equal rows.
    """

    timestep: int
    x0_GCHW: Tensor
    noise_GCHW: Tensor


@dataclass(frozen=True)
class Visited:
    """The M states that each of G candidates visited: states_GMCHW in the wire's dtype, timestep_M long (falling),
    and the clean latents predicted there, x0hat_GMCHW in the compute dtype, to be decoded and scored."""

    states_GMCHW: Tensor
    timestep_M: Tensor
    x0hat_GMCHW: Tensor


def draw_start(
    seeds_G: Sequence[int],
    x0_GCHW: Tensor,
    settings: Excursion,
    *,
    num_train_timesteps: int,
    own_noise_GCHW: Tensor | None = None,
) -> Start:
    """Returns where a ticket's excursions begin: a function of its seeds, whoever asks and whatever else is drawn.

    The timestep is uniform over all training timesteps (the released code takes the largest of its processes').
    Noise is fp32 on the CPU: one a candidate (`fresh`), the first one's for all (`shared`), or own_noise_GCHW, the
    x_T of each candidate's own sample (`coupled`), which is None for clean latents that were not sampled.
    Raises ValueError for coupled noise without own noise.
    """
    timestep = derive_seed(seeds_G[0], Purpose.EXCURSION_TIMESTEP) % num_train_timesteps
    if settings.noise != "coupled":
        shared = settings.noise == "shared"
        return Start(timestep, x0_GCHW, initial_noise(_own_seeds(seeds_G), x0_GCHW.shape[1:], shared=shared))
    if own_noise_GCHW is None:
        raise ValueError("excursion.noise: coupled needs the x_T of each candidate's own sample")
    return Start(timestep, x0_GCHW, own_noise_GCHW)


def excursion_schedule(process: Process, first_timestep: int, settings: Excursion) -> StepConstants:
    """Returns the constants at the states of an excursion, DDIM's or Euler's: M of them, fewer if a timestep would be
    negative. Raises ValueError for a timestep outside of training's."""
    if not 0 <= first_timestep < len(process):
        raise ValueError(f"an excursion cannot start at timestep {first_timestep} of {len(process)}")
    num_states = min(settings.num_states, 1 + first_timestep // settings.stride)
    return process.steps(first_timestep - settings.stride * torch.arange(num_states), settings.eta)


def walk(
    network: Network,
    start: Start,
    schedule: StepConstants,
    step_noise_MGCHW: Tensor,
    *,
    prediction_type: PredictionType,
    wire_dtype: torch.dtype,
    after_step: Callable[[], None] = lambda: None,
) -> Visited:
    """Visits the states of `schedule` (M) with G candidates in one batch, calling `after_step` after each of them.

    step_noise_MGCHW drives the steps between states and is without effect at eta 0. Latents in fp64 stay fp64. A
    graph is kept if the caller has one. Raises ValueError for a start that is not finite.
    """
    dtype = torch.promote_types(start.x0_GCHW.dtype, torch.float32)
    # What crosses the wire makes the first state, so it is rounded first.
    x0_GCHW, noise_GCHW = (value.to(wire_dtype).to(dtype) for value in (start.x0_GCHW, start.noise_GCHW))
    if not bool(torch.isfinite(x0_GCHW).all() and torch.isfinite(noise_GCHW).all()):
        raise ValueError("an excursion was given a latent or noise that is not finite")
    steps = [schedule.at(torch.full((len(x0_GCHW),), index)) for index in range(len(schedule))]
    state_GCHW = noised(x0_GCHW, noise_GCHW, steps[0]).to(wire_dtype).to(dtype)
    states, cleans = [], []
    for constants, step_noise_GCHW in zip(steps, step_noise_MGCHW, strict=True):
        output_GCHW = network(state_GCHW, constants.timestep_N).to(dtype)
        states.append(state_GCHW)
        cleans.append(predicted_noise_and_clean(state_GCHW, output_GCHW, constants, prediction_type)[1])
        state_GCHW = transition(
            state_GCHW,
            output_GCHW,
            constants,
            prediction_type=prediction_type,
            noise_NCHW=step_noise_GCHW,
            wire_dtype=wire_dtype,
        ).next_state_NCHW
        after_step()
    return Visited(torch.stack(states, dim=1).to(wire_dtype), schedule.timestep_N, torch.stack(cleans, dim=1))


def walk_again(
    network: Network,
    first_NCHW: Tensor,
    timestep_NM: Tensor,
    process: Process,
    *,
    prediction_type: PredictionType,
    wire_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns the states (N, M, C, H, W) that the network visits itself and the target (`Process.target`) that it
    predicts there, which has a graph through all steps before it.

    N candidates go from their first states to timesteps of their own, by `walk`'s steps at eta 0: x0_hat noised with
    the predicted noise. The network that walked visits the very states again. Rounding to the wire's dtype passes
    gradients on as they are: in half precision they would vanish.
    """
    state_NCHW, states, predicted = first_NCHW, [], []
    for step, timestep_N in enumerate(timestep_NM.unbind(1)):
        output_NCHW = network(state_NCHW, timestep_N).to(state_NCHW.dtype)
        level = process.level(timestep_N)
        noise_NCHW, clean_NCHW = predicted_noise_and_clean(state_NCHW, output_NCHW, level, prediction_type)
        states.append(state_NCHW.detach())
        predicted.append(process.predicted_target(state_NCHW, output_NCHW, timestep_N, prediction_type))
        if step + 1 < timestep_NM.shape[1]:
            state_NCHW = noised(clean_NCHW, noise_NCHW, process.level(timestep_NM[:, step + 1]))
            state_NCHW = state_NCHW + (state_NCHW.to(wire_dtype).to(state_NCHW.dtype) - state_NCHW).detach()
    return torch.stack(states, dim=1), torch.stack(predicted, dim=1)


@torch.no_grad()
def excursion(
    chain: Chain,
    prompt: str,
    seeds_G: Sequence[int],
    start: Start,
    settings: Excursion,
    after_step: Callable[[], None] = lambda: None,
) -> Visited:
    """Runs a group's excursions with the chain's policy, as it is now; all tensors of the result are on the CPU.

    Of the chain's sampler only the wire's dtype matters. Noise between states (eta > 0) is each candidate's own,
    also where they share the first. The batch is the group, so numbers do not depend on who else is sampled.
    """
    policy = chain.policy
    schedule = excursion_schedule(policy.process, start.timestep, settings).to(policy.device)
    shape_CHW = start.x0_GCHW.shape[1:]
    noises = [step_noise(_own_seeds(seeds_G), step, shape_CHW) for step in range(len(schedule))]
    conditioning = policy.condition([prompt]).expand(len(seeds_G))
    visited = walk(
        lambda state, timestep: policy.predict(
            policy.denoiser, state, policy.process.told(timestep), conditioning, guidance_scale=1.0
        ),
        Start(start.timestep, start.x0_GCHW.to(policy.device), start.noise_GCHW.to(policy.device)),
        schedule,
        torch.stack(noises).to(policy.device),
        prediction_type=policy.prediction_type,
        wire_dtype=chain.wire_dtype,
        after_step=after_step,
    )
    return Visited(visited.states_GMCHW.cpu(), visited.timestep_M.cpu(), visited.x0hat_GMCHW.cpu())


def _own_seeds(seeds_G: Sequence[int]) -> list[int]:
    """Seeds of their own: the siblings' seeds drive the trajectories that excursions may start from."""
    return [derive_seed(seed, Purpose.EXCURSION_NOISE) for seed in seeds_G]
