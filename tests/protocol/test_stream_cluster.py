"""On a Redis Cluster a run's shards lie evenly, and each server may be lost, or a place move, without the others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

import pytest
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from cluster.redis_server import RedisServer, free_port
from protocol.codec import encode_group
from protocol.errors import RedisError
from protocol.groups import Group
from protocol.stream import GroupReader, Streams, connect, server_facts
from protocol.stream.streams import shard_tag
from tests.redis_cluster import NUM_NODES, ClusterMember, RedisCluster, keys_of


@pytest.fixture
def streams(redis_cluster: RedisCluster, open_streams: Callable[..., Streams]) -> Streams:
    """A run with two shards for each server, on a cluster that nobody else uses."""
    redis_cluster.empty()
    return open_streams(redis_cluster, num_shards=2 * NUM_NODES)


def read_ids(reader: GroupReader) -> list[str]:
    ids = []
    while arrivals := reader.read(block_s=0):
        ids += [a.content.ticket_id for a in arrivals if isinstance(a.content, Group)]
    return sorted(ids)


def holder_of(cluster: RedisCluster, key: str) -> ClusterMember:
    (holder,) = (member for member in cluster.members if key in keys_of(member))
    return holder


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8, 96, 1100])
def test_every_shards_slot_lies_in_its_own_part_of_all_slots(num_shards: int) -> None:
    num_parts = min(num_shards, 1024)
    for shard in range(num_shards):
        slot = key_slot(shard_tag(shard, num_shards).encode())
        assert slot * num_parts // REDIS_CLUSTER_HASH_SLOTS == shard % num_parts


def test_every_server_gets_equally_many_shards_and_one_all_the_rest(
    streams: Streams, redis_cluster: RedisCluster, make_group: Callable[..., Group]
) -> None:
    reader = GroupReader(streams, range(streams.num_shards))
    for index in range(streams.num_shards):
        streams.append(make_group(index))
    assert len(read_ids(reader)) == streams.num_shards
    held = [[key.split(":")[3].partition("{")[0] for key in keys_of(member)] for member in redis_cluster.members]
    assert [Counter(names)["groups"] for names in held] == [2, 2, 2]
    assert [Counter(names)["epoch"] for names in held] == [2, 2, 2]
    assert sorted(len({"tickets", "counters"} & set(names)) for names in held) == [0, 0, 2]
    streams.delete_attempt()
    assert [keys_of(member) for member in redis_cluster.members] == [[], [], []]


def test_a_server_that_is_emptied_loses_its_own_shards_only(
    streams: Streams, redis_cluster: RedisCluster, make_group: Callable[..., Group]
) -> None:
    reader = GroupReader(streams, range(streams.num_shards))
    an_hour_ahead = f"{int(time.time() * 1000) + 3_600_000}-0"
    for index in range(streams.num_shards):
        streams._redis.xadd(streams.key(f"groups:{index}"), encode_group(make_group(index)), id=an_hour_ahead)
    assert len(read_ids(reader)) == streams.num_shards
    emptied = holder_of(redis_cluster, streams.key("groups:0"))
    emptied.restart()
    redis_cluster.start()
    for index in range(streams.num_shards):
        streams.append(make_group(index, round_=1))
    # The first reading finds out that the numbers of two shards begin anew.
    assert sorted(read_ids(reader) + read_ids(reader)) == [f"000001-{index:04d}" for index in range(streams.num_shards)]


def test_a_shard_that_moves_to_another_server_is_read_on_without_loss(
    streams: Streams, redis_cluster: RedisCluster, make_group: Callable[..., Group]
) -> None:
    reader = GroupReader(streams, [0, 1])
    streams.append(make_group(0))
    assert read_ids(reader) == ["000000-0000"]
    streams.append(make_group(0, round_=1))
    slot = key_slot(streams.key("groups:0").encode())
    old = holder_of(redis_cluster, streams.key("groups:0"))
    new = next(member for member in redis_cluster.members if member is not old)
    for source, target in ((old, new), (new, old)):
        move_slot(redis_cluster, slot, source, target)
        assert streams.key("groups:0") in keys_of(target)
        assert read_ids(reader) == [f"{1 if target is new else 2:06d}-0000"]
        streams.append(make_group(0, round_=2))
    reader.trim()
    assert streams._redis.xlen(streams.key("groups:0")) == 1


def move_slot(cluster: RedisCluster, slot: int, source: ClusterMember, target: ClusterMember) -> None:
    """What `redis-cli --cluster reshard` does."""
    source_id, target_id = source.ask("CLUSTER MYID").decode(), target.ask("CLUSTER MYID").decode()
    target.ask("CLUSTER SETSLOT", slot, "IMPORTING", source_id)
    source.ask("CLUSTER SETSLOT", slot, "MIGRATING", target_id)
    keys = [key for key in keys_of(source) if key_slot(key.encode()) == slot]
    password = source.url.removeprefix("redis://:").partition("@")[0]
    source.ask("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "AUTH", password, "KEYS", *keys)
    for member in (target, source, *cluster.members):
        member.ask("CLUSTER SETSLOT", slot, "NODE", target_id)


def failure(url: str) -> str:
    with pytest.raises(RedisError) as caught:
        connect(url, timeout_s=2.0)
    return f"{caught.value} {caught.value.__cause__}"


def test_a_cluster_is_joined_by_any_of_its_servers_that_is_up(redis_cluster: RedisCluster) -> None:
    password = redis_cluster.url.partition("://:")[2].partition("@")[0]
    hosts = f"127.0.0.1:{free_port('127.0.0.1')},127.0.0.1:{redis_cluster.members[1].port}"
    with connect(f"redis+cluster://:{password}@{hosts}/0", timeout_s=5.0) as client:
        assert len(server_facts(client)) == NUM_NODES


def test_a_cluster_that_cannot_be_joined_is_explained(redis_cluster: RedisCluster) -> None:
    good = redis_cluster.url
    password = good.partition("://:")[2].partition("@")[0]
    closed = f"redis+cluster://:{password}@127.0.0.1:{free_port('127.0.0.1')}"
    reasons = {good.replace(password, "wrong"): "refuses us", closed: "the connection failed"}
    for url, reason in reasons.items():
        message = failure(url)
        assert reason in message
        assert password not in message
        assert "wrong" not in message.replace("WRONGPASS", "")


def test_a_url_for_the_other_kind_of_server_is_explained(
    redis_cluster: RedisCluster, redis_server: RedisServer
) -> None:
    assert "write redis+cluster://" in failure(redis_cluster.members[0].url)
    assert "is no member" in failure(redis_server.url.replace("redis://", "redis+cluster://"))


def test_a_member_that_evicts_our_keys_is_refused(redis_cluster: RedisCluster) -> None:
    last = redis_cluster.members[-1]
    last.ask("CONFIG SET", "maxmemory-policy", "allkeys-lru")
    assert "allkeys-lru" in failure(redis_cluster.url)
    last.ask("CONFIG SET", "maxmemory-policy", "noeviction")
