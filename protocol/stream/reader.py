"""A learner rank's side of the group streams: a plain cursor per shard.

    groups:{shard} -- read --> cursor moves past what is returned -- trim --> all behind the cursor is gone

A cursor needs no acknowledgement and no consumer group: a rank that dies takes its whole gang along, and the
next attempt reads new keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from protocol.codec import Fields, decode_group
from protocol.errors import WireError
from protocol.groups import Group
from protocol.stream.streams import Streams

_START = "0-0"


@dataclass(frozen=True)
class DeadLetter:
    """Why an entry of a group stream could not be read, and the ticket that it claims to answer, if any."""

    reason: str
    ticket_id: str | None


@dataclass(frozen=True)
class Arrival:
    """One entry of a shard: `Arrival(shard=0, entry_id="1700000000000-0", content=Group(...))`."""

    shard: int
    entry_id: str
    content: Group | DeadLetter


class GroupReader:
    """One learner rank's cursors over the shards that it alone reads. Every entry is returned once."""

    def __init__(self, streams: Streams, shards: Iterable[int], name: str = "", others: Sequence[str] = ()) -> None:
        """`others` are readers of the same shards, by the names that they report under: nothing is trimmed that one of
        them has not read."""
        self._name, self._others = name, others
        if not (shards := sorted(shards)):
            raise ValueError("a reader needs at least one shard")
        self._streams = streams
        self._cursors = dict.fromkeys(shards, _START)
        self._epochs: dict[int, bytes] = {}

    def read(self, *, block_s: float) -> list[Arrival]:
        """Returns the next groups and dead letters, oldest first in each shard; [] after at most `block_s`.

        Unreadable entries are kept among the dead letters and counted; the caller issues their tickets again.
        """
        if not self._epochs:
            self._restart_if_emptied()
        entries = self._streams.read_after(self._cursors, block_s=block_s)
        if not entries:
            self._restart_if_emptied()
        arrivals = [self._arrival(*entry) for entry in entries]
        # Cursors move last: after an error the same entries are read again.
        for arrival in arrivals:
            self._cursors[arrival.shard] = arrival.entry_id
        return arrivals

    def trim(self) -> None:
        """Deletes on the server what this reader, and every other one, has read."""
        self._restart_if_emptied()
        for shard, own in self._cursors.items():
            cursors = [own, *(self._streams.cursor_of(other, shard) or _START for other in self._others)]
            if _START not in cursors:
                self._streams.trim_through(shard, min(cursors, key=_position))

    def report(self) -> None:
        """Tells whoever trims how far this reader has read."""
        self._restart_if_emptied()
        read = {shard: cursor for shard, cursor in self._cursors.items() if cursor != _START}
        self._streams.report_cursors(self._name, read)

    def _restart_if_emptied(self) -> None:
        """An emptied server may number its entries below the cursor, if its clock is behind the old one's."""
        epochs = {shard: self._streams.epoch(shard) for shard in self._cursors}
        emptied = [shard for shard, epoch in self._epochs.items() if epoch != epochs[shard]]
        if emptied:
            self._cursors |= dict.fromkeys(emptied, _START)
            self._streams.count("readers_restarted")
        self._epochs = epochs

    def _arrival(self, shard: int, entry_id: str, fields: Fields) -> Arrival:
        try:
            group = decode_group(fields)
            if self._streams.shard_of(group.index) != shard:
                raise WireError(f"a group is in the wrong shard {shard}", value=group.ticket_id)
            return Arrival(shard, entry_id, group)
        except WireError as error:
            self._streams.dead_letter("group", str(error), fields)
            return Arrival(shard, entry_id, DeadLetter(str(error), _claimed_ticket_id(fields)))


def _position(entry_id: str) -> tuple[int, int]:
    milliseconds, sequence = entry_id.split("-")
    return int(milliseconds), int(sequence)


def _claimed_ticket_id(fields: Fields) -> str | None:
    claimed = fields.get(b"ticket_id", b"")
    return claimed.decode() if re.fullmatch(rb"[\w-]{1,64}", claimed) else None
