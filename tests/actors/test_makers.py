"""What a group is made of, by what its ticket starts from and what the algorithm learns from: real model, real files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.datasets import Images
from actors.makers import GroupMaker, Made
from actors.real import RealImages, open_real_images
from cluster.sources import prepare_sources, read_plan
from diffusion.chain import Chain
from diffusion.policy import Policy
from protocol.datasets import Manifest
from protocol.paths import manifest_path
from protocol.recipe import Recipe
from protocol.tickets import Ticket, TicketPlan
from tests.models import make_tiny_model
from tests.small_datasets import library_cache, write_images, write_pairs

G, T, M = 3, 3, 3
CHW = (4, 8, 8)
IMAGE = (16, 16, 3)
ON_PROMPTS: dict[str, Any] = {"prompts": {"train": "prompts.txt"}, "rewards": [{"name": "jpeg_compressibility"}]}
ON_IMAGES: dict[str, Any] = {"data": [{"path": "images", "flip": True}]}
ON_PAIRS: dict[str, Any] = {"data": [{"path": "pairs", "kind": "pairs", "flip": True}]}
ON_SCORED_IMAGES: dict[str, Any] = {**ON_IMAGES, "rewards": ON_PROMPTS["rewards"]}
PRDP = {"name": "prdp", "kl_weight": 1e-2, "clip_eps": None}
SPIN = {"name": "spin", "iterations": [{"rounds": 2, "beta_half": 100}]}
SPIN_EXACT = {"name": "spin_exact", "iterations": [{"rounds": 2}]}


def sharpening(noise: str, **settings: Any) -> dict[str, Any]:
    """Excursions' settings, with this noise."""
    return {"name": "sharpening_rlhf", "beta_full": 1, "excursion": {"noise": noise, "stride": 40}, **settings}


SHARPENING_SFT = {"name": "sharpening_sft", "excursion": {"noise": "fresh"}}


class Workshop:
    """Makes groups as a rollout worker does that has just started."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self.recipe, self.policy = recipe, Policy.from_recipe(recipe)
        self.plan: TicketPlan = read_plan(recipe, run_dir)
        self.chain = Chain(self.policy, recipe.sampler)
        self.maker = GroupMaker(self.chain, recipe, open_real_images(recipe, run_dir, self.policy))
        self.run_dir, self.num_steps = run_dir, 0

    def tickets(self) -> list[Ticket]:
        return self.plan.round(0, "digest")

    def ticket(self, start: int = 0) -> Ticket:
        """The first ticket whose excursion has states enough."""
        return next(one for one in self.tickets()[start:] if not self._is_short(one))

    def make(self, ticket: Ticket) -> Made:
        return self.maker.make(ticket, self._count)

    def _count(self) -> None:
        self.num_steps += 1

    def _is_short(self, ticket: Ticket) -> bool:
        if self.recipe.algorithm.content != "excursions":
            return False
        return len(self.make(ticket).arrays["state_timestep_M"]) < M


Open = Callable[..., Workshop]


@pytest.fixture(scope="module")
def open_workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens workshops by the parts of a recipe."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("makers")
    make_tiny_model(folder / "model")
    (folder / "prompts.txt").write_text("a red seven\na blue one\na green two\n")
    write_images(folder / "images")
    write_pairs(folder / "pairs")
    numbers = iter(range(1000))

    def open_(source: dict[str, Any], algorithm: dict[str, Any], **sampler: Any) -> Workshop:
        recipe = Recipe.model_validate(
            {
                "rounds": 2,
                "model": {"path": str(folder / "model"), "trainable": {"rank": 2}},
                "batch": {"num_groups": 12, "group_size": G},
                "sampler": {"num_steps": T, **sampler},
                "algorithm": algorithm,
                **source,
            }
        )
        run_dir = folder / f"run-{next(numbers)}"
        run_dir.mkdir()
        prepare_sources(recipe, run_dir, lambda words: None)
        return Workshop(recipe, run_dir)

    with pytest.MonkeyPatch.context() as patch, library_cache(folder / "library-cache"):
        patch.chdir(folder)
        yield cache_by_content(open_)


def cache_by_content(open_: Open) -> Open:
    """Opens what was opened before only once: loading a model takes half a second."""

    @cache
    def opened(key: str) -> Workshop:
        source, algorithm, sampler = eval(key)  # noqa: S307
        return open_(source, algorithm, **sampler)

    return lambda source, algorithm, **sampler: opened(repr((source, algorithm, sampler)))
