"""Whole rounds in one process on one device: production code, one role after the other, so that each has its own time
and memory.

    tickets -> Rollout -> codec -> Composition -> updater in a DeepSpeed engine -> Versions -> Rollout

Left out are Redis, Ray and checkpoints, which cost as much on any device.
"""

from __future__ import annotations

import copy
import gc
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from actors.makers import GroupMaker
from actors.real import open_real_images
from actors.rollout import Rollout
from cluster.redis_server import free_port
from cluster.sources import prepare_sources, read_plan
from diffusion.chain import Chain
from diffusion.policy import Policy
from diffusion.weights import pack
from learner.collect import Collected
from learner.composition import Composition
from learner.engine import Engine
from learner.parity import tolerance
from learner.receipts import receipt_of
from learner.update import Tools, UpdateReport
from learner.updaters import make_updater
from learner.versions import Versions, copy_state
from protocol.codec import decode_group, encode_group
from protocol.groups import Group
from protocol.recipe import Full, Recipe
from protocol.tickets import Ticket, TicketPlan
from rewards.contract import check_scores
from rewards.loading import build

IMAGES_IN = {"latents_GSCHW": None, "x0_GCHW": None, "states_GMCHW": None, "real_x0_CHW": 1, "pair_x0_2CHW": 2}
"""A group's fields that hold images, or what they were made into, and how many; None: one a sibling."""


class Memory:
    """The device's memory: on a GPU what tensors take, on the CPU all that the process holds."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def held_bytes(self) -> int:
        """Now, after what nobody refers to any more is gone."""
        gc.collect()
        return torch.cuda.memory_allocated() if self._on_gpu else _process_bytes("VmRSS")

    def forget_peak(self) -> None:
        """The next peak is of what comes."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux forgets a peak when told to.

    def peak_bytes(self) -> int:
        """The most since then."""
        return torch.cuda.max_memory_allocated() if self._on_gpu else _process_bytes("VmHWM")


@dataclass(frozen=True)
class AtOnce:
    """Scores that are there at once."""

    parts: Mapping[str, np.ndarray]

    def ready(self) -> bool:
        """True, always."""
        return True

    def result(self) -> Mapping[str, np.ndarray]:
        """Returns them by label."""
        return self.parts


class Rollouts:
    """A rollout worker: a policy with its autoencoder, and the recipe's rewards in the same process."""

    def __init__(self, recipe: Recipe, run_dir: Path, versions: Versions, device: torch.device) -> None:
        torch.set_num_threads(recipe.rollout_worker.threads)
        self.policy = Policy.from_recipe(recipe, device)
        versions.keep(0, self.policy.trainable_state())
        chain = Chain(self.policy, recipe.sampler)
        maker = GroupMaker(chain, recipe, open_real_images(recipe, run_dir, self.policy))
        self._rewards = {reward.label: build(reward.name, reward.kwargs) for reward in recipe.rewards}
        self._rollout = Rollout(
            chain, maker, lambda ticket: pack(versions.states[ticket.version]), self._score, "bench"
        )

    def make(self, tickets: Sequence[Ticket]) -> list[Group]:
        """Answers a round's tickets; groups have gone through the wire's form."""
        groups = [self._rollout.complete(self._rollout.sample(ticket, lambda: None)) for ticket in tickets]
        return [_sent(group) for group in groups]

    def _score(
        self, images: np.ndarray, prompt: str, ticket_id: str, num_states: int = 1, is_check: bool = False
    ) -> AtOnce:
        del ticket_id, num_states, is_check
        prompts = [prompt] * len(images)
        return AtOnce(
            {label: check_scores(label, score(images, prompts), prompts) for label, score in self._rewards.items()}
        )


@dataclass(frozen=True)
class Learnt:
    """What a round cost the learner; evaluations are of the denoiser, one latent and one branch each."""

    report: UpdateReport
    seconds: float
    num_forward: int
    num_backward: int
    peak_bytes: int


class LearnerOfOne:
    """A learner's only rank, made and called as `learner.train` does."""

    def __init__(self, recipe: Recipe, plan: TicketPlan, versions: Versions, device: torch.device) -> None:
        torch.set_num_threads(recipe.learner.threads)
        self._recipe, self._plan, self._versions = recipe, plan, versions
        self._device, self._memory = device, Memory(device)
        self._policy = Policy.from_recipe(recipe, device, with_decoder=False)
        self._policy.keep_reference()
        if recipe.learner.gradient_checkpointing:
            self._policy.forget_activations()
        engine, chain = Engine(self._policy.denoiser, recipe.learner, device), Chain(self._policy, recipe.sampler)
        self._composition = Composition(recipe.rewards, engine.gather)
        self._updater = make_updater(Tools(recipe, chain, engine, lambda: None))

    def learn(self, groups: list[Group], round_: int) -> Learnt:
        """Takes the round's optimizer steps, which alone are timed, and keeps the next version."""
        composed = self._composition.compose(Collected(groups, [receipt_of(group) for group in groups]))
        version = self._plan.version_of(round_)
        is_current = version == round_ and not self._recipe.iterations
        behaviour = None if is_current else lambda: self._holding(version)
        before = copy.copy(self._updater.costs)
        self._memory.forget_peak()
        started = time.perf_counter()
        report = self._updater.learn(composed.groups, round_, behaviour)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds, costs = time.perf_counter() - started, self._updater.costs
        self._versions.keep(round_ + 1, self._policy.trainable_state())
        num_forward, num_backward = costs.unet_forward - before.unet_forward, costs.unet_backward - before.unet_backward
        return Learnt(report, seconds, num_forward, num_backward, self._memory.peak_bytes())

    @contextmanager
    def _holding(self, version: int) -> Iterator[None]:
        current = copy_state(self._policy.trainable_state())
        self._policy.load_trainable_state(self._versions.states[version])
        try:
            yield
        finally:
            self._policy.load_trainable_state(current)


def measure(recipe: Recipe, run_dir: Path, device: torch.device, num_rounds: int = 2) -> dict[str, Any]:
    """Returns what `num_rounds` rounds cost, after one to warm up. Raises TrainingError where a loss is not finite.

    Seconds are those that a run reports: of rollouts those in which groups are made, of the learner those of
    `Updater.learn`, with its parity probes and frozen networks' passes, median of the rounds. `step_s` is the share of
    one optimizer step. A role's peak is above what the other one holds.
    """
    prepare_sources(recipe, run_dir, _say_nothing)
    plan, memory = read_plan(recipe, run_dir), Memory(device)
    versions, own_bytes = Versions(plan), memory.held_bytes()
    memory.forget_peak()
    rollouts = Rollouts(recipe, run_dir, versions, device)
    made = [rollouts.make(plan.round(0, versions.digests[0]))]
    rollout_bytes, held_bytes = memory.peak_bytes() - own_bytes, memory.held_bytes()
    learner = LearnerOfOne(recipe, plan, versions, device)
    learnt = [learner.learn(made[0], 0)]
    for round_ in range(1, num_rounds + 1):
        made.append(rollouts.make(plan.round(round_, versions.digests[plan.version_of(round_)])))
        learnt.append(learner.learn(made[-1], round_))
    row = {
        "num_trained": sum(tensor.numel() for tensor in rollouts.policy.trainable_state().values()),
        **_speed(recipe, made[1:], learnt[1:], tflop_per_evaluation(rollouts.policy)),
        "parity": parity_of(recipe, learnt, int(np.prod(rollouts.policy.latent_shape_CHW))),
        "loss": [loss for each in learnt for loss in each.report.loss],
        "grad_norm": [norm for each in learnt for norm in each.report.grad_norm],
    }
    row["rollout"]["peak_bytes"] = rollout_bytes
    row["learner"]["peak_bytes"] = max(each.peak_bytes for each in learnt) - held_bytes
    return row


def _speed(recipe: Recipe, made: Sequence[list[Group]], learnt: Sequence[Learnt], tflop: float) -> dict[str, Any]:
    """Returns seconds and rates. Operations are those of the denoiser: a backward pass counts as one forward pass with
    adapters and as two where all weights are trained, what gradient checkpointing computes again as nothing."""
    rollout_s = statistics.median(sum(group.rollout_s for group in groups) for groups in made)
    learner_s = statistics.median(each.seconds for each in learnt)
    num_images, num_drawn = sum(map(images_in, made[-1])), sum(group.num_evaluations for group in made[-1])
    num_learnt = learnt[-1].num_forward + learnt[-1].num_backward * (1 + isinstance(recipe.model.trainable, Full))
    return {
        "num_images": num_images,
        "images_per_s": num_images / (rollout_s + learner_s),
        "tflop_per_evaluation": tflop,
        "rollout": {
            "round_s": rollout_s,
            "images_per_s": num_images / rollout_s,
            "tflop_per_s": tflop * num_drawn / rollout_s,
        },
        "learner": {
            "round_s": learner_s,
            "step_s": learner_s / recipe.algorithm.num_steps_per_round,
            "tflop_per_s": tflop * num_learnt / learner_s,
        },
    }


def parity_of(recipe: Recipe, learnt: Sequence[Learnt], num_latent_entries: int) -> dict[str, float] | None:
    """Returns the largest gap between rollouts' log-probabilities and the learner's, latent_mean, beside what a run of
    this recipe would accept; None for methods without log-probabilities."""
    gaps = [each.report.parity_max_abs for each in learnt if each.report.parity_max_abs is not None]
    if not gaps:
        return None
    learner = recipe.learner.model_copy(update={"parity_tolerance": None})
    return {
        "max_abs": max(gaps),
        "limit": tolerance(recipe.model_copy(update={"learner": learner}), num_latent_entries),
    }


def images_in(group: Group) -> int:
    """Returns how many images a group was made of, drawn or encoded."""
    held = {name: array for name, array in group.arrays.items() if name in IMAGES_IN}
    return sum(IMAGES_IN[name] or len(array) for name, array in held.items())


@torch.no_grad()
def tflop_per_evaluation(policy: Policy) -> float:
    """Returns what the denoiser computes for one latent, 10^12 operations as torch counts them: SD-1.5 0.80, SDXL 6.76.

    Attention is counted, normalisation is not.
    """
    state_1CHW = torch.zeros(1, *policy.latent_shape_CHW, device=policy.device)
    timestep_1, told = torch.zeros(1, dtype=torch.long, device=policy.device), policy.condition(["a"])
    with FlopCounterMode(display=False) as counter:
        policy.predict(policy.denoiser, state_1CHW, timestep_1, told, 1.0)
    return counter.get_total_flops() / 1e12


def be_a_gang_of_one(device: torch.device) -> None:
    """Sets the environment of a rank that is alone, before DeepSpeed is imported."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone, MASTER_PORT=str(free_port("127.0.0.1")), DS_ACCELERATOR=device.type)


def _say_nothing(words: str) -> None:
    """A benchmark's sources are not news."""


def _sent(group: Group) -> Group:
    received = decode_group(encode_group(group))
    assert received.content_checksum() == group.content_checksum(), "the wire changes nothing"
    return received


def _process_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
