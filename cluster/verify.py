"""`sfumato verify`: does what a run has written hold together? Without torch; `cluster.replay` makes groups again.

recipe and prompts -> plan ----------------.
checkpoints/  metrics.jsonl  ledger.jsonl --+--> checks, pure functions --> violations, all of them in one error
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Json, NonNegativeInt, ValidationError

from cluster.run_dir import home_of, read_recipe
from cluster.sources import read_plan
from learner.checkpoint import Checkpoint, Meta, checkpoints_in
from protocol.errors import RunDirError, VerifyError
from protocol.recipe import Recipe
from protocol.tickets import TicketPlan

TORCH_NAMES = {"F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}
"""Dtypes of weights: safetensors' names, and those that a digest is taken of."""

UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
"""What reading a damaged file may raise: JSON of another shape, or none."""

SHOWN = 60
"""Bytes of a line that cannot be read which an error shows."""


class MetricsLine(BaseModel):
    """What counts here of a line of metrics.jsonl."""

    model_config = ConfigDict(frozen=True, strict=True)

    round: NonNegativeInt


class VersionsLine(MetricsLine):
    """What a line of ledger.jsonl says of versions: the one its round was sampled with, and the one it published."""

    version: NonNegativeInt
    digest: str
    published_version: int
    published_digest: str


class Row(VersionsLine):
    """A line of ledger.jsonl, as `learner.journal.ledger_row` makes it."""

    tickets: tuple[str, ...]
    checksums: tuple[str, ...]
    workers: tuple[str, ...]
    fingerprint_of: tuple[NonNegativeInt, ...]
    fingerprints: tuple[Json[dict[str, Any]], ...]
    made_good: dict[str, int]
    world_size: int
    left_out: tuple[str, ...] = ()


Line = TypeVar("Line", bound=MetricsLine)


@dataclass(frozen=True)
class Violation:
    """One thing that is not as it must be: `Violation("ledger, round 3", "version", 2, "3")`."""

    where: str
    what: str
    value: object
    expected: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. Got: {self.value!r}. Expected: {self.expected}."


@dataclass(frozen=True)
class Record:
    """What a run has written of itself."""

    run_dir: Path
    recipe: Recipe
    plan: TicketPlan
    rows: list[Row]
    checkpoints: list[Checkpoint]
    sampled_by: list[Row]
    """The ledger of the learner whose weights sampled: of a follower another's than its own."""

    @property
    def follows(self) -> bool:
        """True of a follower, whose groups another learner's weights have sampled."""
        return self.sampled_by is not self.rows

    @property
    def holders(self) -> dict[int, Checkpoint]:
        """For each version whose weights are on disk, a checkpoint that holds them."""
        return {int(version): found for found in self.checkpoints for version in found.meta.digests}


def verify_record(run_dir: Path) -> Record:
    """Reads what a run has written, of one in progress too. Raises VerifyError listing all that does not hold."""
    recipe = read_recipe(run_dir)
    home = home_of(run_dir)
    plan = read_plan(recipe, home)
    # Backwards through what a round writes, so that a run in progress is never ahead of what was read of it.
    checkpoints, torn = _checkpoints(run_dir)
    metrics, bad_metrics = read_lines(run_dir / "metrics.jsonl", MetricsLine)
    rows, bad_rows = read_lines(run_dir / "ledger.jsonl", Row)
    if not rows and not bad_rows:
        raise RunDirError(f"the run {run_dir} has not published a version yet", do="wait for its first round")
    # What cannot be read stands alone: all else that is then amiss would follow from it.
    refuse(f"what the run {run_dir} has written cannot be read", [*bad_rows, *bad_metrics, *torn])
    sampled_by = rows
    if home != run_dir:
        sampled_by, bad_home = read_lines(home / "ledger.jsonl", Row)
        refuse(f"the ledger of the run {home} cannot be read", bad_home)
    record = Record(run_dir, recipe, plan, rows, checkpoints, sampled_by)
    refuse(f"the run {run_dir} does not verify", check_record(record, [line.round for line in metrics]))
    return record


def summary(record: Record) -> dict[str, str]:
    """Returns what was found, in reading order."""
    rows = record.rows
    hosts = Counter(worker.rpartition("@")[2] for row in rows for worker in row.workers)
    fingerprints = Counter(_describe(row.fingerprints[number]) for row in rows for number in row.fingerprint_of)
    made_good: Counter[str] = Counter()
    for row in rows:
        made_good.update(row.made_good)
    held = [f"{found.folder.name} (versions {', '.join(found.meta.digests)})" for found in record.checkpoints]
    numbers = {
        "rounds": f"{len(rows)} of {record.recipe.rounds}, each once, in ledger and metrics",
        "tickets": f"{sum(len(row.tickets) for row in rows)}, those of the plan, each once",
        "versions": f"0 to {rows[-1].published_version}, their digests chain",
        "groups by fingerprint": "; ".join(f"{count} on {name}" for name, count in fingerprints.items()),
        "groups by host": ", ".join(f"{count} on {host}" for host, count in hosts.items()),
        "made good": ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in made_good.items()),
        "checkpoints": ", ".join(held) or "none yet",
    }
    notes = world_size_notes(rows)
    return {**numbers, "note": "; ".join(notes)} if notes else numbers


# --- reading --------------------------------------------------------------------------------------------


def read_lines(file: Path, kind: type[Line]) -> tuple[list[Line], list[Violation]]:
    """Returns a file's whole lines, and those that cannot be read. A torn last line is being written, or a crash
    cut it short: it does not count."""
    lines: list[Line] = []
    violations = []
    data = file.read_bytes() if file.exists() else b""
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            lines.append(kind.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            what = ": ".join([".".join(map(str, first["loc"])) or "all of it", first["msg"]])
            beginning = line[:SHOWN].decode(errors="replace")
            violations.append(Violation(f"{file.name}, line {number}", what, beginning, "what this sfumato writes"))
    return lines, violations


def _checkpoints(run_dir: Path) -> tuple[list[Checkpoint], list[Violation]]:
    try:
        return checkpoints_in(run_dir), []
    except UNREADABLE as error:
        return [], [Violation("checkpoints", "a meta.json cannot be read", str(error), "what this sfumato writes")]


def packed_digest(data: bytes) -> str:
    """Returns `diffusion.weights.weights_digest` of packed weights, without torch. Raises one of
    UNREADABLE for bytes that are not that."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    extents = sorted(part["data_offsets"] for part in header.values())
    if [first for first, _ in extents] + [len(data) - start] != [0] + [end for _, end in extents]:
        raise ValueError(f"its tensors do not fill its {len(data)} bytes")
    digest = hashlib.sha256()
    for name in sorted(header):
        part = header[name]
        first, end = part["data_offsets"]
        digest.update(f"{name}|{TORCH_NAMES[part['dtype']]}|{tuple(part['shape'])}|".encode())
        digest.update(memoryview(data)[start + first : start + end])
    return digest.hexdigest()


# --- checks: what was written in, violations out --------------------------------------------------------


def check_record(record: Record, metrics_rounds: Sequence[int]) -> list[Violation]:
    """Checks the ledger by itself, and then metrics and checkpoints against it."""
    rows, named = record.rows, own_digests(record)
    checkpointed = max((found.meta.round for found in record.checkpoints), default=0)
    return [
        *check_ledger(rows, record.plan, record.sampled_by),
        *check_metrics(metrics_rounds, rows, checkpointed),
        *(wrong for found in record.checkpoints for wrong in check_meta(found.meta, named, record.plan)),
        *(wrong for found in record.checkpoints for wrong in _check_files(found, named)),
    ]


def check_ledger(rows: Sequence[Row], plan: TicketPlan, sampled_by: Sequence[Row]) -> list[Violation]:
    """Checks rounds, tickets, versions and the chain of digests."""
    return [
        *check_order(rows),
        *(wrong for row in rows for wrong in (*check_tickets(row, plan), *check_entries(row, plan.num_groups))),
        *(wrong for row in rows for wrong in check_versions(row, plan)),
        *check_chain(rows, sampled_by),
    ]


def check_order(rows: Sequence[Row]) -> list[Violation]:
    """Rounds are 0, 1, 2, ..., each once."""
    before = [-1, *(row.round for row in rows)]
    return [
        Violation(place(row), f"stands behind round {last}" if last >= 0 else "stands first", row.round, f"{last + 1}")
        for last, row in zip(before, rows, strict=False)
        if row.round != last + 1
    ]


def check_tickets(row: Row, plan: TicketPlan) -> list[Violation]:
    """A round consumes the tickets of its plan, each once, and lists them sorted."""
    planned = [ticket.ticket_id for ticket in plan.round(row.round, row.digest)]
    counts = Counter(row.tickets)
    violations = [
        Violation(place(row), f"ticket {ticket_id}", f"{counts[ticket_id]} times", "once")
        for ticket_id in planned
        if counts[ticket_id] != 1
    ]
    violations += [
        Violation(place(row), "a ticket that is not of the plan", ticket_id, f"{planned[0]} to {planned[-1]}")
        for ticket_id in sorted(counts.keys() - set(planned))
    ]
    if not violations and list(row.tickets) != planned:
        violations.append(Violation(place(row), "the order of tickets", list(row.tickets), "sorted"))
    return violations


def check_entries(row: Row, num_groups: int) -> list[Violation]:
    """Lists that have an entry a ticket have one, and fingerprints that are pointed at are there."""
    lists = {"checksums": row.checksums, "workers": row.workers, "fingerprint_of": row.fingerprint_of}
    return [
        Violation(place(row), f"entries of {name}", len(entries), f"{num_groups}, one a ticket")
        for name, entries in lists.items()
        if len(entries) != num_groups
    ] + [
        Violation(place(row), "an entry of fingerprint_of", number, f"below {len(row.fingerprints)}, their number")
        for number in sorted(set(row.fingerprint_of))
        if number >= len(row.fingerprints)
    ]


def check_versions(row: Row, plan: TicketPlan) -> list[Violation]:
    """A round is sampled with the plan's version and publishes version u + 1."""
    wanted = {"version": plan.version_of(row.round), "published_version": row.round + 1}
    return [
        Violation(place(row), name, getattr(row, name), f"{version} at lag {plan.lag}")
        for name, version in wanted.items()
        if getattr(row, name) != version
    ]


def check_chain(rows: Sequence[Row], sampled_by: Sequence[Row]) -> list[Violation]:
    """A round was sampled with the weights that an earlier one published under that version."""
    named = digests_of(sampled_by)
    return [
        Violation(
            place(row),
            f"digest of version {row.version}",
            row.digest,
            named.get(row.version, "that of a version which an earlier round has published"),
        )
        for row in rows
        if row.digest != named.get(row.version)
    ]


def digests_of(rows: Sequence[VersionsLine]) -> dict[int, str]:
    """Returns the digest of each version: of 0 by the first round, of others by the round that published it."""
    first = {row.version: row.digest for row in rows[:1] if row.version == 0}
    return {**first, **{row.published_version: row.published_digest for row in rows}}


def own_digests(record: Record) -> dict[int, str]:
    """Returns the digests of a learner's own versions. A follower's ledger does not name its first."""
    named = digests_of(record.rows)
    if record.follows:
        named.pop(0, None)
    return named


def check_metrics(rounds: Sequence[int], rows: Sequence[Row], checkpointed: int) -> list[Violation]:
    """Metrics have each round of the ledger once. They are written after it, so that they may lack its last round
    as long as no checkpoint has sealed that."""
    counts, recorded = Counter(rounds), {row.round for row in rows}
    may_lack = {row.round for row in rows[-1:] if row.round >= checkpointed}
    return [
        Violation("metrics.jsonl", f"round {round_}", f"{counts[round_]} times", "once, as in the ledger")
        for round_ in sorted(recorded)
        if counts[round_] > 1 or (counts[round_] == 0 and round_ not in may_lack)
    ] + [
        Violation("metrics.jsonl", "a round that the ledger lacks", round_, "rounds of the ledger")
        for round_ in sorted(counts.keys() - recorded)
    ]


def check_meta(meta: Meta, named: Mapping[int, str], plan: TicketPlan) -> list[Violation]:
    """A checkpoint of round u holds what rounds from u on may ask for, under the digests that the ledger names."""
    good = {meta.firewall_state["good"]} if plan.checks and meta.firewall_state else set()
    kept = [version for version in sorted({*plan.kept_versions(meta.round), *good}) if version in named or version > 0]
    wanted = {str(version): named.get(version, "one that the ledger names") for version in kept}
    return [
        Violation(
            f"checkpoint of round {meta.round}",
            f"digest of version {version}",
            meta.digests.get(version),
            wanted.get(version, f"versions {', '.join(wanted)}"),
        )
        for version in sorted({*wanted, *meta.digests} - ({"0"} - wanted.keys()), key=lambda name: (len(name), name))
        if meta.digests.get(version) != wanted.get(version)
    ]


def _check_files(found: Checkpoint, named: Mapping[int, str]) -> list[Violation]:
    """A checkpoint's files hold the very weights that the ledger names."""
    violations = []
    for version in [version for version in named if str(version) in found.meta.digests]:
        try:
            digest = packed_digest(found.version_bytes(version))
        except UNREADABLE as error:
            if not found.folder.exists():
                break  # A run in progress has deleted it meanwhile.
            digest = f"{type(error).__name__}: {error}"
        if digest != named[version]:
            where = f"{found.folder.name}/versions/{version:06d}.safetensors"
            violations.append(Violation(where, "digest of the weights", digest, named[version]))
    return violations


def world_size_notes(rows: Sequence[Row]) -> list[str]:
    """Says where the number of learner ranks changed: nothing is wrong, but bits are promised for one number."""
    return [
        f"from round {row.round} on with {row.world_size} ranks instead of {before.world_size}: "
        "not bit-identical to an unbroken run"
        for before, row in pairwise(rows)
        if row.world_size != before.world_size
    ]


def place(row: Row) -> str:
    """Returns where a violation in a row of the ledger is."""
    return f"ledger, round {row.round}"


def refuse(headline: str, violations: Sequence[Violation]) -> None:
    """Raises VerifyError with a line a violation, if there is one."""
    if violations:
        lines = "".join(f"\n  {violation}" for violation in violations)
        raise VerifyError(f"{headline}; violations: {len(violations)}{lines}")


def _describe(fingerprint: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fingerprint.items())
