"""The streams of a run: tickets out, groups back.

Keys are `sfumato:RUN:ATTEMPT:<name>{tag}`; a resume starts a new attempt and deletes the old one's keys. A Redis
Cluster places keys by their tags: a shard's keys share one, all others of a run share another. No command, pipeline of
one transaction or answer needs more than one of these places, and each may lose what it holds without the others.

    tickets          issue -> [waiting] -- take --> [claimed] -- acknowledge --> gone
                                                     |     ^
                                        claim_idle_s |     | taken by another worker, or renewed by this one
                                                     +-----+
        Bound: tickets are permits, (lag + 1) rounds of P are out at a time.

    groups:{shard}   append -> [stored] -- GroupReader.read --> [read] -- GroupReader.trim --> gone
        Bound: one group a ticket, so (lag + 1) rounds, plus duplicates of tickets that were claimed twice.

    dead_letter      an entry that cannot be decoded -> [reason, kind, what it held] -> gone by age
        Bound: MAX_DEAD_LETTERS entries of MAX_DEAD_LETTER_BYTES.

    versions, counters, progress    hashes with one field a version, a counter, a role
    cursors          a hash with one field a follower's shard: how far it has read
    epoch:{shard}    a random mark; its loss tells a reader that the server of the shard was emptied

Everything here may be lost or happen twice: the server may be emptied at any moment, and a command whose
answer was lost is sent again, which can duplicate an entry or claim a ticket that nobody hears of. Learners
drop duplicates by ticket_id, such a claim goes idle and is taken over, and lost tickets are issued again.
Brief drops of the connection are retried inside redis-py; whatever outlasts that is a `RedisError`, after
which the same call may be made again.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis import exceptions as redis_errors
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from protocol.codec import Fields, decode_ticket, encode_group, encode_ticket
from protocol.errors import WireError
from protocol.groups import Group
from protocol.stream.connection import Client, address_of, explain_errors
from protocol.tickets import Ticket

WORKERS = "rollouts"
"""The consumer group in which rollout workers share the ticket stream."""

MAX_DEAD_LETTERS = 1000
MAX_DEAD_LETTER_BYTES = 64 * 1024
ENTRIES_PER_READ = 1
"""Per shard. A large model's group is tens of MB; reading 4 at once is a third slower, and all are held."""

SWEEP_EVERY_S = 0.02
"""How often a cluster is asked for groups of several shards, whose servers cannot be waited for with one command."""

MAX_PLACES = 1024
"""Places that a run's shards are dealt to; more than a Redis Cluster has servers."""

_RUN_ID = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclass(frozen=True)
class Claim:
    """A ticket that one worker answers: `Claim(entry_id="1700000000000-0", ticket=Ticket(...))`."""

    entry_id: str
    ticket: Ticket


@dataclass(frozen=True)
class QueueDepth:
    """Tickets that nobody has taken, and tickets that a worker holds."""

    waiting: int
    claimed: int


class Streams:
    """The keys of one attempt of a run. As safe to share between threads as redis-py's client is."""

    def __init__(self, client: Client, *, run_id: str, attempt: int, num_shards: int) -> None:
        if not _RUN_ID.fullmatch(run_id) or attempt < 0 or num_shards < 1:
            raise ValueError(f"no keys for run {run_id!r}, attempt {attempt}, {num_shards} shards")
        # redis-py types an answer as a union of all that any command may return, sync or async.
        self._redis: Any = client
        self._is_cluster = isinstance(client, redis.RedisCluster)
        self._run_id, self._run_prefix = run_id, f"sfumato:{run_id}:"
        self.attempt = attempt
        self.num_shards = num_shards
        self.address = address_of(client)
        self._longest_block_s = (client.get_connection_kwargs().get("socket_timeout") or 10.0) / 2

    def key(self, name: str) -> str:
        """Returns the full name of one of this attempt's keys, such as `groups:0`."""
        _, _, shard = name.partition(":")
        tag = shard_tag(int(shard), self.num_shards) if shard else self._run_id
        return f"{self._run_prefix}{self.attempt}:{name}{{{tag}}}"

    # --- an attempt -------------------------------------------------------------------------------------

    @explain_errors
    def open(self) -> None:
        """Creates what workers expect. May be repeated at any time; tickets that are there stay."""
        try:
            self._redis.xgroup_create(self.key("tickets"), WORKERS, id="0", mkstream=True)
        except redis_errors.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    @explain_errors
    def delete_attempt(self) -> None:
        """Deletes every key of this attempt."""
        self._delete(f"{self._run_prefix}{self.attempt}:*", lambda attempt: attempt == self.attempt)

    @explain_errors
    def delete_older_attempts(self) -> None:
        """Deletes every key of the attempts before this one."""
        self._delete(f"{self._run_prefix}*", lambda attempt: attempt < self.attempt)

    def _delete(self, pattern: str, is_doomed: Callable[[int], bool]) -> None:
        for key in self._redis.scan_iter(match=pattern, count=1000):
            attempt = key.decode(errors="replace")[len(self._run_prefix) :].partition(":")[0]
            if attempt.isdecimal() and is_doomed(int(attempt)):
                self._redis.unlink(key)

    # --- tickets ----------------------------------------------------------------------------------------

    @explain_errors
    def issue(self, tickets: Iterable[Ticket]) -> None:
        """Adds tickets for the workers to take."""
        pipeline = self._redis.pipeline(transaction=False)
        for ticket in tickets:
            pipeline.xadd(self.key("tickets"), encode_ticket(ticket))
            pipeline.hincrby(self.key("counters"), "tickets_issued", 1)
        pipeline.execute()

    @explain_errors
    def take(self, consumer: str, *, block_s: float, claim_idle_s: float) -> Claim | None:
        """Claims one ticket: first one that its worker has not renewed for `claim_idle_s`, then a new one.

        Blocks for at most `block_s` and at most half the client's time-out; 0 does not block. Returns None
        when there is none, and also after the server was emptied, once the consumer group is there again.
        """
        try:
            for entry_id, fields in self._deliveries(consumer, block_s, claim_idle_s):
                if claim := self._readable(entry_id, fields):
                    return claim
        except redis_errors.ResponseError as error:
            # A worker that is blocked while the key vanishes is told UNBLOCKED by some versions.
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
            self.open()
        return None

    def _deliveries(self, consumer: str, block_s: float, claim_idle_s: float) -> Iterator[tuple[str, Fields]]:
        while abandoned := self._abandoned(consumer, claim_idle_s):
            self.count("tickets_reclaimed")
            yield abandoned
        while streams := self._redis.xreadgroup(
            WORKERS, consumer, {self.key("tickets"): ">"}, count=1, block=self._block_ms(block_s)
        ):
            (_, [(entry_id, fields)]) = streams[0]
            yield entry_id.decode(), fields

    def _abandoned(self, consumer: str, claim_idle_s: float) -> tuple[str, Fields] | None:
        """Takes over one idle claim. XAUTOCLAIM hides which of its entries were deleted on Redis 6.2."""
        key, idle_ms = self.key("tickets"), int(claim_idle_s * 1000)
        for pending in self._redis.xpending_range(key, WORKERS, "-", "+", 10, idle=idle_ms):
            entry_id = pending["message_id"]
            # The idle time makes the loser of a race between two workers get nothing.
            for claimed_id, fields in self._redis.xclaim(key, WORKERS, consumer, idle_ms, [entry_id]):
                if claimed_id is not None:
                    return claimed_id.decode(), fields
                self._redis.xack(key, WORKERS, entry_id)
        return None

    def _readable(self, entry_id: str, fields: Fields) -> Claim | None:
        try:
            return Claim(entry_id, decode_ticket(fields))
        except WireError as error:
            self.dead_letter("ticket", str(error), fields)
            self._remove(entry_id)
            return None

    @explain_errors
    def renew(self, consumer: str, claims: Sequence[Claim]) -> list[Claim]:
        """Resets the idle time of a worker's claims. Returns those that it still holds.

        A claim that another worker took over is left to that one. Between looking and renewing another may
        still take one over and lose it again; then both make the group, and the learner drops the second.
        """
        key = self.key("tickets")
        pipeline = self._redis.pipeline(transaction=False)
        for claim in claims:
            pipeline.xpending_range(key, WORKERS, claim.entry_id, claim.entry_id, 1, consumername=consumer)
        try:
            held = [claim for claim, pending in zip(claims, pipeline.execute(), strict=True) if pending]
        except redis_errors.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            return []
        if held:
            self._redis.xclaim(key, WORKERS, consumer, 0, [claim.entry_id for claim in held], justid=True)
        return held

    @explain_errors
    def acknowledge(self, claim: Claim) -> None:
        """Removes an answered ticket, whoever holds it now."""
        self._remove(claim.entry_id)

    def _remove(self, entry_id: str) -> None:
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.xack(self.key("tickets"), WORKERS, entry_id)
        pipeline.xdel(self.key("tickets"), entry_id)
        pipeline.execute()

    @explain_errors
    def queue_depth(self) -> QueueDepth:
        """Returns how many tickets wait and how many are claimed."""
        length = self._redis.xlen(self.key("tickets"))
        try:
            claimed = self._redis.xpending(self.key("tickets"), WORKERS)["pending"]
        except redis_errors.ResponseError:
            claimed = 0
        return QueueDepth(waiting=max(0, length - claimed), claimed=claimed)

    # --- groups -----------------------------------------------------------------------------------------

    def shard_of(self, index: int) -> int:
        """Returns the shard for the group at an index of its round."""
        return index % self.num_shards

    @explain_errors
    def append(self, group: Group) -> None:
        """Adds a complete group to its shard."""
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.xadd(self.key(f"groups:{self.shard_of(group.index)}"), encode_group(group))
        pipeline.hincrby(self.key("counters"), "groups_appended", 1)
        pipeline.execute()

    @explain_errors
    def read_after(self, cursors: Mapping[int, str], *, block_s: float) -> list[tuple[int, str, Fields]]:
        """Returns (shard, entry id, fields) of the next entries after each shard's cursor."""
        shards = {self.key(f"groups:{shard}").encode(): shard for shard in cursors}
        after = {self.key(f"groups:{shard}"): cursor for shard, cursor in cursors.items()}
        if self._is_cluster and len(after) > 1:
            found = self._sweep(after, block_s)
        else:
            found = self._redis.xread(after, count=ENTRIES_PER_READ, block=self._block_ms(block_s))
        return [(shards[key], entry_id.decode(), fields) for key, entries in found for entry_id, fields in entries]

    def _sweep(self, after: Mapping[str, str], block_s: float) -> list[Any]:
        """What XREAD does, which takes no keys of several places."""
        deadline = time.monotonic() + min(block_s, self._longest_block_s)
        while True:
            pipeline = self._redis.pipeline(transaction=False)
            for key, cursor in after.items():
                pipeline.xread({key: cursor}, count=ENTRIES_PER_READ)
            found = [stream for answer in pipeline.execute() for stream in answer]
            if found or time.monotonic() >= deadline:
                return found
            time.sleep(SWEEP_EVERY_S)

    @explain_errors
    def trim_through(self, shard: int, entry_id: str) -> None:
        """Deletes a shard's entries up to and including one."""
        milliseconds, sequence = entry_id.split("-")
        minid = f"{milliseconds}-{int(sequence) + 1}"
        self._redis.xtrim(self.key(f"groups:{shard}"), minid=minid, approximate=False)

    @explain_errors
    def report_cursors(self, reader: str, cursors: Mapping[int, str]) -> None:
        """Notes how far a reader has read each of its shards."""
        if cursors:
            self._redis.hset(self.key("cursors"), mapping={f"{reader}/{shard}": at for shard, at in cursors.items()})

    @explain_errors
    def cursor_of(self, reader: str, shard: int) -> str | None:
        """Returns how far a reader has said to have read a shard, or None."""
        cursor = self._redis.hget(self.key("cursors"), f"{reader}/{shard}")
        return None if cursor is None else cursor.decode()

    @explain_errors
    def epoch(self, shard: int) -> bytes:
        """Returns a mark that stays the same until the server of a shard is emptied."""
        key = self.key(f"epoch:{shard}")
        # Looked up first: a full server refuses even a write that would change nothing.
        if self._redis.get(key) is None:
            self._redis.set(key, secrets.token_hex(8), nx=True)
        # Emptied in between, there is no mark: that too is one that differs from the last.
        mark: bytes = self._redis.get(key) or b""
        return mark

    def _block_ms(self, block_s: float) -> int | None:
        """Redis takes BLOCK 0 for "for ever"; and an answer must come before the socket's time-out."""
        return max(1, int(min(block_s, self._longest_block_s) * 1000)) if block_s > 0 else None

    # --- dead letters and counters ----------------------------------------------------------------------

    @explain_errors
    def dead_letter(self, kind: str, reason: str, fields: Fields) -> None:
        """Keeps what an unreadable entry held, clipped, with the reason, and counts it."""
        letter = {b"kind": kind.encode(), b"reason": reason[:1000].encode(errors="replace")}
        letter[b"time"] = str(time.time()).encode()
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.xadd(self.key("dead_letter"), letter | _clipped(fields), maxlen=MAX_DEAD_LETTERS, approximate=False)
        pipeline.hincrby(self.key("counters"), f"dead_letters_{kind}", 1)
        pipeline.execute()

    @explain_errors
    def count(self, name: str, by: int = 1) -> None:
        """Adds to a named counter of the attempt."""
        self._redis.hincrby(self.key("counters"), name, by)

    @explain_errors
    def counters(self) -> dict[str, int]:
        """Returns all counters of the attempt."""
        counted = self._redis.hgetall(self.key("counters"))
        return {name.decode(): int(value) for name, value in sorted(counted.items())}

    # --- versions and progress --------------------------------------------------------------------------

    @explain_errors
    def announce_version(self, version: int, digest: str) -> None:
        """Tells workers the digest of a published version; the bytes are in the weight store."""
        self._redis.hset(self.key("versions"), str(version), digest)

    @explain_errors
    def digest_of(self, version: int) -> str | None:
        """Returns the digest of a version, or None if it is not announced (or the server was emptied)."""
        digest = self._redis.hget(self.key("versions"), str(version))
        return None if digest is None else digest.decode()

    @explain_errors
    def report_progress(self, role: str, /, **values: object) -> None:
        """Replaces what a role says of itself: flat JSON values, to which the wall-clock `time` is added."""
        self._redis.hset(self.key("progress"), role, json.dumps({**values, "time": time.time()}))

    @explain_errors
    def ask_to_stop(self) -> None:
        """Asks the learners to end at the next place where nothing is lost."""
        self._redis.set(self.key("stop"), 1)

    @explain_errors
    def is_stop_asked(self) -> bool:
        """True once `ask_to_stop` was called in this attempt."""
        return bool(self._redis.exists(self.key("stop")))

    @explain_errors
    def progress(self) -> dict[str, dict[str, Any]]:
        """Returns the last report of every role."""
        reports = self._redis.hgetall(self.key("progress"))
        return {role.decode(): json.loads(values) for role, values in sorted(reports.items())}


@functools.cache
def shard_tag(shard: int, num_shards: int) -> str:
    """Returns a tag whose hash slot lies in the shard's own part of all slots, one of as many as there are shards.

    A cluster's servers usually hold equal ranges of slots, and so equally many shards. Tags of chance would not do:
    of 3 shards on 3 servers 2 would share one more often than not.
    """
    num_places = min(num_shards, MAX_PLACES)
    numbers = map(str, itertools.count())
    return next(
        n for n in numbers if key_slot(n.encode()) * num_places // REDIS_CLUSTER_HASH_SLOTS == shard % num_places
    )


def _clipped(fields: Fields) -> dict[bytes, bytes]:
    """Keeps fields, small ones first, until the entry's budget is used up."""
    kept, left = {}, MAX_DEAD_LETTER_BYTES
    for name, value in sorted(fields.items(), key=lambda item: len(item[1])):
        if left <= len(name):
            break
        kept[b"field/" + name] = value[: left - len(name)]
        left -= len(name) + len(value)
    return kept
