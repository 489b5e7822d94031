"""From groups to arrays: a rank's part of a round, and the (trajectory, step) items of its passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protocol.groups import Group


@dataclass(frozen=True)
class RoundBatch:
    """P groups of one rank, sorted by ticket_id: latents_PGSCHW in fp32, log_prob_PGT fp64 (as the rollouts
    stored it), scored_PT bool, reward_PG fp32, one prompt a group. All on the learner's device."""

    groups: tuple[Group, ...]
    latents_PGSCHW: Tensor
    log_prob_PGT: Tensor
    scored_PT: Tensor
    reward_PG: Tensor

    @property
    def prompts(self) -> list[str]:
        """The prompt of each group."""
        return [group.prompt for group in self.groups]

    @property
    def num_latent_entries(self) -> int:
        """D, entries of one latent."""
        return int(self.latents_PGSCHW[0, 0, 0].numel())

    def part(self, number: int, num_parts: int) -> RoundBatch:
        """Returns one of `num_parts` equal, contiguous parts of the groups."""
        size = len(self.groups) // num_parts
        rows = slice(number * size, (number + 1) * size)
        return RoundBatch(
            self.groups[rows],
            self.latents_PGSCHW[rows],
            self.log_prob_PGT[rows],
            self.scored_PT[rows],
            self.reward_PG[rows],
        )


def stack_groups(groups: Sequence[Group], device: torch.device) -> RoundBatch:
    """Stacks groups in the order of their ticket_ids, whatever order they arrived in."""
    ordered = tuple(sorted(groups, key=lambda group: group.ticket_id))

    def field(name: str) -> Tensor:
        return torch.from_numpy(np.stack([group.array(name) for group in ordered])).to(device)

    return RoundBatch(
        ordered, field("latents_GSCHW").float(), field("log_prob_GT"), field("scored_T"), field("reward_G")
    )


def items_where(wanted_PGT: Tensor) -> Tensor:
    """Returns (N, 3) indices (group, sibling, step) of the true entries, siblings of one step side by side."""
    group_N, step_N, sibling_N = wanted_PGT.transpose(1, 2).nonzero().unbind(1)
    return torch.stack([group_N, sibling_N, step_N], dim=1)


def micro_batches(item_N3: Tensor, size: int) -> list[Tensor]:
    """Splits items into micro-batches of at most `size`; none where there are no items."""
    return list(torch.split(item_N3, size)) if len(item_N3) else []
