"""One rank of two that learn from groups of which one rank has less than the other, and write down what came of it.

Run as `python -m tests.learner.descent_cells RANK PORT MODEL FOLDER CELL...`. Rank 0 writes FOLDER/<cell>.safetensors:
the trained weights and the losses. All cells share one process, since importing DeepSpeed takes seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from actors.makers import GroupMaker
from diffusion.chain import Chain
from diffusion.policy import Policy
from learner.engine import Engine
from learner.update import Tools
from learner.updaters import make_updater
from protocol.groups import Group
from protocol.recipe import Lora, Recipe
from protocol.tickets import Source, Ticket, TicketPlan

PROMPTS = ("a red seven", "a blue one", "a green two")
NUM_GROUPS, GROUP_SIZE = 6, 2


@dataclass(frozen=True)
class Cell:
    """An algorithm on two ranks of three groups each, and how many of each rank's groups it can learn from."""

    stage: int
    algorithm: dict[str, Any]
    usable: tuple[int, int]

    def recipe(self, model: str, world_size: int) -> Recipe:
        stage = self.stage if world_size > 1 else 0
        learner = {"world_size": world_size, "zero_stage": stage, "learning_rate": 1e-3, "micro_batch_size": 4}
        return Recipe.model_validate(
            {
                "rounds": 1,
                "model": {"path": model, "trainable": {"rank": 2}},
                "prompts": {"train": "of the test"},
                "batch": {"num_groups": NUM_GROUPS, "group_size": GROUP_SIZE},
                "sampler": {"num_steps": 3},
                "rewards": [{"name": "jpeg_compressibility"}],
                "algorithm": {**self.algorithm, "num_updates": 2},
                "learner": learner,
            }
        )

    def reward_G(self, index: int) -> np.ndarray:
        """A group's rewards: those that a rank cannot learn from tie."""
        rank, place = index % 2, index // 2
        return np.array([0.5, 0.5 + 0.25 * (index + 1) * (place < self.usable[rank])], np.float32)


DPO = {"name": "dpo", "beta_full": 100}
NCP_DPO = {"name": "ncp_dpo", "beta_full": 1e4, "perception": {"norm": "relative"}}
SHARPENING = {
    "name": "sharpening_rlhf",
    "beta_full": 100,
    "select_on": "final_x0",
    "excursion": {"noise": "shared"},
    "backprop_through_steps": True,
}
GRADIENT = {"name": "policy_gradient", "advantage": "centred", "clip_range": None}

CELLS = {
    "dpo_stage0": Cell(0, DPO, (3, 0)),
    "dpo_stage3": Cell(3, DPO, (3, 0)),
    "ncp_dpo_stage3": Cell(3, NCP_DPO, (1, 3)),
    "sharpening_stage3": Cell(3, SHARPENING, (3, 1)),
    "policy_gradient_stage3": Cell(3, GRADIENT, (3, 0)),
}

FEW = ("dpo_stage0", "ncp_dpo_stage3")
"""What the suite trains; the rest is slow."""


@cache
def base(model: str) -> Policy:
    """The weights that all groups are sampled with."""
    return Policy(model, trainable=Lora(rank=2), seed=0)


def make_groups(cell: Cell, model: str, rank: int, world_size: int) -> list[Group]:
    """A rank's groups of a round."""
    recipe = cell.recipe(model, 1)
    chain = Chain(base(model), recipe.sampler)
    maker = GroupMaker(chain, recipe)
    plan = TicketPlan(recipe.seed, (Source.of_prompts(PROMPTS),), NUM_GROUPS, GROUP_SIZE, recipe.lag)
    return [_group(maker, cell, ticket) for ticket in plan.round(0, "") if ticket.index % world_size == rank]


def _group(maker: GroupMaker, cell: Cell, ticket: Ticket) -> Group:
    made = maker.make(ticket, lambda: None)
    arrays = {**made.arrays, "reward_G": cell.reward_G(ticket.index)}
    about = ("sampler", "fingerprint", "worker", 0.0, 0.0, made.num_images, made.num_evaluations)
    return Group(ticket.ticket_id, 0, ticket.index, ticket.prompt, 0, "", *about, arrays=dict(sorted(arrays.items())))


def learn(cell: Cell, model: str, world_size: int, groups: Sequence[Group]) -> tuple[dict[str, Tensor], list[float]]:
    """Learns from a rank's groups; returns the trained weights and the losses."""
    recipe = cell.recipe(model, world_size)
    policy = Policy.from_recipe(recipe, with_decoder=False)
    engine = Engine(policy.denoiser, recipe.learner, torch.device("cpu"))
    updater = make_updater(Tools(recipe, Chain(policy, recipe.sampler), engine, lambda: None))
    losses = updater.learn(groups, 0, None).loss
    with engine.gathered():
        return {name: tensor.clone() for name, tensor in policy.trainable_state().items()}, losses


def learn_alone(cell: Cell, model: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """What one rank makes of all groups: its weights before and after, and the losses."""
    return base(model).trainable_state(), *learn(cell, model, 1, make_groups(cell, model, 0, 1))


def main() -> None:
    """Learns in the cells of these names on this rank."""
    rank, port, model, folder, *names = sys.argv[1:]
    os.environ.update(RANK=rank, WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    for name in names:
        cell = CELLS[name]
        weights, losses = learn(cell, model, 2, make_groups(cell, model, int(rank), 2))
        if rank == "0":
            save_file({**weights, "losses": torch.tensor(losses)}, Path(folder) / f"{name}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
