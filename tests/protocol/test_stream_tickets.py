"""A ticket has one worker at a time, and no dead worker keeps one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from protocol.codec import encode_ticket
from protocol.stream import Claim, QueueDepth, Streams
from protocol.tickets import Ticket

IDLE_S = 0.15
NEVER_S = 1000.0


def take(streams: Streams, consumer: str = "a", *, block_s: float = 0, idle_s: float = NEVER_S) -> Claim | None:
    return streams.take(consumer, block_s=block_s, claim_idle_s=idle_s)


def taken(streams: Streams, consumer: str = "a", *, idle_s: float = NEVER_S) -> Claim:
    claim = take(streams, consumer, idle_s=idle_s)
    assert claim is not None
    return claim


def test_tickets_are_taken_in_the_order_of_issue(streams: Streams, make_ticket: Callable[..., Ticket]) -> None:
    tickets = [make_ticket(index) for index in range(4)]
    streams.issue(tickets)
    assert [taken(streams).ticket for _ in tickets] == tickets
    assert take(streams) is None


def test_a_ticket_is_taken_by_one_worker_only(streams: Streams, make_ticket: Callable[..., Ticket]) -> None:
    streams.issue(make_ticket(index, round_) for round_ in range(10) for index in range(8))
    taken_ids: list[str] = []

    def work(worker: str) -> None:
        while claim := take(streams, worker):
            taken_ids.append(claim.ticket.ticket_id)

    workers = [threading.Thread(target=work, args=(f"worker-{n}",)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(taken_ids) == sorted(f"{r:06d}-{i:04d}" for r in range(10) for i in range(8))


def test_an_acknowledged_ticket_is_gone(streams: Streams, make_ticket: Callable[..., Ticket]) -> None:
    streams.issue([make_ticket(0), make_ticket(1)])
    assert streams.queue_depth() == QueueDepth(waiting=2, claimed=0)
    claim = taken(streams)
    assert streams.queue_depth() == QueueDepth(waiting=1, claimed=1)
    streams.acknowledge(claim)
    assert streams.queue_depth() == QueueDepth(waiting=1, claimed=0)
    assert taken(streams, idle_s=0).ticket == make_ticket(1)


def test_the_ticket_of_a_dead_worker_goes_to_another(streams: Streams, make_ticket: Callable[..., Ticket]) -> None:
    streams.issue([make_ticket()])
    lost = taken(streams, "dead")
    assert take(streams, "alive", idle_s=IDLE_S) is None
    time.sleep(IDLE_S * 1.5)
    assert taken(streams, "alive", idle_s=IDLE_S) == lost
    assert take(streams, "third", idle_s=IDLE_S) is None
    assert streams.counters()["tickets_reclaimed"] == 1


def test_the_oldest_abandoned_ticket_is_found_behind_many_that_are_not(
    streams: Streams, make_ticket: Callable[..., Ticket]
) -> None:
    streams.issue(make_ticket(index % 8, index // 8) for index in range(60))
    claims = [taken(streams, "busy") for _ in range(60)]
    time.sleep(IDLE_S * 1.5)
    assert streams.renew("busy", claims[:-1]) == claims[:-1]
    assert taken(streams, "alive", idle_s=IDLE_S) == claims[-1]


def test_a_renewed_ticket_stays_with_its_worker(streams: Streams, make_ticket: Callable[..., Ticket]) -> None:
    streams.issue([make_ticket()])
    claim = taken(streams, "slow")
    for _ in range(4):
        time.sleep(IDLE_S / 2)
        assert streams.renew("slow", [claim]) == [claim]
        assert take(streams, "eager", idle_s=IDLE_S) is None


def test_a_worker_does_not_renew_what_another_took_over(streams: Streams, make_ticket: Callable[..., Ticket]) -> None:
    streams.issue([make_ticket(0), make_ticket(1)])
    lost = taken(streams, "stalled")
    assert taken(streams, "other", idle_s=0).entry_id == lost.entry_id
    kept = taken(streams, "stalled")
    assert streams.renew("stalled", [lost, kept]) == [kept]
    assert streams.renew("other", [lost]) == [lost]


def test_an_answered_ticket_is_not_renewed(streams: Streams, make_ticket: Callable[..., Ticket]) -> None:
    streams.issue([make_ticket()])
    claim = taken(streams)
    streams.acknowledge(claim)
    assert streams.renew("a", [claim]) == []
    assert streams.renew("a", []) == []


def test_a_claim_whose_entry_was_deleted_is_passed_over(streams: Streams, make_ticket: Callable[..., Ticket]) -> None:
    streams.issue([make_ticket(0), make_ticket(1)])
    streams._redis.xdel(streams.key("tickets"), taken(streams, "dead").entry_id)
    assert taken(streams, "alive", idle_s=0).ticket == make_ticket(1)
    assert streams.queue_depth() == QueueDepth(waiting=0, claimed=1)


def test_a_corrupted_ticket_becomes_a_dead_letter_and_the_next_is_taken(
    streams: Streams, make_ticket: Callable[..., Ticket]
) -> None:
    streams._redis.xadd(streams.key("tickets"), encode_ticket(make_ticket(0)) | {b"round": b"5"})
    streams._redis.xadd(streams.key("tickets"), {"hello": "world"})
    streams.issue([make_ticket(1)])
    assert taken(streams).ticket == make_ticket(1)
    letters = [fields for _, fields in streams._redis.xrange(streams.key("dead_letter"))]
    assert [b"checksum" in letters[0][b"reason"], b"lacks fields" in letters[1][b"reason"]] == [True, True]
    assert (letters[0][b"kind"], letters[0][b"field/round"]) == (b"ticket", b"5")
    assert streams.counters()["dead_letters_ticket"] == 2
    assert streams.queue_depth() == QueueDepth(waiting=0, claimed=1)


def test_taking_waits_no_longer_than_it_is_told(streams: Streams) -> None:
    for block_s, longest_s in ((0.0, 0.1), (0.2, 0.5)):
        started = time.monotonic()
        assert take(streams, block_s=block_s) is None
        assert block_s <= time.monotonic() - started < longest_s


def test_a_waiting_worker_gets_a_ticket_when_it_is_issued(streams: Streams, make_ticket: Callable[..., Ticket]) -> None:
    timer = threading.Timer(0.1, streams.issue, [[make_ticket()]])
    timer.start()
    started = time.monotonic()
    claim = take(streams, block_s=2.0)
    timer.join()
    assert claim is not None
    assert time.monotonic() - started < 1.0
