"""What is lost can be made again: an emptied or dead server, an older attempt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from cluster.redis_server import RedisServer
from protocol.codec import encode_group
from protocol.errors import RedisError
from protocol.groups import Group
from protocol.stream import Claim, GroupReader, QueueDepth, Streams
from protocol.tickets import Ticket

NEVER_S = 1000.0


def take(streams: Streams, consumer: str = "a", *, block_s: float = 0) -> Claim | None:
    return streams.take(consumer, block_s=block_s, claim_idle_s=NEVER_S)


def taken(streams: Streams, consumer: str = "a") -> Claim:
    claim = take(streams, consumer)
    assert claim is not None
    return claim


def read_ids(reader: GroupReader) -> list[str]:
    """Reads until nothing comes; every arrival must be a group."""
    ids = []
    while arrivals := reader.read(block_s=0):
        ids += [a.content.ticket_id for a in arrivals if isinstance(a.content, Group)]
    return ids


def test_emptying_the_server_is_survived(
    open_streams: Callable[..., Streams],
    own_redis_server: RedisServer,
    make_ticket: Callable[..., Ticket],
    make_group: Callable[..., Group],
) -> None:
    streams = open_streams(own_redis_server)
    reader = GroupReader(streams, [0, 1])
    streams.issue([make_ticket(0)])
    claim = taken(streams)
    streams.append(make_group(0))
    assert read_ids(reader) == ["000000-0000"]

    ways: list[Callable[[], object]] = [streams._redis.flushall, own_redis_server.restart]
    for lose in ways:
        lose()
        assert streams.renew("a", [claim]) == []
        streams.acknowledge(claim)
        assert streams.queue_depth() == QueueDepth(waiting=0, claimed=0)
        assert streams.digest_of(0) is None
        streams.issue([make_ticket(1)])
        assert take(streams) is None
        assert taken(streams).ticket == make_ticket(1)
        streams.append(make_group(1))
        assert read_ids(reader) == ["000000-0001"]


def test_a_worker_that_waits_while_the_server_is_emptied_goes_on(
    open_streams: Callable[..., Streams], own_redis_server: RedisServer, make_ticket: Callable[..., Ticket]
) -> None:
    streams = open_streams(own_redis_server)
    timer = threading.Timer(0.1, streams._redis.flushall)
    timer.start()
    assert take(streams, block_s=0.4) is None
    timer.join()
    streams.issue([make_ticket()])
    # Whether the waiting worker notices the loss itself depends on the version of Redis.
    assert (take(streams) or taken(streams)).ticket == make_ticket()


def test_a_server_whose_clock_is_behind_is_read_from_its_beginning(
    open_streams: Callable[..., Streams], own_redis_server: RedisServer, make_group: Callable[..., Group]
) -> None:
    streams = open_streams(own_redis_server)
    reader = GroupReader(streams, [0])
    an_hour_ahead = f"{int(time.time() * 1000) + 3_600_000}-0"
    streams._redis.xadd(streams.key("groups:0"), encode_group(make_group(0)), id=an_hour_ahead)
    assert read_ids(reader) == ["000000-0000"]
    own_redis_server.restart()
    streams.append(make_group(2))
    assert reader.read(block_s=0) == []
    assert read_ids(reader) == ["000000-0002"]
    assert streams.counters()["readers_restarted"] == 1


def test_trimming_spares_what_came_after_the_server_was_emptied(
    open_streams: Callable[..., Streams], own_redis_server: RedisServer, make_group: Callable[..., Group]
) -> None:
    streams = open_streams(own_redis_server)
    reader = GroupReader(streams, [0])
    an_hour_ahead = f"{int(time.time() * 1000) + 3_600_000}-0"
    streams._redis.xadd(streams.key("groups:0"), encode_group(make_group(0)), id=an_hour_ahead)
    assert read_ids(reader) == ["000000-0000"]
    streams._redis.flushall()
    streams.append(make_group(2))
    reader.trim()
    assert read_ids(reader) == ["000000-0002"]


def test_a_server_that_is_gone_is_a_redis_error_until_it_is_back(
    open_streams: Callable[..., Streams], own_redis_server: RedisServer, make_ticket: Callable[..., Ticket]
) -> None:
    streams = open_streams(own_redis_server)
    own_redis_server.stop()
    calls: list[Callable[[], object]] = [lambda: take(streams), lambda: streams.issue([make_ticket()])]
    for call in calls:
        with pytest.raises(RedisError, match=f"127.0.0.1:{own_redis_server.port}"):
            call()
    own_redis_server.start()
    streams.open()
    streams.issue([make_ticket()])
    assert taken(streams).ticket == make_ticket()


def test_attempts_and_runs_do_not_see_each_other_and_old_ones_can_be_deleted(
    redis_server: RedisServer,
    open_streams: Callable[..., Streams],
    make_ticket: Callable[..., Ticket],
    make_group: Callable[..., Group],
) -> None:
    runs = [open_streams(redis_server, run_id="twin", attempt=attempt) for attempt in (1, 2, 10)]
    other = open_streams(redis_server, run_id="twin.other", attempt=1)
    for streams in (*runs, other):
        streams.issue([make_ticket(streams.attempt % 8)])
        streams.append(make_group(0))
        streams.announce_version(0, f"digest {streams.attempt}")
    assert taken(runs[1]).ticket == make_ticket(2)
    runs[1].delete_older_attempts()
    assert [streams.counters() == {} for streams in (*runs, other)] == [True, False, False, False]
    runs[1].delete_attempt()
    assert [streams.digest_of(0) for streams in (*runs, other)] == [None, None, "digest 10", "digest 1"]
    runs[2].delete_older_attempts()
    runs[2].delete_attempt()
    assert list(runs[2]._redis.scan_iter(match="sfumato:twin:*")) == []
    assert read_ids(GroupReader(other, [0])) == ["000000-0000"]
    other.delete_attempt()


@pytest.mark.parametrize(
    ("run_id", "attempt", "num_shards"), [("", 1, 1), ("a*", 1, 1), ("a:b", 1, 1), ("a", -1, 1), ("a", 1, 0)]
)
def test_a_run_that_cannot_have_keys_of_its_own_is_refused(
    streams: Streams, run_id: str, attempt: int, num_shards: int
) -> None:
    with pytest.raises(ValueError, match="no keys"):
        Streams(streams._redis, run_id=run_id, attempt=attempt, num_shards=num_shards)


def test_opening_again_keeps_what_is_there(streams: Streams, make_ticket: Callable[..., Ticket]) -> None:
    streams.issue([make_ticket(0), make_ticket(1)])
    taken(streams)
    streams.open()
    assert streams.queue_depth() == QueueDepth(waiting=1, claimed=1)


def test_a_version_is_known_once_it_is_announced(streams: Streams) -> None:
    assert streams.digest_of(3) is None
    streams.announce_version(3, "9f86")
    assert streams.digest_of(3) == "9f86"


def test_progress_is_the_last_report_of_each_role_with_its_time(streams: Streams) -> None:
    before = time.time()
    streams.report_progress("learner", round=1, role="rank 0")
    streams.report_progress("rollout-0", images=8)
    streams.report_progress("learner", round=2, role="rank 0")
    progress = streams.progress()
    assert list(progress) == ["learner", "rollout-0"]
    assert progress["learner"] | {"time": 0} == {"round": 2, "role": "rank 0", "time": 0}
    assert before <= progress["learner"]["time"] <= time.time()


def test_what_happened_is_counted(
    streams: Streams, make_ticket: Callable[..., Ticket], make_group: Callable[..., Group]
) -> None:
    streams.issue([make_ticket(0), make_ticket(1)])
    streams.append(make_group(0))
    streams.count("groups_duplicate", by=3)
    assert streams.counters() == {"groups_appended": 1, "groups_duplicate": 3, "tickets_issued": 2}
