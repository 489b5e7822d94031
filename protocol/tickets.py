"""Tickets: the unit of work. `ticket_id -> (round, index, prompt, G seeds, version)` is a pure function.

A ticket names the exact weights and the exact seeds, so its group is the same whichever actor makes it,
whenever, and however often. Nothing here keeps state: the plan of any round can be made at any time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from protocol.algorithms import SourceKind
from protocol.seeds import Purpose, derive_seed, draw_uniform


@dataclass(frozen=True)
class Source:
    """What tickets start from: the prompts of a file, or the rows of a dataset with their captions.

    A worked example, a dataset whose rows 0 and 2 are usable:

        Source(kind="images", prompts=("a red seven", "a blue one"), rows=(0, 2), weight=1.0)
    """

    kind: SourceKind
    prompts: tuple[str, ...]
    rows: tuple[int, ...]
    weight: float

    @staticmethod
    def of_prompts(prompts: Sequence[str], weight: float = 1.0) -> Source:
        """Returns the source that a prompt file is."""
        return Source("prompts", tuple(prompts), tuple(range(len(prompts))), weight)


@dataclass(frozen=True)
class Ticket:
    """One prompt to sample G siblings for, with the weights to use, or one row of a dataset to start from.

    Made by learner rank 0, eaten by a rollout worker. A worked example:

        Ticket(ticket_id="000003-0007", round=3, index=7, prompt="a red seven on a blue ground", source=0, row=41,
               seeds_G=(71..., 8...) [8 siblings], version=3, weights_digest="9f86d081..." [64 hex digits])

    `source` is a position in the plan's sources, `row` the prompt's or the dataset row's number there.
    """

    ticket_id: str
    round: int
    index: int
    prompt: str
    source: int
    row: int
    seeds_G: tuple[int, ...]
    version: int
    weights_digest: str


@dataclass(frozen=True)
class Checks:
    """The firewall's tickets: every so many rounds the same prompts and seeds, with the round's version.

    Their index is behind the round's own: `Ticket(ticket_id="000005-check-0001", index=num_groups + 1, ...)`.
    """

    every_rounds: int
    prompts: tuple[str, ...]
    images_per_prompt: int
    seed: int

    def tickets(self, round_: int, first_index: int, version: int, weights_digest: str) -> list[Ticket]:
        """Returns a round's check tickets, none where no check is due."""
        if round_ % self.every_rounds:
            return []
        return [
            Ticket(
                ticket_id=f"{round_:06d}-check-{number:04d}",
                round=round_,
                index=first_index + number,
                prompt=prompt,
                source=0,
                row=number,
                seeds_G=evaluation_seeds(self.seed, prompt, self.images_per_prompt),
                version=version,
                weights_digest=weights_digest,
            )
            for number, prompt in enumerate(self.prompts)
        ]


def evaluation_seeds(seed: int, prompt: str, num_images: int) -> tuple[int, ...]:
    """Returns seeds that depend on the prompt and the image's number alone: two models that are drawn with one seed
    share all noise."""
    return tuple(derive_seed(seed, Purpose.EVALUATION, prompt, number) for number in range(num_images))


@dataclass(frozen=True)
class TicketPlan:
    """What fixes every ticket of a run except the digests of versions that do not exist yet.

    With `iteration_starts`, the first rounds of self-play's iterations, every round of an iteration is sampled with
    the weights at its start (Yuan et al., arXiv 2402.10210), and a row's images are the same whenever it comes again.
    With `from_base` version 0 samples everything.
    """

    run_seed: int
    sources: tuple[Source, ...]
    num_groups: int
    group_size: int
    lag: int
    iteration_starts: tuple[int, ...] = ()
    from_base: bool = False
    checks: Checks | None = None

    def version_of(self, round_: int) -> int:
        """Round u is sampled with version max(0, u - lag), or with that of its iteration's start."""
        if self.from_base:
            return 0
        if self.iteration_starts:
            return self.iteration_starts[self.iteration_of(round_)]
        return max(0, round_ - self.lag)

    def iteration_of(self, round_: int) -> int:
        """Returns the number of a round's iteration of self-play; 0 without."""
        return max(0, bisect_right(self.iteration_starts, round_) - 1)

    def is_sampled_with(self, version: int) -> bool:
        """True if some ticket names the version."""
        if self.from_base:
            return version == 0
        return not self.iteration_starts or version in self.iteration_starts

    def kept_versions(self, round_: int) -> list[int]:
        """Returns the versions that rounds from this one on may still ask for, up to that of its start."""
        return sorted(
            {round_, *(v for r in range(round_, round_ + self.lag + 1) if (v := self.version_of(r)) <= round_)}
        )

    def ticket(self, round_: int, index: int, weights_digest: str) -> Ticket:
        """Returns ticket `index` in [0, num_groups) of a round."""
        ticket_id = f"{round_:06d}-{index:04d}"
        number, position = self._draw(ticket_id, round_ * self.num_groups + index)
        source = self.sources[number]
        return Ticket(
            ticket_id=ticket_id,
            round=round_,
            index=index,
            prompt=source.prompts[position],
            source=number,
            row=source.rows[position],
            seeds_G=self._seeds(round_, ticket_id, number, source.rows[position]),
            version=self.version_of(round_),
            weights_digest=weights_digest,
        )

    def round(self, round_: int, weights_digest: str) -> list[Ticket]:
        """Returns the P tickets of a round, sorted by ticket_id."""
        return [self.ticket(round_, index, weights_digest) for index in range(self.num_groups)]

    def check_tickets(self, round_: int, weights_digest: str) -> list[Ticket]:
        """Returns the firewall's tickets of a round, if it has any."""
        if self.checks is None:
            return []
        return self.checks.tickets(round_, self.num_groups, self.version_of(round_), weights_digest)

    def _seeds(self, round_: int, ticket_id: str, source: int, row: int) -> tuple[int, ...]:
        key = f"{self.iteration_of(round_)}/{source}/{row}" if self.iteration_starts else ticket_id
        return tuple(derive_seed(self.run_seed, Purpose.SIBLING, key, g) for g in range(self.group_size))

    def _draw(self, ticket_id: str, position: int) -> tuple[int, int]:
        """Returns a ticket's source, drawn by key, and its position there: items come in passes over the source, each
        pass in an order of its own. Of several sources each pass visits the share of items that its weight gives."""
        number = self._source(ticket_id) if len(self.sources) > 1 else 0
        size = len(self.sources[number].prompts)
        epoch, offset = divmod(position, size)
        # A lone source's key is that of a run without others.
        key = (epoch, number) if len(self.sources) > 1 else (epoch,)
        return number, _pass_order(self.run_seed, key, size)[offset]

    def _source(self, ticket_id: str) -> int:
        weights = list(accumulate(source.weight for source in self.sources))
        drawn = draw_uniform(self.run_seed, Purpose.SOURCE, ticket_id) * weights[-1]
        return min(bisect_right(weights, drawn), len(weights) - 1)


@lru_cache(maxsize=16)  # A round may straddle two passes of each source.
def _pass_order(run_seed: int, key: tuple[int, ...], num_prompts: int) -> Sequence[int]:
    generator = np.random.Generator(np.random.Philox(derive_seed(run_seed, Purpose.PROMPT_ORDER, *key)))
    order: list[int] = generator.permutation(num_prompts).tolist()
    return order
