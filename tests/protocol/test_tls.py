"""TLS to a Redis server and to a Redis Cluster: who is believed, and what is said when somebody is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.redis_server import RedisServer
from protocol.errors import RedisError
from protocol.groups import Group
from protocol.stream import GroupReader, Streams, connect
from tests.redis_cluster import NUM_NODES, RedisCluster, keys_of
from tests.tls_proxy import Authority, TlsProxy


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def proxy(redis_server: RedisServer, authority: Authority) -> Iterator[TlsProxy]:
    """The shared server behind TLS."""
    with TlsProxy(redis_server.port, authority.issue("127.0.0.1")) as listening:
        yield listening


@pytest.fixture(scope="module")
def cluster(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three servers that speak TLS themselves, with each other too."""
    cluster = RedisCluster(tmp_path_factory.mktemp("cluster"), authority)
    try:
        cluster.start()
    except RedisError as error:
        cluster.stop()
        if "Bad directive" not in str(error):
            raise
        pytest.skip("this build of redis-server has no TLS")
    yield cluster
    cluster.stop()


def password_of(server: RedisServer) -> str:
    return server.url.removeprefix("redis://:").partition("@")[0]


def tls_url(server: RedisServer, proxy: TlsProxy, **options: Path) -> str:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return f"rediss://:{password_of(server)}@127.0.0.1:{proxy.port}/0?{query}"


def failure(url: str) -> str:
    with pytest.raises(RedisError) as caught:
        connect(url, timeout_s=2.0)
    return f"{caught.value} {caught.value.__cause__}"


def test_a_server_whose_authority_is_named_is_used_as_any_other(
    redis_server: RedisServer, proxy: TlsProxy, authority: Authority, make_group: Callable[..., Group]
) -> None:
    url = tls_url(redis_server, proxy, ssl_ca_certs=authority.certificate)
    with connect(url, timeout_s=5.0) as client:
        streams = Streams(client, run_id="tls", attempt=1, num_shards=1)
        streams.open()
        streams.append(make_group(3))
        [arrival] = GroupReader(streams, [0]).read(block_s=1.0)
        streams.delete_attempt()
    assert isinstance(arrival.content, Group)
    assert arrival.content.content_checksum() == make_group(3).content_checksum()


def test_a_server_of_an_unknown_authority_is_not_believed(
    redis_server: RedisServer, proxy: TlsProxy, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other").certificate
    for url in (tls_url(redis_server, proxy), tls_url(redis_server, proxy, ssl_ca_certs=other)):
        message = failure(url)
        assert "TLS failed" in message
        assert "?ssl_ca_certs=" in message
        assert password_of(redis_server) not in message


def test_a_certificate_of_another_host_is_not_believed(redis_server: RedisServer, authority: Authority) -> None:
    with TlsProxy(redis_server.port, authority.issue("elsewhere.example")) as elsewhere:
        message = failure(tls_url(redis_server, elsewhere, ssl_ca_certs=authority.certificate))
    assert "TLS failed" in message
    assert "127.0.0.1" in message


def test_a_file_that_is_not_there_is_named(redis_server: RedisServer, proxy: TlsProxy, tmp_path: Path) -> None:
    message = failure(tls_url(redis_server, proxy, ssl_ca_certs=tmp_path / "nowhere.pem"))
    assert "ssl_ca_certs" in message
    assert "nowhere.pem" in message
    assert "every node" in message


def test_a_file_that_holds_no_certificate_is_explained(
    redis_server: RedisServer, proxy: TlsProxy, tmp_path: Path
) -> None:
    (tmp_path / "empty.pem").write_text("not a certificate")
    assert "TLS failed" in failure(tls_url(redis_server, proxy, ssl_ca_certs=tmp_path / "empty.pem"))


def test_a_wrong_password_is_refused_behind_tls_too(
    redis_server: RedisServer, proxy: TlsProxy, authority: Authority
) -> None:
    url = tls_url(redis_server, proxy, ssl_ca_certs=authority.certificate)
    message = failure(url.replace(password_of(redis_server), "not-it"))
    assert "refuses us" in message
    assert "not-it" not in message


def test_no_tls_to_a_server_that_wants_it_is_explained(redis_server: RedisServer, proxy: TlsProxy) -> None:
    message = failure(tls_url(redis_server, proxy).replace("rediss://", "redis://").rstrip("?"))
    assert "TLS needs rediss://" in message


def test_a_server_that_wants_certificates_of_its_clients_is_shown_one(
    redis_server: RedisServer, authority: Authority, tmp_path: Path
) -> None:
    people = Authority(tmp_path / "people")
    client = people.issue("a-client")
    with TlsProxy(redis_server.port, authority.issue("127.0.0.1"), clients=people) as strict:
        without = tls_url(redis_server, strict, ssl_ca_certs=authority.certificate)
        assert "TLS" in failure(without)
        files = {"ssl_certfile": client.certificate, "ssl_keyfile": client.key}
        with connect(f"{without}&{'&'.join(f'{k}={v}' for k, v in files.items())}", timeout_s=5.0) as connected:
            assert connected.ping()


def test_a_cluster_is_used_as_any_other_by_whichever_node_is_up(
    cluster: RedisCluster, authority: Authority, make_group: Callable[..., Group]
) -> None:
    user, _, hosts = cluster.url.rpartition("@")
    for url in (cluster.url, f"{user}@127.0.0.1:1,{hosts.split(',')[-1]}"):
        with connect(f"{url}?ssl_ca_certs={authority.certificate}", timeout_s=5.0) as client:
            assert sorted(node.port for node in client.get_nodes()) == sorted(m.public_port for m in cluster.members)
            streams = Streams(client, run_id="tls", attempt=1, num_shards=2 * NUM_NODES)
            streams.open()
            for index in range(streams.num_shards):
                streams.append(make_group(index))
            assert all(keys_of(member) for member in cluster.members)
            reader, checksums = GroupReader(streams, range(streams.num_shards)), set()
            while arrivals := reader.read(block_s=0):
                checksums |= {a.content.content_checksum() for a in arrivals if isinstance(a.content, Group)}
            streams.delete_attempt()
        assert checksums == {make_group(index).content_checksum() for index in range(2 * NUM_NODES)}


def test_a_server_of_a_cluster_that_comes_back_is_reached_by_tls_again(
    cluster: RedisCluster, authority: Authority
) -> None:
    with connect(f"{cluster.url}?ssl_ca_certs={authority.certificate}", timeout_s=5.0) as client:
        cluster.members[1].stop()
        cluster.start()
        assert all(client.set(name, 1) for name in "abcdef")
        assert all(keys_of(member) for member in cluster.members)
    cluster.empty()


def test_a_cluster_of_an_unknown_authority_is_not_believed(cluster: RedisCluster, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other").certificate
    for url in (cluster.url, f"{cluster.url}?ssl_ca_certs={other}"):
        message = failure(url)
        assert "TLS failed (Redis at rediss+cluster://127.0.0.1:" in message
        assert "?ssl_ca_certs=" in message
        assert cluster.url.partition("@")[0].rpartition(":")[2] not in message


@pytest.mark.parametrize("told", ["redis+cluster", "rediss", "rediss+cluster"])
def test_a_scheme_that_is_not_the_clusters_is_explained(cluster: RedisCluster, authority: Authority, told: str) -> None:
    password, member = cluster.url.partition("@")[0].rpartition(":")[2], cluster.members[0]
    cases = {
        "redis+cluster": (member.public_port, "", "TLS needs rediss://"),
        "rediss": (member.public_port, f"/0?ssl_ca_certs={authority.certificate}", "write redis+cluster:// or rediss+"),
        "rediss+cluster": (member.port, f"?ssl_ca_certs={authority.certificate}", "whether both sides use TLS"),
    }
    port, rest, expected = cases[told]
    assert expected in failure(f"{told}://:{password}@127.0.0.1:{port}{rest}")
