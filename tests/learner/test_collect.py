"""A rank gets each ticket of its round once, whatever arrives, however often and in what order."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from learner.collect import Collected, Collector, Counts
from protocol.errors import RedisError, TrainingError
from protocol.groups import Group
from protocol.stream import GroupReader, Streams
from protocol.tickets import Ticket

SAMPLER = '{"eta":1.0}'
Make = Callable[..., Any]


@pytest.fixture
def collector(streams: Streams) -> Collector:
    """A rank that reads both shards and expects nothing yet."""
    return Collector(
        streams,
        GroupReader(streams, [0, 1]),
        sampler=SAMPLER,
        reissue_after_s=0.0,
        give_up_after_s=30.0,
        while_waiting=lambda: None,
    )


@pytest.fixture
def tickets(make_ticket: Callable[..., Ticket]) -> list[Ticket]:
    """The four tickets of round 0 that the rank collects."""
    return [make_ticket(index=index) for index in range(4)]


def ids(collected: Collected) -> list[str]:
    return [group.ticket_id for group in collected.groups]


def retaken(streams: Streams) -> list[str]:
    """Takes every ticket that is out, and returns which they are."""
    taken = []
    while claim := streams.take("worker", block_s=0, claim_idle_s=60):
        taken.append(claim.ticket.ticket_id)
        streams.acknowledge(claim)
    return sorted(taken)


def answering(streams: Streams, groups: Sequence[Group]) -> Callable[[], None]:
    """A worker: answers every ticket that is issued with the group that is ready for it."""
    ready = {group.ticket_id: group for group in groups}

    def answer() -> None:
        for ticket_id in retaken(streams):
            streams.append(ready[ticket_id])

    return answer


@pytest.mark.parametrize("seed", range(5))
def test_a_round_comes_in_ticket_order_whatever_order_it_arrives_in(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make, seed: int
) -> None:
    collector.expect(0, tickets)
    for index in random.Random(seed).sample(range(4), 4):
        streams.append(make_group(index=index))
    collected = collector.collect(0)
    assert ids(collected) == [receipt.ticket_id for receipt in collected.receipts] == [t.ticket_id for t in tickets]
    assert collected.receipts[2].checksum == make_group(index=2).content_checksum()
    assert collector.counts == Counts()


def test_a_second_copy_is_dropped_and_counted(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make
) -> None:
    collector.expect(0, tickets)
    for index in (0, 1, 0, 1, 2, 1, 3):
        streams.append(make_group(index=index))
    assert len(collector.collect(0).groups) == 4
    assert collector.counts == Counts(duplicate=3)


def test_a_copy_of_what_was_learnt_from_in_the_round_before_is_a_duplicate_too(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_ticket: Make, make_group: Make
) -> None:
    collector.expect(0, tickets)
    collector.expect(1, [make_ticket(index=0, round_=1)])
    for group in [*(make_group(index=index) for index in range(4)), make_group(index=3)]:
        streams.append(group)
    collector.collect(0)
    streams.append(make_group(index=0, round_=1))
    assert ids(collector.collect(1)) == ["000001-0000"]
    assert collector.counts == Counts(duplicate=1)


def other_copy(group: Group, **changes: Any) -> Group:
    """A copy of other content, as a faulty machine would make it."""
    reward_G = group.array("reward_G") + np.float32(1e-3)
    return dataclasses.replace(group, arrays={**group.arrays, "reward_G": reward_G}, **changes)


DIFFER = r"000000-0001 differ.*rollout-0@host and rollout-7@faulty"


def test_differing_copies_of_one_group_name_both_makers(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make
) -> None:
    collector.expect(0, tickets)
    streams.append(make_group(index=1))
    streams.append(other_copy(make_group(index=1), worker="rollout-7@faulty"))
    with pytest.raises(TrainingError, match=DIFFER):
        collector.collect(0)


def test_a_differing_copy_is_noticed_even_after_its_round_was_learnt_from(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_ticket: Make, make_group: Make
) -> None:
    collector.expect(0, tickets[1:2])
    collector.expect(1, [make_ticket(index=1, round_=1)])
    streams.append(make_group(index=1))
    collector.collect(0)
    streams.append(other_copy(make_group(index=1), worker="rollout-7@faulty"))
    with pytest.raises(TrainingError, match=DIFFER):
        collector.collect(1)


def test_copies_of_other_hardware_may_differ_and_the_first_one_counts(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make
) -> None:
    collector.expect(0, [tickets[1], tickets[3]])
    first = make_group(index=1)
    for group in (first, other_copy(first, fingerprint='{"device":"cuda"}'), make_group(index=3)):
        streams.append(group)
    collected = collector.collect(0)
    assert collector.counts == Counts(duplicate=1)
    assert collected.groups[0].content_checksum() == first.content_checksum()


def test_a_group_of_another_version_is_no_copy_of_one_that_was_taken(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_ticket: Make, make_group: Make
) -> None:
    collector.expect(0, tickets[:2])
    collector.expect(1, [make_ticket(index=0, round_=1)])
    aged = dataclasses.replace(other_copy(make_group(index=0)), version=5)
    for group in (make_group(index=0), aged, make_group(index=1)):
        streams.append(group)
    assert len(collector.collect(0).groups) == 2
    for group in (aged, make_group(index=0, round_=1)):
        streams.append(group)
    assert len(collector.collect(1).groups) == 1
    assert collector.counts == Counts(stale=2)


def test_a_group_of_another_version_is_dropped_and_made_again(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make
) -> None:
    collector.expect(0, tickets[:1])
    streams.append(dataclasses.replace(make_group(index=0), version=5))
    streams.append(make_group(index=0))
    assert collector.collect(0).groups[0].version == 0
    assert collector.counts == Counts(stale=1, reissued=1)
    assert retaken(streams) == ["000000-0000"]


def test_a_wrong_digest_on_a_current_ticket_stops_the_run(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make
) -> None:
    collector.expect(0, tickets)
    streams.append(dataclasses.replace(make_group(index=2), weights_digest="0" * 64))
    with pytest.raises(TrainingError, match=r"000000-0002 was sampled with other weights than version 0.*weight sync"):
        collector.collect(0)


@pytest.mark.parametrize("changes", [{"prompt": "a green four"}, {"index": 4}], ids=str)
def test_a_group_that_answers_another_question_stops_the_run(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make, changes: dict[str, Any]
) -> None:
    collector.expect(0, tickets)
    streams.append(dataclasses.replace(make_group(index=2), **changes))
    with pytest.raises(TrainingError, match=r"000000-0002 does not answer its ticket"):
        collector.collect(0)


def test_a_group_of_another_chain_stops_the_run(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make
) -> None:
    collector.expect(0, tickets)
    streams.append(dataclasses.replace(make_group(index=2), sampler='{"eta":0.5}'))
    with pytest.raises(TrainingError, match=r"000000-0002 was sampled by another chain.*0\.5.*1\.0"):
        collector.collect(0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["reward_G", "latents_GSCHW", "log_prob_GT"])
def test_a_group_that_is_not_finite_is_buried_and_made_again(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make, field: str, value: float
) -> None:
    group = make_group(index=0)
    broken = group.array(field).copy()
    broken.flat[3] = value
    collector.expect(0, tickets[:1])
    streams.append(dataclasses.replace(group, arrays={**group.arrays, field: broken}))
    streams.append(group)
    assert np.isfinite(collector.collect(0).groups[0].array(field)).all()
    assert collector.counts == Counts(dead_letter=1, reissued=1)
    assert streams.counters()["dead_letters_group"] == 1
    assert retaken(streams) == ["000000-0000"]


def test_an_unreadable_entry_is_counted_and_its_ticket_issued_again(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make
) -> None:
    collector.expect(0, [tickets[1], tickets[3]])
    streams._redis.xadd(streams.key("groups:1"), {b"ticket_id": b"000000-0001", b"schema": b"99"})
    for index in (1, 3):
        streams.append(make_group(index=index))
    assert ids(collector.collect(0)) == ["000000-0001", "000000-0003"]
    assert collector.counts == Counts(dead_letter=1, reissued=1)
    assert retaken(streams) == ["000000-0001"]


def test_what_nobody_ordered_is_counted_and_left_alone(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make
) -> None:
    collector.expect(0, tickets[:1])
    for group in (make_group(index=5), make_group(index=0, round_=9), make_group(index=0)):
        streams.append(group)
    assert ids(collector.collect(0)) == ["000000-0000"]
    assert collector.counts.stale == 2


def test_tickets_that_were_lost_are_issued_again(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make
) -> None:
    collector.expect(0, tickets)
    streams.append(make_group(index=1))
    # Nothing is out: the workers that held the other three are gone, and so are their claims.
    collector._while_waiting = answering(streams, [make_group(index=index) for index in range(4)])
    assert len(collector.collect(0).groups) == 4
    assert collector.counts == Counts(reissued=3)


def test_no_ticket_is_issued_again_while_somebody_holds_one(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make
) -> None:
    collector.expect(0, tickets[:1])
    streams.issue(tickets[:1])
    claim = streams.take("slow worker", block_s=0, claim_idle_s=60)
    assert claim is not None
    waits = itertools.count()

    def finish_at_the_third_wait() -> None:
        if next(waits) == 2:
            streams.append(make_group(index=0))
            streams.acknowledge(claim)

    collector._while_waiting = finish_at_the_third_wait
    collector.collect(0)
    assert collector.counts == Counts()


def test_a_server_that_lost_everything_is_filled_again(
    own_redis_server: Any, open_streams: Make, tickets: list[Ticket], make_group: Make
) -> None:
    streams = open_streams(own_redis_server)
    streams.issue(tickets)
    collector = Collector(
        streams,
        GroupReader(streams, [0, 1]),
        sampler=SAMPLER,
        reissue_after_s=0.0,
        give_up_after_s=60.0,
        while_waiting=answering(streams, [make_group(index=index) for index in range(4)]),
    )
    collector.expect(0, tickets)
    streams.append(make_group(index=3))
    own_redis_server.restart()
    assert len(collector.collect(0).groups) == 4
    assert collector.counts.reissued == 4


def test_a_server_that_stays_away_ends_the_wait_with_its_error(
    own_redis_server: Any, open_streams: Make, tickets: list[Ticket]
) -> None:
    streams = open_streams(own_redis_server)
    reader = GroupReader(streams, [0, 1])
    collector = Collector(
        streams, reader, sampler=SAMPLER, reissue_after_s=0.0, give_up_after_s=0.0, while_waiting=lambda: None
    )
    collector.expect(0, tickets)
    own_redis_server.stop()
    with pytest.raises(RedisError, match="the connection failed"):
        collector.collect(0)


def test_a_trim_frees_what_was_read(
    streams: Streams, collector: Collector, tickets: list[Ticket], make_group: Make
) -> None:
    collector.expect(0, tickets)
    for index in range(4):
        streams.append(make_group(index=index))
    collector.collect(0)
    collector.trim()
    assert [streams._redis.xlen(streams.key(f"groups:{shard}")) for shard in range(2)] == [0, 0]
