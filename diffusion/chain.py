"""The chain: a policy and a sampler, stepped. Rollouts draw with it, the learner scores with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.conditioning import Conditioning
from diffusion.kernels import Transition, noised, teacher_forced_transition, transition
from diffusion.noise import initial_noise, step_noise
from diffusion.policy import Denoiser, Policy
from protocol.recipe import Sampler


@dataclass(frozen=True)
class Trajectories:
    """G sampled siblings of one prompt: latents_GSCHW in the wire's dtype (S = T + 1, last is x_0),
    log_prob_GT fp64 latent_sum, scored_T bool. All on the CPU."""

    latents_GSCHW: Tensor
    log_prob_GT: Tensor
    scored_T: Tensor


class Chain:
    """The Markov chain that a recipe's sampler makes of a policy."""

    def __init__(self, policy: Policy, sampler: Sampler) -> None:
        self.policy, self.sampler = policy, sampler
        self.schedule = policy.schedule(sampler)
        self.wire_dtype: torch.dtype = getattr(torch, sampler.wire_dtype)

    @property
    def num_branches(self) -> int:
        """Network evaluations of a step: 2 with guidance, but for models that are told the guidance."""
        return self.policy.num_branches(self.sampler.guidance_scale)

    @property
    def description(self) -> str:
        """Canonical JSON of all that fixes the chain: two chains with equal texts have equal densities."""
        facts = self.sampler.model_dump(mode="json")
        facts["timesteps"] = self.schedule.timestep_N.tolist()
        facts["prediction_type"] = self.policy.prediction_type
        return json.dumps(facts, sort_keys=True, separators=(",", ":"))

    def step(
        self,
        denoiser: Denoiser,
        state_NCHW: Tensor,
        step_N: Tensor,
        conditioning: Conditioning,
        *,
        noise_NCHW: Tensor | None = None,
        next_state_NCHW: Tensor | None = None,
    ) -> Transition:
        """Evaluates the network on N (state, step) items, then draws or scores the next states."""
        constants = self.schedule.at(step_N)
        output_NCHW = self.policy.predict(
            denoiser, state_NCHW, constants.timestep_N, conditioning, self.sampler.guidance_scale
        )
        return transition(
            state_NCHW,
            output_NCHW,
            constants,
            prediction_type=self.policy.prediction_type,
            noise_NCHW=noise_NCHW,
            next_state_NCHW=next_state_NCHW,
            wire_dtype=self.wire_dtype,
        )

    @torch.no_grad()
    def sample(
        self, prompt: str, seeds_G: Sequence[int], after_step: Callable[[], None] = lambda: None
    ) -> Trajectories:
        """Draws G siblings in one batch, calling `after_step` after each of the T steps.

        The batch is the group, so numbers do not depend on who else is sampled.
        """
        conditioning = self.policy.condition([prompt]).expand(len(seeds_G))

        def draw(state_GCHW: Tensor, step_G: Tensor, noise_GCHW: Tensor) -> Transition:
            return self.step(self.policy.denoiser, state_GCHW, step_G, conditioning, noise_NCHW=noise_GCHW)

        start = initial_noise(seeds_G, self.policy.latent_shape_CHW, shared=self.sampler.share_initial_noise)
        return self._walk(start, seeds_G, draw, after_step)

    @torch.no_grad()
    def teacher_forced(
        self, x0_NCHW: Tensor, seeds_N: Sequence[int], after_step: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Draws trajectories of N real images on this chain's steps, latents_NSCHW as in `Trajectories`.

        The network is not asked (`kernels.teacher_forced_transition`), and no number depends on the other images.
        Each image has its own seed, which no sampled sibling may share: a pair's trajectories are independent in
        SPIN's exact form. Raises ValueError unless there is a seed for each image of the model's latent shape.
        """
        expected_shape = (len(seeds_N), *self.policy.latent_shape_CHW)
        if x0_NCHW.shape != expected_shape:
            raise ValueError(f"{len(seeds_N)} seeds need latents of shape {expected_shape}, not {tuple(x0_NCHW.shape)}")
        clean_NCHW = x0_NCHW.float().to(self.policy.device)

        def draw(state_NCHW: Tensor, step_N: Tensor, noise_NCHW: Tensor) -> Transition:
            constants = self.schedule.at(step_N)
            return teacher_forced_transition(
                state_NCHW, clean_NCHW, constants, noise_NCHW=noise_NCHW, wire_dtype=self.wire_dtype
            )

        noise_NCHW = initial_noise(seeds_N, self.policy.latent_shape_CHW, shared=False).to(self.policy.device)
        first = self.schedule.at(torch.zeros(len(seeds_N), dtype=torch.long))
        return self._walk(noised(clean_NCHW, noise_NCHW, first), seeds_N, draw, after_step).latents_GSCHW

    def _walk(
        self,
        start_GCHW: Tensor,
        seeds_G: Sequence[int],
        draw: Callable[[Tensor, Tensor, Tensor], Transition],
        after_step: Callable[[], None],
    ) -> Trajectories:
        """Draws T steps by `draw(state, step, noise)`, the noise by its key, every state rounded to the wire."""
        state_GCHW = start_GCHW.to(self.wire_dtype).float().to(self.policy.device)
        states, log_probs = [state_GCHW], []
        for step in range(len(self.schedule)):
            noise_GCHW = step_noise(seeds_G, step, self.policy.latent_shape_CHW).to(self.policy.device)
            drawn = draw(state_GCHW, torch.full((len(seeds_G),), step, device=self.policy.device), noise_GCHW)
            state_GCHW = drawn.next_state_NCHW
            states.append(state_GCHW)
            log_probs.append(drawn.log_prob_N)
            after_step()
        return Trajectories(
            torch.stack(states, dim=1).to(self.wire_dtype).cpu(),
            torch.stack(log_probs, dim=1).cpu(),
            self.schedule.scored_N.cpu(),
        )
