"""From groups to arrays: a rank's part of a round, and the (trajectory, step) items of its passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusion.chain import Chain
from protocol.groups import Group
from protocol.seeds import Purpose, derive_seed


@dataclass(frozen=True)
class RoundBatch:
    """P groups of one rank, sorted by ticket_id: latents_PGSCHW in fp32, log_prob_PGT fp64 (as the rollouts
    stored it), scored_PT bool, one prompt a group. All on the learner's device."""

    groups: tuple[Group, ...]
    latents_PGSCHW: Tensor
    log_prob_PGT: Tensor
    scored_PT: Tensor

    @property
    def reward_PG(self) -> Tensor:
        """The siblings' rewards, fp32. Raises TrainingError where groups have none."""
        return stack(self.groups, "reward_G", self.log_prob_PGT.device)

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
        )


def stack_groups(groups: Sequence[Group], device: torch.device) -> RoundBatch:
    """Stacks trajectories in the order of their ticket_ids, whatever order they arrived in."""
    ordered = tuple(sorted(groups, key=lambda group: group.ticket_id))
    return RoundBatch(
        ordered,
        stack(ordered, "latents_GSCHW", device).float(),
        stack(ordered, "log_prob_GT", device),
        stack(ordered, "scored_T", device),
    )


def with_real_trajectories(batch: RoundBatch, chain: Chain, run_seed: int) -> RoundBatch:
    """Returns SPIN's pairs: for each sibling a group of two, a trajectory of the ticket's real image and the sibling's.

    Real trajectories are teacher-forced, each with noise of its own. Stored log-probabilities are the siblings'; those
    of real trajectories are 0 and are not to be used.
    """
    num_siblings = batch.latents_PGSCHW.shape[1]
    keys = [(group.ticket_id, g) for group in batch.groups for g in range(num_siblings)]
    seeds = [derive_seed(run_seed, Purpose.TEACHER_FORCING, ticket_id, g) for ticket_id, g in keys]
    real_PCHW = stack(batch.groups, "real_x0_CHW", chain.policy.device)
    real_NSCHW = chain.teacher_forced(real_PCHW.repeat_interleave(num_siblings, 0), seeds)
    log_prob_NT = batch.log_prob_PGT.flatten(0, 1)
    return RoundBatch(
        tuple(group for group in batch.groups for _ in range(num_siblings)),
        torch.stack([real_NSCHW.float().to(chain.policy.device), batch.latents_PGSCHW.flatten(0, 1)], dim=1),
        torch.stack([torch.zeros_like(log_prob_NT), log_prob_NT], dim=1),
        batch.scored_PT.repeat_interleave(num_siblings, 0),
    )


def stack(groups: Sequence[Group], name: str, device: torch.device) -> Tensor:
    """Returns one field of all groups, (P, ...), in its own dtype."""
    return torch.from_numpy(np.stack([group.array(name) for group in groups])).to(device)


def items_where(wanted_PGT: Tensor) -> Tensor:
    """Returns (N, 3) indices (group, sibling, step) of the true entries, siblings of one step side by side."""
    group_N, step_N, sibling_N = wanted_PGT.transpose(1, 2).nonzero().unbind(1)
    return torch.stack([group_N, sibling_N, step_N], dim=1)


def micro_batches(item_N3: Tensor, size: int) -> list[Tensor]:
    """Splits items into micro-batches of at most `size`; none where there are no items."""
    return list(torch.split(item_N3, size)) if len(item_N3) else []
