"""What a run tells Prometheus, through Ray: the driver alone speaks, of what it knows anyway.

progress, queues (Redis) ──┐
rows of metrics.jsonl ─────┴──> driver ──> the Ray agent of its node  <── Prometheus, as `ray_sfumato_...`
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram, Metric

from protocol.shares import busy_shares
from protocol.stream import QueueDepth

TELL_EVERY_S = 5.0
"""Half of what Ray's agents take to gather."""

FETCH_BOUNDS_S = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]

KINDS: dict[str, tuple[type[Metric], str, tuple[str, ...]]] = {
    "tickets_waiting": (Gauge, "Tickets that nobody has taken.", ()),
    "tickets_claimed": (Gauge, "Tickets that a rollout actor holds.", ()),
    "groups_waiting": (Gauge, "Groups that are delivered, of rounds that no learner has closed.", ()),
    "restarts": (Gauge, "Roles that were lost and started again.", ()),
    "busy_share": (Gauge, "Share of time spent working, 0 to 1, the mean over a role's processes.", ("role",)),
    "images": (Counter, "Images that rollout actors have delivered.", ()),
    "round": (Gauge, "Rounds that a learner has learnt from.", ("role",)),
    "staleness_versions": (Gauge, "How many versions behind the last round was sampled.", ("role",)),
    "learner_seconds": (Gauge, "Time that the last round's learning took.", ("role",)),
    "wait_seconds": (Gauge, "Time that the learner waited for the last round.", ("role",)),
    "reward": (Gauge, "Mean of a reward over the last round; `mean` is the weighted sum.", ("role", "reward")),
    "weights_bytes": (Gauge, "Size of the last version that was published.", ()),
    "weights_publish_seconds": (Gauge, "Time to give the last version to the weight store.", ()),
    "weights_fetch_seconds": (Histogram, "Time of a rollout actor to get a version; one entry a version.", ()),
}
"""Name -> kind, description and tags besides `run`. Ray calls it `ray_sfumato_<name>`, and appends `_total` to
counters."""

ROW = {
    "staleness": "staleness_versions",
    "time/learner_s": "learner_seconds",
    "time/wait_s": "wait_seconds",
    "weights/size_bytes": "weights_bytes",
    "weights/publish_s": "weights_publish_seconds",
}
"""What is told of a row of metrics.jsonl, besides its round and its rewards."""

NOT_REWARDS = ("reward/std_within_group", "reward/std_between_groups")


@dataclass(frozen=True)
class Reading:
    """A value to tell: `Reading("reward", 0.4, {"role": "learner", "reward": "digit_alignment"})`. A counter goes up by
    it, a histogram counts it."""

    name: str
    value: float
    tags: Mapping[str, str]


class Metrics:
    """Tells of one run."""

    def __init__(self, run_id: str, folders: Mapping[str, Path], clock: Callable[[], float] = time.monotonic) -> None:
        """`folders` has each learner's run directory, by role. Ray must be connected."""
        self._clock, self._told_at = clock, -TELL_EVERY_S
        self._rows = {role: LastRow(folder / "metrics.jsonl") for role, folder in folders.items()}
        self._rollouts = Rollouts()
        self._metrics = {name: made(name).set_default_tags({"run": run_id}) for name in KINDS}

    def is_due(self) -> bool:
        """True if it is time to tell something."""
        return self._clock() - self._told_at >= TELL_EVERY_S

    def tell(self, said: Mapping[str, Mapping[str, Any]], depth: QueueDepth, num_groups: int, restarts: int) -> None:
        """Passes on what roles say of themselves, how long queues are, and the last rows: also those told before, since
        Ray forgets a gauge that nobody sets. Never raises: a run does not end for want of a plot."""
        self._told_at = self._clock()
        with suppress(Exception):
            for reading in self._readings(said, depth, num_groups, restarts):
                self._record(reading)

    def _readings(
        self, said: Mapping[str, Mapping[str, Any]], depth: QueueDepth, num_groups: int, restarts: int
    ) -> Iterator[Reading]:
        yield Reading("tickets_waiting", depth.waiting, {})
        yield Reading("tickets_claimed", depth.claimed, {})
        yield Reading("groups_waiting", num_groups, {})
        yield Reading("restarts", restarts, {})
        for role, share in busy_shares(said).items():
            yield Reading("busy_share", share, {"role": role})
        yield from self._rollouts.readings(said)
        for role, last in self._rows.items():
            if row := last.read():
                yield from row_readings(role, row)

    def _record(self, reading: Reading) -> None:
        metric, tags = self._metrics[reading.name], dict(reading.tags)
        if isinstance(metric, Counter):
            metric.inc(reading.value, tags)
        elif isinstance(metric, Histogram):
            metric.observe(reading.value, tags)
        else:
            metric.set(reading.value, tags)


def made(name: str) -> Metric:
    """Returns one of Ray's metrics, of a name in KINDS."""
    kind, description, tags = KINDS[name]
    bounds = {"boundaries": FETCH_BOUNDS_S} if kind is Histogram else {}
    return kind(f"sfumato_{name}", description, tag_keys=("run", *tags), **bounds)


class Rollouts:
    """Turns what rollout actors say of themselves into what is new."""

    def __init__(self) -> None:
        self._num_images: dict[str, int] = {}
        self._versions: dict[str, int] = {}

    def readings(self, said: Mapping[str, Mapping[str, Any]]) -> Iterator[Reading]:
        """Yields the images that have come since the last call, and each actor's fetch of each version once."""
        for role, words in said.items():
            if not role.startswith("rollout/"):
                continue
            num_images, before = words.get("images", 0), self._num_images.get(role, 0)
            self._num_images[role] = num_images
            # One that was replaced counts from 0 again.
            if new := num_images - before if num_images >= before else num_images:
                yield Reading("images", new, {})
            if "fetch_s" in words and self._versions.get(role) != words["version"]:
                self._versions[role] = words["version"]
                yield Reading("weights_fetch_seconds", words["fetch_s"], {})


class LastRow:
    """The newest row of a file that grows, read when it has changed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = (0, 0)
        self._row: dict[str, Any] | None = None

    def read(self) -> dict[str, Any] | None:
        """Returns the last whole row, or None as long as there is none."""
        if not self._path.exists():
            return None
        stat = self._path.stat()
        if (stat.st_size, stat.st_mtime_ns) != self._seen:
            whole = [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            self._row = json.loads(whole[-1]) if whole else None
            self._seen = (stat.st_size, stat.st_mtime_ns)
        return self._row


def row_readings(role: str, row: Mapping[str, Any]) -> Iterator[Reading]:
    """Yields what a row of a learner's metrics.jsonl has to tell."""
    yield Reading("round", row["round"] + 1, {"role": role})
    for key, name in ROW.items():
        if key in row:
            yield Reading(name, row[key], {"role": role} if "role" in KINDS[name][2] else {})
    for key, value in row.items():
        if key.startswith("reward/") and key not in NOT_REWARDS:
            yield Reading("reward", value, {"role": role, "reward": key.removeprefix("reward/")})
