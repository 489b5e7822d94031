"""`sfumato verify --replay`: groups drawn at random are made again from their tickets alone and compared by checksum.

ledger row -> ticket (prompt, seeds, version) -> Rollout, as in a rollout worker -> group -> checksum == the ledger's?
                                       weights from a checkpoint, scores by rewards built here
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.makers import GroupMaker
from actors.real import open_real_images
from actors.rollout import FetchVersion, Rollout, Score
from cluster.device import own_device
from cluster.own_rewards import ScoreGroup, open_rewards
from cluster.score_log import Entry, ScoreLog, score_key
from cluster.verify import Record, Row, Violation, place, refuse
from diffusion.chain import Chain
from diffusion.fingerprint import fingerprint
from diffusion.policy import Policy
from diffusion.weights import pack
from learner.checkpoint import Checkpoint
from protocol.errors import RunDirError, VerifyError
from protocol.roles import Reward
from protocol.tickets import Ticket, TicketPlan


@dataclass(frozen=True)
class Draw:
    """A group of the ledger, by its row and its position there."""

    row: Row
    index: int

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What it was made on."""
        facts: dict[str, Any] = self.row.fingerprints[self.row.fingerprint_of[self.index]]
        return facts

    @property
    def worker(self) -> str:
        """Who made it."""
        return self.row.workers[self.index].rpartition("@")[0]

    @property
    def host(self) -> str:
        """Where it was made."""
        return self.row.workers[self.index].rpartition("@")[2]


def replay(record: Record, num_groups: int, seed: int) -> dict[str, str]:
    """Makes groups again, in as many threads as the run's rollout processes have. Returns what was found, in reading
    order. Raises VerifyError for groups that differ, or if none can be compared."""
    if record.follows:
        raise RunDirError("a follower's groups are those of its run", do="replay the run that it belongs to")
    rows = replayable(record)
    choices = [Draw(row, index) for row in rows for index in range(len(row.tickets))]
    drawn = random.Random(seed).sample(choices, min(num_groups, len(choices)))
    worker = record.recipe.rollout_worker
    with _threads(worker.threads):
        policy = Policy.from_recipe(record.recipe, own_device(wants_gpu=worker.num_gpus > 0))
        own = json.loads(fingerprint(policy.device, policy.base_digest))
        comparable = [draw for draw in drawn if draw.fingerprint == own]
        if not comparable:
            raise _nothing_comparable(drawn, own)
        _compare_all(comparable, record, policy)
    numbers = {
        "can be replayed": f"{len(rows)} of {len(record.rows)} rounds: those whose version is 0 or in a checkpoint",
        "replayed": f"{len(comparable)} of {len(drawn)} groups drawn, all bit-identical",
    }
    differing = _differences(drawn, own)
    return {**numbers, "not comparable": differing} if differing else numbers


def replayable(record: Record) -> list[Row]:
    """Returns the rounds whose weights can be had: a policy as loaded from recipe and seed is version 0."""
    holders = record.holders
    return [row for row in record.rows if row.version == 0 or row.version in holders]


def difference(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Says in which fields two fingerprints differ: `threads 2 (here 1)`."""
    names = sorted(name for name in {*theirs, *own} if theirs.get(name) != own.get(name))
    return ", ".join(f"{name} {theirs.get(name)} (here {own.get(name)})" for name in names)


def _differences(drawn: Sequence[Draw], own: Mapping[str, Any]) -> str:
    counts = Counter(difference(draw.fingerprint, own) for draw in drawn if draw.fingerprint != own)
    return "; ".join(f"{count} made on {fields}" for fields, count in counts.items())


def _nothing_comparable(drawn: Sequence[Draw], own: Mapping[str, Any]) -> VerifyError:
    hosts = ", ".join(sorted({draw.host for draw in drawn}))
    return VerifyError(
        f"none of the {len(drawn)} groups drawn can be compared: they were made on other numeric fingerprints",
        value=_differences(drawn, own),
        expected="groups made on this fingerprint, since bits are promised for equal ones",
        do=f"verify on {hosts} or a machine like it, with the same torch and base model; or draw more groups by "
        "--replay, or others by --seed",
    )


def _compare_all(draws: Sequence[Draw], record: Record, policy: Policy) -> None:
    with open_rewards(record.recipe, record.recipe.rewards) as functions:
        score = make_score(record.recipe.rewards, functions, record.run_dir)
        _compare_with(score, draws, record, policy)


def _compare_with(score: Score, draws: Sequence[Draw], record: Record, policy: Policy) -> None:
    chain = Chain(policy, record.recipe.sampler)
    maker = GroupMaker(chain, record.recipe, open_real_images(record.recipe, record.run_dir, policy))
    rollout = Rollout(chain, maker, _make_fetch(record, policy), score, "verify")
    # By version, so that each is loaded once.
    in_order = sorted(draws, key=lambda draw: (draw.row.version, draw.row.round, draw.index))
    refuse(
        "groups do not come out again; look for a faulty machine, an impure reward or nondeterministic kernels",
        [wrong for draw in in_order if (wrong := _compare(draw, rollout, record.plan))],
    )


def _compare(draw: Draw, rollout: Rollout, plan: TicketPlan) -> Violation | None:
    """Makes a group again as a rollout worker does, with weights whose digest is taken once they are loaded."""
    row = draw.row
    ticket = plan.ticket(row.round, draw.index, row.digest)
    where = f"{place(row)}, ticket {ticket.ticket_id}"
    group = rollout.complete(rollout.sample(ticket, after_step=lambda: None))
    if group.weights_digest != row.digest:
        return Violation(where, f"digest of version {row.version} as loaded here", group.weights_digest, row.digest)
    checksum = group.content_checksum()
    if checksum == row.checksums[draw.index]:
        return None
    what = f"checksum of the group that worker {draw.worker} on host {draw.host} made"
    return Violation(where, what, row.checksums[draw.index], f"{checksum}, that of the group made again")


def _make_fetch(record: Record, policy: Policy) -> FetchVersion:
    """Returns what stands for the weight store: version 0 is the policy as it was loaded."""
    holders, as_loaded = record.holders, pack(policy.trainable_state())

    def fetch(ticket: Ticket) -> bytes:
        return _read(holders[ticket.version], ticket.version) if ticket.version else as_loaded

    return fetch


def _read(found: Checkpoint, version: int) -> bytes:
    try:
        return found.version_bytes(version)
    except FileNotFoundError as error:
        raise RunDirError(
            f"{found.folder.name} is gone meanwhile: the run is in progress", do="verify again, or when it is done"
        ) from error


@dataclass(frozen=True)
class Scored:
    """Scores that are there as soon as they are asked for."""

    scores: Mapping[str, np.ndarray]

    def ready(self) -> bool:
        """True, always."""
        return True

    def result(self) -> Mapping[str, np.ndarray]:
        """Returns label -> scores, as reward actors' are sent."""
        return self.scores


def make_score(rewards: Sequence[Reward], functions: Mapping[str, ScoreGroup], run_dir: Path) -> Score:
    """Returns a function that scores a group, each reward with its actors' threads. What the run's score log holds is
    read there."""

    def score(
        images: np.ndarray,
        prompt: str,
        ticket_id: str,
        num_states: int = 1,
        is_check: bool = False,  # noqa: ARG001
    ) -> Scored:
        parts = {}
        for reward in rewards:
            entry = ScoreLog(run_dir, reward.label).read(score_key(ticket_id, images, prompt))
            if entry is None:
                with _threads(reward.threads):
                    entry = Entry(functions[reward.label](images, prompt, num_states))
            if entry.scores is not None:
                parts[reward.label] = entry.scores
        return Scored(parts)

    return score


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Computes with as many threads as a process of the run does: their number changes last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
