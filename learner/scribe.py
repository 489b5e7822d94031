"""What a gang writes down of each round: gathered from all ranks, put on disk by the first."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffusion.peak_memory import peak_bytes
from learner.collect import Collected, Counts
from learner.engine import Engine
from learner.journal import Journal, ledger_row, metrics_row
from learner.probes import Costs
from learner.receipts import Receipt
from learner.update import UpdateReport
from protocol.errors import RedisError
from protocol.recipe import Recipe
from protocol.shares import busy_shares, rollout_peaks
from protocol.stream import Streams
from protocol.tickets import TicketPlan


@dataclass(frozen=True)
class Round:
    """A round that is learnt from: `Round(number=3, version=2, step=16, skipped=0, digest="9f86d0...",
    learner_s=2.1, wait_s=0.4, left_out=(), looked={})`. `version` sampled it, `digest` is of what came of it, `looked`
    is what the firewall saw."""

    number: int
    version: int
    step: int
    skipped: int
    digest: str
    learner_s: float
    wait_s: float
    left_out: tuple[str, ...]
    looked: Mapping[str, Any]


class Scribe:
    """Writes metrics and ledger. All ranks call it together."""

    def __init__(
        self, recipe: Recipe, plan: TicketPlan, run_dir: Path, engine: Engine, streams: Streams, *, follows: bool
    ) -> None:
        self._recipe, self._plan, self._run_dir = recipe, plan, run_dir
        self._engine, self._streams, self._follows = engine, streams, follows
        self._costs_before, self._started_at = Costs(), time.monotonic()

    def open(self, first_round: int) -> None:
        """Cuts the files back to the rounds that are kept."""
        if self._engine.rank == 0:
            self._journal = Journal(self._run_dir, first_round)

    def write(self, done: Round, collected: Collected, report: UpdateReport, counts: Counts, costs: Costs) -> None:
        """Adds a round to both files."""
        parts = self._engine.gather((collected.receipts, vars(counts), peak_bytes(self._engine.device)))
        receipts = sorted((r for receipts, *_ in parts for r in receipts), key=lambda r: r.ticket_id)
        evaluations = self._evaluations(receipts, costs)
        if self._engine.rank > 0:
            return
        total = Counts(**{name: sum(part[name] for _, part, _ in parts) for name in vars(Counts())})
        said = self._said()
        metrics = metrics_row(
            round_=done.number,
            step=done.step,
            on_policy=done.version == done.number and not self._follows,
            staleness=done.number - done.version,
            receipts=receipts,
            report=report,
            counts=total,
            skipped_updates=done.skipped,
            times=self._times(receipts, done),
            costs=evaluations,
            left_out=done.left_out,
            busy=busy_shares(said),
            peaks=rollout_peaks(said) | {"learner": max(peak for *_, peak in parts)},
        )
        ledger = ledger_row(done.number, receipts, done.digest, total, self._engine.world_size, done.left_out)
        self._journal.write(metrics | self._loss_scale() | self._iteration(done) | dict(done.looked), ledger)

    def _loss_scale(self) -> dict[str, float]:
        """In fp16: what losses are multiplied by, which a skipped update has halved if a gradient overflowed."""
        scale = self._engine.loss_scale
        return {} if scale is None else {"loss_scale": scale}

    def _iteration(self, done: Round) -> dict[str, int]:
        """In self-play: the iteration, from 0, and the steps that it has had."""
        starts, number = self._plan.iteration_starts, self._plan.iteration_of(done.number)
        if not starts:
            return {}
        num_steps = (done.number + 1 - starts[number]) * self._recipe.algorithm.num_steps_per_round
        return {"spin/iteration": number, "spin/step_in_iteration": num_steps}

    def _times(self, receipts: list[Receipt], done: Round) -> dict[str, float]:
        """rollout_s and reward_s add up over the round's groups, whoever made them."""
        return {
            "rollout_s": sum(receipt.rollout_s for receipt in receipts),
            "reward_s": sum(receipt.reward_s for receipt in receipts),
            "learner_s": done.learner_s,
            "wait_s": done.wait_s,
            "elapsed_s": time.monotonic() - self._started_at,
        }

    def _said(self) -> dict[str, dict[str, Any]]:
        with suppress(RedisError):  # A server that is away says nothing of anyone.
            return self._streams.progress()
        return {}

    def _evaluations(self, receipts: list[Receipt], costs: Costs) -> dict[str, float]:
        """What all ranks and the rollouts have evaluated for this round (algorithms.md 7.1)."""
        before, self._costs_before = self._costs_before, replace(costs)
        counts = [now - then for now, then in zip(vars(costs).values(), vars(before).values(), strict=True)]
        total = self._engine.sum(torch.tensor(counts, dtype=torch.float64))
        num_images = sum(receipt.num_images for receipt in receipts)
        return {
            **dict(zip(vars(before), map(int, total.tolist()), strict=True)),
            "unet_sampling": sum(receipt.num_evaluations for receipt in receipts),
            "vae_decode": num_images,
            "reward_queries": num_images * len(self._recipe.rewards),
        }
