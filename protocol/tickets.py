"""Tickets: the unit of work. `ticket_id -> (round, index, prompt, G seeds, version)` is a pure function.

A ticket names the exact weights and the exact seeds, so its group is the same whichever actor makes it,
whenever, and however often. Nothing here keeps state: the plan of any round can be made at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from protocol.seeds import Purpose, derive_seed


@dataclass(frozen=True)
class Ticket:
    """One prompt to sample G siblings for, with the weights to use.

    Made by learner rank 0, eaten by a rollout worker. A worked example:

        Ticket(ticket_id="000003-0007", round=3, index=7, prompt="a red seven on a blue ground",
               seeds_G=(71..., 8...) [8 siblings], version=3, weights_digest="9f86d081..." [64 hex digits])
    """

    ticket_id: str
    round: int
    index: int
    prompt: str
    seeds_G: tuple[int, ...]
    version: int
    weights_digest: str


@dataclass(frozen=True)
class TicketPlan:
    """What fixes every ticket of a run except the digests of versions that do not exist yet."""

    run_seed: int
    prompts: tuple[str, ...]
    num_groups: int
    group_size: int
    lag: int

    def version_of(self, round_: int) -> int:
        """Round u is sampled with version max(0, u - lag)."""
        return max(0, round_ - self.lag)

    def ticket(self, round_: int, index: int, weights_digest: str) -> Ticket:
        """Returns ticket `index` in [0, num_groups) of a round."""
        ticket_id = f"{round_:06d}-{index:04d}"
        return Ticket(
            ticket_id=ticket_id,
            round=round_,
            index=index,
            prompt=self._prompt(round_ * self.num_groups + index),
            seeds_G=tuple(derive_seed(self.run_seed, Purpose.SIBLING, ticket_id, g) for g in range(self.group_size)),
            version=self.version_of(round_),
            weights_digest=weights_digest,
        )

    def round(self, round_: int, weights_digest: str) -> list[Ticket]:
        """Returns the P tickets of a round, sorted by ticket_id."""
        return [self.ticket(round_, index, weights_digest) for index in range(self.num_groups)]

    def _prompt(self, position: int) -> str:
        """Prompts come in passes over the file, each pass in an order of its own."""
        epoch, offset = divmod(position, len(self.prompts))
        return self.prompts[_pass_order(self.run_seed, epoch, len(self.prompts))[offset]]


@lru_cache(maxsize=2)  # A round may straddle two passes.
def _pass_order(run_seed: int, epoch: int, num_prompts: int) -> Sequence[int]:
    generator = np.random.Generator(np.random.Philox(derive_seed(run_seed, Purpose.PROMPT_ORDER, epoch)))
    order: list[int] = generator.permutation(num_prompts).tolist()
    return order
