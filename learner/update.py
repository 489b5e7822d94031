"""One round's update: what the recipe's algorithm makes of a rank's groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion.chain import Chain
from diffusion.policy import Policy
from learner.descent import Descent, Step
from learner.engine import Engine
from learner.learning_rate import learning_rate
from learner.probes import Costs
from protocol.groups import Group
from protocol.recipe import Recipe

Behaviour = Callable[[], AbstractContextManager[None]]
"""Makes a context in which the module holds the weights that sampled the round."""


@dataclass
class UpdateReport:
    """What a round's update did, summed or maximised over ranks. Lists have one entry a step. Methods without
    log-probabilities have no KL and no parity."""

    kl: float | None = None
    parity_max_abs: float | None = None
    recomputed: bool | None = None
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    skipped: int = 0
    details: list[dict[str, float]] = field(default_factory=list)

    def add(self, step: Step, rate: float, details: dict[str, float]) -> None:
        """Notes an optimizer step."""
        self.skipped += step.grad_norm is None
        self.grad_norm.append(step.grad_norm or 0.0)
        self.loss.append(step.loss)
        self.learning_rate.append(rate)
        self.details.append(details)


def open_policy(recipe: Recipe, device: torch.device, *, with_decoder: bool = False) -> Policy:
    """Returns the policy that a learner trains, with the networks beside it that its algorithm needs: before an engine
    wraps it. Only who samples too needs the decoder."""
    policy = Policy.from_recipe(recipe, device, with_decoder=with_decoder)
    policy.keep_reference()
    perception = getattr(recipe.algorithm, "perception", None)
    if perception is not None and perception.encoder_weights == "ema":
        policy.keep_average()
    if recipe.learner.gradient_checkpointing:
        policy.forget_activations()
    return policy


class Updater(Protocol):
    """Applies an algorithm to rounds of groups. All ranks call it together."""

    @property
    def costs(self) -> Costs:
        """Network evaluations so far on this rank."""
        ...

    def learn(self, groups: Sequence[Group], round_: int, behaviour: Behaviour | None) -> UpdateReport:
        """Takes the round's optimizer steps. `behaviour` is None when the weights at the round's start sampled it, but
        never in self-play, whose opponent it is."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns what later rounds depend on besides the weights, as JSON; the same on every rank."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state` returned."""
        ...


@dataclass(frozen=True)
class Place:
    """An optimizer step of a round: the pass over the round, the part of it, and the learning rate."""

    update: int
    part: int
    rate: float


@dataclass
class Tools:
    """What all updaters work with on a rank. One that follows learns from groups of another learner's weights."""

    recipe: Recipe
    chain: Chain
    engine: Engine
    after_pass: Callable[[], None]
    follows: bool = False
    descent: Descent = field(init=False)

    def __post_init__(self) -> None:
        size = self.recipe.learner.micro_batch_size
        self.descent = Descent(self.engine, size, self.after_pass)

    @property
    def policy(self) -> Policy:
        """The policy being trained."""
        return self.chain.policy

    def reach_all(self) -> Tensor:
        """A number whose graph holds every trained parameter."""
        policy, denoiser = self.policy, self.engine.denoiser
        state_NCHW = torch.zeros(1, *policy.latent_shape_CHW, device=policy.device)
        timestep_N = torch.zeros(1, dtype=torch.long, device=policy.device)
        return policy.predict(denoiser, state_NCHW, timestep_N, policy.condition([""]), 1.0).sum()

    def steps(self, round_: int) -> Iterator[Place]:
        """Yields the optimizer steps of a round, for each of which the engine then has its learning rate."""
        algorithm = self.recipe.algorithm
        for update in range(algorithm.num_updates):
            for part in range(algorithm.inner_minibatches):
                rate = learning_rate(self.recipe, round_, update * algorithm.inner_minibatches + part)
                self.engine.set_learning_rate(rate)
                yield Place(update, part, rate)

    def part(self, groups: Sequence[Group], part: int) -> Sequence[Group]:
        """Returns one of the equal, contiguous parts that a pass over the round is split into, by ticket_id."""
        ordered = sorted(groups, key=lambda group: group.ticket_id)
        size = len(ordered) // self.recipe.algorithm.inner_minibatches
        return ordered[part * size : (part + 1) * size]
