"""Collecting a rank's part of a round: each ticket once, whatever arrives, however often and in what order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from learner.receipts import Receipt, receipt_of
from protocol.errors import RedisError, TrainingError
from protocol.groups import Group
from protocol.stream import Arrival, DeadLetter, GroupReader, Streams
from protocol.tickets import Ticket

READ_BLOCK_S = 1.0
COMPANY_POLL_S = 0.05
RECONNECT_EVERY_S = 1.0


@dataclass
class Counts:
    """What went wrong, and was made good, since the last report."""

    duplicate: int = 0
    reissued: int = 0
    dead_letter: int = 0
    stale: int = 0


@dataclass
class _Order:
    """The tickets of a round that this rank waits for, and the groups that have answered them."""

    tickets: dict[str, Ticket]
    groups: dict[str, Group] = field(default_factory=dict)
    receipts: dict[str, Receipt] = field(default_factory=dict)

    def missing(self) -> list[Ticket]:
        return [ticket for ticket_id, ticket in self.tickets.items() if ticket_id not in self.groups]


@dataclass(frozen=True)
class Collected:
    """A rank's part of a round, by ticket_id."""

    groups: list[Group]
    receipts: list[Receipt]

    def checks(self, num_groups: int) -> list[Group]:
        """Returns the answers to the firewall's tickets, which come behind the round's own `num_groups`."""
        return [group for group in self.groups if group.index >= num_groups]

    def without_checks(self, num_groups: int) -> Collected:
        """Returns what is learnt from."""
        kept = [pair for pair in zip(self.groups, self.receipts, strict=True) if pair[0].index < num_groups]
        return Collected([group for group, _ in kept], [receipt for _, receipt in kept])


class Collector:
    """Holds the tickets that are out and gives each round's groups back when they are complete."""

    def __init__(
        self,
        streams: Streams,
        reader: GroupReader,
        *,
        sampler: str,
        issues: bool = True,
        reissue_after_s: float,
        give_up_after_s: float,
        while_waiting: Callable[[], None],
    ) -> None:
        self._streams, self._reader, self._sampler = streams, reader, sampler
        self._reissue_after_s, self._give_up_after_s = reissue_after_s, give_up_after_s
        self._while_waiting, self._issues = while_waiting, issues
        self._orders: dict[int, _Order] = {}
        self._answered: dict[str, Receipt] = {}
        self.counts = Counts()

    def expect(self, round_: int, tickets: Iterable[Ticket]) -> None:
        """Says which tickets of a round are this rank's. Called when the round is issued."""
        self._orders[round_] = _Order({ticket.ticket_id: ticket for ticket in tickets})

    def collect(self, round_: int) -> Collected:
        """Waits until every expected ticket of the round is answered. A server that is away is waited for,
        since whatever it loses is made again."""
        order = self._orders[round_]
        heard_at = time.monotonic()
        while order.missing():
            try:
                if self._turn(order, idle_s=time.monotonic() - heard_at):
                    heard_at = time.monotonic()
            except RedisError:
                if time.monotonic() - heard_at > self._give_up_after_s:
                    raise
                time.sleep(RECONNECT_EVERY_S)
            listening = time.monotonic()
            self._while_waiting()
            # A rank that samples meanwhile does not listen.
            heard_at += time.monotonic() - listening
        return self._close(round_)

    def make_good(self, tickets: list[Ticket], done: Callable[[], bool]) -> None:
        """Issues a round's tickets again, whenever none is out for a while, until others are done collecting it too."""
        since = time.monotonic()
        while True:
            with suppress(RedisError):  # A server that is away comes back empty.
                if done():
                    return
                if not self._no_ticket_is_out():
                    since = time.monotonic()
                elif time.monotonic() - since > self._reissue_after_s:
                    self._reissue(tickets)
                    since = time.monotonic()
            time.sleep(COMPANY_POLL_S)
            self._while_waiting()

    def trim(self) -> None:
        """Frees the server's memory of all that was read, by every other learner too."""
        self._reader.trim()

    def report(self) -> None:
        """Tells the learner that trims how far this one has read."""
        self._reader.report()

    def _turn(self, order: _Order, idle_s: float) -> bool:
        """Reads once. Returns True if something came, or if what is lost was ordered again."""
        arrivals = self._reader.read(block_s=READ_BLOCK_S)
        for arrival in arrivals:
            self._sort_in(arrival)
        lost = self._issues and not arrivals and idle_s > self._reissue_after_s and self._no_ticket_is_out()
        if lost:
            self._reissue(order.missing())
        return bool(arrivals) or lost

    def _sort_in(self, arrival: Arrival) -> None:
        content = arrival.content
        if isinstance(content, DeadLetter):
            self._replace(content.ticket_id, "dead_letter")
            return
        order = self._orders.get(content.round)
        ticket = order.tickets.get(content.ticket_id) if order else None
        if order is None or ticket is None:
            self._sort_out(content)
        elif content.version != ticket.version:
            self._replace(content.ticket_id, "stale")
        elif content.ticket_id in order.groups:
            self._compare(order.receipts[content.ticket_id], content)
        elif name := content.non_finite_field():
            self._bury(content, f"{name} holds NaN or an infinity")
        else:
            self._check(content, ticket)
            order.groups[content.ticket_id] = content
            order.receipts[content.ticket_id] = receipt_of(content)

    def _sort_out(self, group: Group) -> None:
        """A copy of what was already learnt from, or something that nobody ordered."""
        first = self._answered.get(group.ticket_id)
        if first and first.version == group.version:
            self._compare(first, group)
        else:
            self.counts.stale += 1

    def _compare(self, first: Receipt, second: Group) -> None:
        self.counts.duplicate += 1
        if first.fingerprint != second.fingerprint:
            return
        if first.checksum != second.content_checksum():
            raise TrainingError(
                f"two copies of group {first.ticket_id} differ although their numeric fingerprints are equal",
                value=f"{first.worker} and {second.worker}",
                expected="equal bits: a group is a function of its ticket",
                do="look for a faulty machine, an impure reward or nondeterministic kernels on these hosts",
            )

    def _check(self, group: Group, ticket: Ticket) -> None:
        if ticket.weights_digest and group.weights_digest != ticket.weights_digest:
            raise TrainingError(
                f"group {group.ticket_id} was sampled with other weights than version {ticket.version}: "
                f"{group.worker} holds {group.weights_digest[:16]}, the ticket names {ticket.weights_digest[:16]}",
                expected="equal digests",
                do="this is a broken weight sync; check that all nodes run the same code and base model",
            )
        if (group.prompt, group.index) != (ticket.prompt, ticket.index):
            raise TrainingError(
                f"group {group.ticket_id} does not answer its ticket",
                value=f"index {group.index}, prompt {group.prompt!r} from {group.worker}",
                expected=f"index {ticket.index}, prompt {ticket.prompt!r}",
                do="check that all nodes run the same code",
            )
        if group.sampler != self._sampler:
            raise TrainingError(
                f"group {group.ticket_id} was sampled by another chain than the recipe's",
                value=group.sampler,
                expected=self._sampler,
                do="check that rollout workers and learner run the same recipe and base model",
            )

    def _bury(self, group: Group, reason: str) -> None:
        self._streams.dead_letter("group", reason, {b"ticket_id": group.ticket_id.encode()})
        self._replace(group.ticket_id, "dead_letter")

    def _replace(self, ticket_id: str | None, why: str) -> None:
        """Counts an entry that is of no use and, if it answers a ticket that is out, issues that again."""
        setattr(self.counts, why, getattr(self.counts, why) + 1)
        for order in self._orders.values():
            if self._issues and ticket_id in order.tickets and ticket_id not in order.groups:
                self._reissue([order.tickets[ticket_id]])

    def _reissue(self, tickets: list[Ticket]) -> None:
        self._streams.issue(tickets)
        self.counts.reissued += len(tickets)

    def _no_ticket_is_out(self) -> bool:
        """With no ticket waiting or claimed, what has not arrived never will."""
        depth = self._streams.queue_depth()
        return depth.waiting == 0 and depth.claimed == 0

    def _close(self, round_: int) -> Collected:
        order = self._orders.pop(round_)
        # Late copies of this round may still come while the next is collected; older ones are stale.
        self._answered = order.receipts
        ticket_ids = sorted(order.groups)
        return Collected([order.groups[i] for i in ticket_ids], [order.receipts[i] for i in ticket_ids])
