"""A learner reads every group once, whatever else lies in its stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from redis import RedisCluster

from cluster.redis_server import RedisServer
from protocol.codec import encode_group, encode_ticket
from protocol.errors import RedisError
from protocol.groups import Group
from protocol.stream import DeadLetter, GroupReader, Streams
from protocol.stream import streams as streams_module
from protocol.tickets import Ticket


def read_ids(reader: GroupReader) -> list[str]:
    """Reads until nothing comes; every arrival must be a group."""
    ids = []
    while arrivals := reader.read(block_s=0):
        ids += [a.content.ticket_id for a in arrivals if isinstance(a.content, Group)]
    return ids


def set_maxmemory(streams: Streams, limit_bytes: int) -> None:
    """Limits every server."""
    to = {"target_nodes": RedisCluster.PRIMARIES} if isinstance(streams._redis, RedisCluster) else {}
    streams._redis.config_set("maxmemory", limit_bytes, **to)


def test_a_reader_sees_every_group_of_its_shards_once(streams: Streams, make_group: Callable[..., Group]) -> None:
    readers = [GroupReader(streams, [shard]) for shard in range(streams.num_shards)]
    seen: list[list[str]] = [[], []]
    for round_ in range(3):
        for index in range(8):
            streams.append(make_group(index, round_))
        for reader, ids in zip(readers, seen, strict=True):
            ids += read_ids(reader)
    for shard in range(2):
        assert seen[shard] == [f"{r:06d}-{i:04d}" for r in range(3) for i in range(8) if i % 2 == shard]


def test_a_group_arrives_as_it_was_sent(streams: Streams, make_group: Callable[..., Group]) -> None:
    streams.append(make_group(index=5))
    [arrival] = GroupReader(streams, [0, 1]).read(block_s=0)
    assert isinstance(arrival.content, Group)
    assert arrival.shard == 1
    assert arrival.content.content_checksum() == make_group(index=5).content_checksum()


def test_a_waiting_reader_gets_a_group_when_it_is_appended(streams: Streams, make_group: Callable[..., Group]) -> None:
    timer = threading.Timer(0.1, streams.append, [make_group()])
    timer.start()
    started = time.monotonic()
    arrivals = GroupReader(streams, [0, 1]).read(block_s=2.0)
    timer.join()
    assert len(arrivals) == 1
    assert time.monotonic() - started < 1.0


def test_bad_entries_become_dead_letters_and_reading_goes_on(
    streams: Streams, make_group: Callable[..., Group], make_ticket: Callable[..., Ticket]
) -> None:
    whole = encode_group(make_group(0))
    bad = [
        whole | {b"array/reward_G": b"\x00" * 16},
        {name: value for name, value in whole.items() if name != b"prompt"},
        {b"\xff\x00": b"\xfe"},
        encode_ticket(make_ticket(2)),
        encode_group(make_group(1)),
    ]
    for fields in bad:
        streams._redis.xadd(streams.key("groups:0"), fields)
    streams.append(make_group(2))
    reader = GroupReader(streams, [0])
    contents = [a.content for _ in range(6) for a in reader.read(block_s=0)]
    dead = [content for content in contents if isinstance(content, DeadLetter)]
    assert len(dead) == 5
    assert isinstance(contents[-1], Group)
    assert [letter.ticket_id for letter in dead] == [
        "000000-0000",
        "000000-0000",
        None,
        "000000-0002",
        "000000-0001",
    ]
    assert ["checksum" in dead[0].reason, "wrong kind" in dead[3].reason, "shard" in dead[4].reason] == [True] * 3
    assert streams.counters()["dead_letters_group"] == 5
    assert reader.read(block_s=0) == []


def test_a_dead_letter_is_small_however_large_the_entry_was(streams: Streams) -> None:
    many = {b"field %d" % n: b"x" * 100 for n in range(5000)}
    for fields in (many, {b"k" * 200_000: b"", b"v": b"y" * 10_000_000}):
        streams.dead_letter("group", "reason " * 10_000, fields)
    for entry_id, fields in streams._redis.xrange(streams.key("dead_letter")):
        size_bytes = sum(len(name) + len(value) for name, value in fields.items())
        assert size_bytes < streams_module.MAX_DEAD_LETTER_BYTES + 10_000, entry_id


def test_dead_letters_are_bounded_and_the_oldest_go_first(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams_module, "MAX_DEAD_LETTERS", 10)
    for number in range(25):
        streams.dead_letter("group", f"reason {number}", {})
    reasons = [fields[b"reason"] for _, fields in streams._redis.xrange(streams.key("dead_letter"))]
    assert reasons == [b"reason %d" % number for number in range(15, 25)]
    assert streams.counters()["dead_letters_group"] == 25


def test_trimming_frees_what_was_read_and_keeps_what_was_not(
    streams: Streams, make_group: Callable[..., Group]
) -> None:
    reader = GroupReader(streams, [0, 1])
    for index in range(8):
        streams.append(make_group(index))
    full_bytes = streams._redis.memory_usage(streams.key("groups:0"))
    assert len(read_ids(reader)) == 8
    streams.append(make_group(0, round_=1))
    reader.trim()
    assert [streams._redis.xlen(streams.key(f"groups:{shard}")) for shard in (0, 1)] == [1, 0]
    assert streams._redis.memory_usage(streams.key("groups:0")) < full_bytes / 2
    assert read_ids(reader) == ["000001-0000"]


def test_trimming_before_reading_does_nothing(streams: Streams, make_group: Callable[..., Group]) -> None:
    streams.append(make_group())
    reader = GroupReader(streams, [0, 1])
    reader.trim()
    assert read_ids(reader) == ["000000-0000"]


def test_a_reader_of_nothing_is_refused(streams: Streams) -> None:
    with pytest.raises(ValueError, match="at least one shard"):
        GroupReader(streams, [])


def test_entries_are_read_again_after_an_error_in_the_middle(
    open_streams: Callable[..., Streams], own_redis_server: RedisServer, make_group: Callable[..., Group]
) -> None:
    """A dead letter that cannot be written, the server being full, must not lose the groups around it."""
    streams = open_streams(own_redis_server)
    reader = GroupReader(streams, [0, 1])
    reader.read(block_s=0)
    streams.append(make_group(0))
    streams._redis.xadd(streams.key("groups:1"), {"hello": "world"})
    set_maxmemory(streams, 1)
    with pytest.raises(RedisError, match="the server is full"):
        reader.read(block_s=0)
    set_maxmemory(streams, 0)
    assert [type(arrival.content) for arrival in reader.read(block_s=0)] == [Group, DeadLetter]


def test_nothing_is_trimmed_that_another_reader_has_not_read(
    streams: Streams, make_group: Callable[..., Group]
) -> None:
    trims, follows = GroupReader(streams, [0], "first", ["follower"]), GroupReader(streams, [0], "follower")
    for index in (0, 2, 4):
        streams.append(make_group(index))
    assert len(read_ids(trims)) == 3
    trims.trim()
    assert len(follows.read(block_s=0)) == 1
    follows.report()
    trims.trim()
    assert read_ids(GroupReader(streams, [0])) == ["000000-0002", "000000-0004"]
    assert read_ids(follows) == ["000000-0002", "000000-0004"]
    follows.report()
    trims.trim()
    assert read_ids(GroupReader(streams, [0])) == []
