"""The chain: a policy and a sampler, stepped. Rollouts draw with it, the learner scores with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.kernels import Transition, transition
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
        embedding_NLE: Tensor,
        *,
        noise_NCHW: Tensor | None = None,
        next_state_NCHW: Tensor | None = None,
    ) -> Transition:
        """Evaluates the network on N (state, step) items, then draws or scores the next states."""
        constants = self.schedule.at(step_N)
        output_NCHW = self.policy.predict(
            denoiser, state_NCHW, constants.timestep_N, embedding_NLE, self.sampler.guidance_scale
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
        shape_CHW, device = self.policy.latent_shape_CHW, self.policy.device
        embedding_GLE = self.policy.embed(prompt).expand(len(seeds_G), -1, -1)
        state_GCHW = initial_noise(seeds_G, shape_CHW, shared=self.sampler.share_initial_noise)
        state_GCHW = state_GCHW.to(self.wire_dtype).float().to(device)
        states, log_probs = [state_GCHW], []
        for step in range(len(self.schedule)):
            drawn = self.step(
                self.policy.unet,
                state_GCHW,
                torch.full((len(seeds_G),), step, device=device),
                embedding_GLE,
                noise_NCHW=step_noise(seeds_G, step, shape_CHW).to(device),
            )
            state_GCHW = drawn.next_state_NCHW
            states.append(state_GCHW)
            log_probs.append(drawn.log_prob_N)
            after_step()
        return Trajectories(
            torch.stack(states, dim=1).to(self.wire_dtype).cpu(),
            torch.stack(log_probs, dim=1).cpu(),
            self.schedule.scored_N.cpu(),
        )
