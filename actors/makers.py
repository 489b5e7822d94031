"""What a ticket's group is made of, before it is scored: by what the ticket starts from and what the algorithm needs.

    starts from     trajectories                      images                   excursions
    a prompt        all states, log-probabilities     clean latents            states visited from own samples
    a real image    those and the image (SPIN exact)  the image; with SPIN     states visited from the image
                                                      also the opponent's
    a pair          those and the winner (SPIN exact) the pair; with SPIN the  -
                                                      winner and the opponent's

Everything is a function of the ticket and of the weights that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from actors.latents import Moments
from actors.real import RealMoments
from diffusion.chain import Chain
from diffusion.excursion import draw_start, excursion
from diffusion.noise import normal
from protocol.algorithms import SharpeningRlhf, SharpeningSft, Spin, SpinExact
from protocol.recipe import Recipe
from protocol.requirements import is_sampled
from protocol.scores import part_name, state_part_name
from protocol.seeds import Purpose, derive_seed
from protocol.tickets import Ticket


@dataclass(frozen=True)
class Made:
    """A group's tensors and what is to be scored: uint8 images (G M, H, W, 3) of G candidates at M states each, or
    None. `num_states` is M, or None where candidates are scored once, at their end. `num_images` counts decodings,
    `num_evaluations` those of the U-Net, each branch of guidance by itself."""

    arrays: Mapping[str, np.ndarray]
    images: np.ndarray | None
    num_states: int | None
    num_images: int
    num_evaluations: int = 0

    def with_scores(self, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns all of the group's tensors, with each reward's scores by label: one a candidate, or one a state."""
        if self.num_states is None:
            return {**self.arrays, **{part_name(label): score_G for label, score_G in parts.items()}}
        score_GM = {state_part_name(label): score.reshape(-1, self.num_states) for label, score in parts.items()}
        return {**self.arrays, **score_GM}


class GroupMaker:
    """Makes groups with the weights that a chain's policy holds."""

    def __init__(self, chain: Chain, recipe: Recipe, real_moments: RealMoments | None = None) -> None:
        """`real_moments` reads the recipe's datasets, if it has any."""
        self._chain, self._recipe, self._real_moments = chain, recipe, real_moments

    def is_sampled(self, ticket: Ticket) -> bool:
        """True if the group depends on the weights that the ticket names."""
        return self.is_check(ticket) or is_sampled(self._recipe, self._recipe.source_kinds[ticket.source])

    def is_check(self, ticket: Ticket) -> bool:
        """True for the firewall's tickets, which come behind a round's own."""
        return ticket.index >= self._recipe.batch.num_groups

    def make(self, ticket: Ticket, after_step: Callable[[], None]) -> Made:
        """Returns what a ticket's group is made of. The firewall's tickets ask for nothing but images to score."""
        before = self._chain.policy.num_evaluations
        made = self._make(ticket, after_step)
        return replace(made, num_evaluations=self._chain.policy.num_evaluations - before)

    def _make(self, ticket: Ticket, after_step: Callable[[], None]) -> Made:
        if self.is_check(ticket):
            drawn = self._chain.sample(ticket.prompt, ticket.seeds_G, after_step)
            images = self._chain.policy.decode(drawn.latents_GSCHW[:, -1].float())
            return Made({}, images, None, len(images))
        real = self._real(ticket) if self._recipe.source_kinds[ticket.source] != "prompts" else {}
        if not self.is_sampled(ticket):
            return Made(real, None, None, 0)
        if self._recipe.content == "excursions":
            return self._excursion(ticket, real, after_step)
        return self._samples(ticket, real, after_step)

    def _samples(self, ticket: Ticket, real: Mapping[str, np.ndarray], after_step: Callable[[], None]) -> Made:
        drawn = self._chain.sample(ticket.prompt, ticket.seeds_G, after_step)
        reencodes = isinstance(self._recipe.algorithm, Spin)
        images = None
        if self._recipe.rewards or reencodes:
            images = self._chain.policy.decode(drawn.latents_GSCHW[:, -1].float())
        if self._recipe.content == "trajectories":
            arrays = {
                "latents_GSCHW": drawn.latents_GSCHW.numpy(),
                "log_prob_GT": drawn.log_prob_GT.numpy(),
                "scored_T": drawn.scored_T.numpy(),
            }
        elif reencodes:
            assert images is not None
            # Latents as they were drawn would tell an opponent's image from an encoded photograph at a glance.
            arrays = {"x0_GCHW": self._draw(self._chain.policy.encode(images), ticket.seeds_G, first_number=1)}
        else:
            arrays = {"x0_GCHW": drawn.latents_GSCHW[:, -1].numpy()}
        num_images = 0 if images is None else len(images)
        return Made({**arrays, **real}, images if self._recipe.rewards else None, None, num_images)

    def _excursion(self, ticket: Ticket, real: Mapping[str, np.ndarray], after_step: Callable[[], None]) -> Made:
        algorithm, policy = self._recipe.algorithm, self._chain.policy
        assert isinstance(algorithm, SharpeningSft | SharpeningRlhf)
        if real:
            x0_GCHW = torch.from_numpy(real["real_x0_CHW"]).float().expand(len(ticket.seeds_G), -1, -1, -1)
            own_noise_GCHW = None
        else:
            drawn = self._chain.sample(ticket.prompt, ticket.seeds_G, after_step)
            x0_GCHW, own_noise_GCHW = drawn.latents_GSCHW[:, -1].float(), drawn.latents_GSCHW[:, 0].float()
        start = draw_start(
            ticket.seeds_G,
            x0_GCHW,
            algorithm.excursion,
            num_train_timesteps=len(policy.process),
            own_noise_GCHW=own_noise_GCHW,
        )
        visited = excursion(self._chain, ticket.prompt, ticket.seeds_G, start, algorithm.excursion, after_step)
        on_path = algorithm.select_on != "final_x0"
        images = policy.decode(visited.x0hat_GMCHW.flatten(0, 1) if on_path else x0_GCHW)
        arrays = {
            "target_GCHW": policy.process.target(start.noise_GCHW, start.x0_GCHW).to(self._chain.wire_dtype).numpy(),
            "states_GMCHW": visited.states_GMCHW.numpy(),
            "state_timestep_M": visited.timestep_M.numpy(),
        }
        return Made(arrays, images, len(visited.timestep_M) if on_path else None, len(images))

    def _real(self, ticket: Ticket) -> dict[str, np.ndarray]:
        assert self._real_moments is not None, "a recipe with datasets needs what reads them"
        encoded_NCHW = self._draw(self._real_moments(ticket), ticket.seeds_G)
        is_pair = self._recipe.source_kinds[ticket.source] == "pairs"
        if is_pair and not isinstance(self._recipe.algorithm, Spin | SpinExact):
            return {"pair_x0_2CHW": encoded_NCHW}
        # Self-play plays against a pair's winner.
        return {"real_x0_CHW": encoded_NCHW[0]}

    def _draw(self, moments: Moments, seeds_G: Sequence[int], first_number: int = 0) -> np.ndarray:
        """Returns latents drawn from the autoencoder's posteriors, each by a key of its own, in the wire's dtype. A
        ticket's images are numbered, its real ones first."""
        mean_NCHW, std_NCHW = moments
        keys = [(seeds_G[n % len(seeds_G)], first_number + n) for n in range(len(mean_NCHW))]
        noises = [normal(derive_seed(seed, Purpose.POSTERIOR, number), mean_NCHW.shape[1:]) for seed, number in keys]
        latents: np.ndarray = (mean_NCHW + std_NCHW * torch.stack(noises)).to(self._chain.wire_dtype).numpy()
        return latents
