"""An updater by itself, in an engine of one rank: what it makes of groups, without streams or rollouts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.chain import Chain
from diffusion.policy import Policy
from learner.engine import Engine
from learner.update import Tools, Updater, UpdateReport
from learner.updaters import make_updater
from protocol.groups import Group
from protocol.recipe import Lora, Recipe

SHAPE_CHW = (4, 8, 8)
LN_2 = math.log(2)


@cache
def load(model: str) -> Policy:
    """A policy whose weights nobody changes."""
    return Policy(model, trainable=Lora(rank=2, alpha=2.0), seed=0, with_decoder=False)


class Bench:
    """An updater of some settings, on the tiny model."""

    def __init__(self, model: str, algorithm: Mapping[str, Any], *, follows: bool = False, **learner: Any) -> None:
        self.recipe = Recipe.model_validate(
            {
                "rounds": 30,
                "model": {"path": model, "trainable": {"rank": 2, "alpha": 2}},
                "prompts": {"train": "of the test"},
                "batch": {"num_groups": 12, "group_size": 3},
                "sampler": {"num_steps": 3},
                "rewards": [{"name": "jpeg_compressibility"}],
                "algorithm": algorithm,
                "learner": {"learning_rate": 1e-3, "weight_decay": 0.1, "micro_batch_size": 60, **learner},
            }
        )
        self.policy = copy.deepcopy(load(model))
        self.engine = Engine(self.policy.denoiser, self.recipe.learner, torch.device("cpu"))
        self.chain = Chain(self.policy, self.recipe.sampler)
        self.updater: Updater = make_updater(Tools(self.recipe, self.chain, self.engine, lambda: None, follows))

    def learn(self, groups: Sequence[Group], round_: int = 0) -> UpdateReport:
        """One round."""
        return self.updater.learn(groups, round_, None)

    def weights(self) -> dict[str, Tensor]:
        """The trained weights as they are now."""
        return {name: tensor.clone() for name, tensor in self.policy.trainable_state().items()}

    def move_weights(self, seed: int = 1) -> None:
        """Moves every trained weight, as optimizer steps would."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.policy.trainable_state().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def wrap_encoder(self, wrap: Callable[[Any], Any]) -> None:
        """Puts something around the encoder of a method on features."""
        self.updater._encoder = wrap(self.updater._encoder)  # type: ignore[attr-defined]


class Wrapped:
    """An encoder whose features are changed: by a function of them and of its input."""

    def __init__(self, encoder: Any, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._encoder, self._change = encoder, change

    @property
    def num_forward(self) -> int:
        """As many as are really encoded."""
        number: int = self._encoder.num_forward
        return number

    def __call__(self, state: Tensor, timestep: Tensor, embedding: Tensor) -> list[Tensor]:
        return [self._change(feature, state) for feature in self._encoder(state, timestep, embedding)]


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def make_group(index: int, prompt: str = "a red seven", **arrays: np.ndarray) -> Group:
    """A group of these fields, as it comes from the wire: in the order of their names."""
    return Group(
        ticket_id=f"000000-{index:04d}",
        round=0,
        index=index,
        prompt=prompt,
        version=0,
        weights_digest="",
        sampler="sampler",
        fingerprint="fingerprint",
        worker="worker",
        rollout_s=0.0,
        reward_s=0.0,
        num_images=0,
        num_evaluations=0,
        arrays=dict(sorted(arrays.items())),
    )


def latents(index: int, *shape: int) -> np.ndarray:
    """Latents that no other group has, in the wire's dtype."""
    return np.random.default_rng(index).standard_normal((*shape, *SHAPE_CHW)).astype(np.float16)


def with_arrays(group: Group, **arrays: np.ndarray) -> Group:
    """The group with other values in some fields."""
    return replace(group, arrays={**group.arrays, **arrays})
