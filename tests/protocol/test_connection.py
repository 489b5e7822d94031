"""An address that does not work is explained, without ever showing the password."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.redis_server import RedisServer, free_port
from protocol.errors import RedisError
from protocol.stream import Streams, connect, redacted_url, url_of

SECRET = "s3cret-pass"


def failure(url: str, *, timeout_s: float = 2.0) -> str:
    with pytest.raises(RedisError) as caught:
        connect(url, timeout_s=timeout_s)
    message = f"{caught.value} {caught.value.__cause__}"
    assert SECRET not in message
    return message


@pytest.fixture
def web_server() -> Iterator[int]:
    """The port of a server that answers whatever it is asked as a web server does."""

    def answer(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer, args=[listening])
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_server_that_accepts_us_is_connected(redis_server: RedisServer) -> None:
    with connect(redis_server.url, timeout_s=5.0) as client:
        assert client.ping()
        assert client.get("bytes, not text") is None


def test_a_wrong_password_is_refused(redis_server: RedisServer) -> None:
    message = failure(f"redis://:{SECRET}@127.0.0.1:{redis_server.port}/0")
    assert "refuses us" in message
    assert f"127.0.0.1:{redis_server.port}" in message


def test_a_missing_password_is_refused(redis_server: RedisServer) -> None:
    assert "refuses us" in failure(f"redis://127.0.0.1:{redis_server.port}")


def test_a_closed_port_is_reported_at_once() -> None:
    port, started = free_port("127.0.0.1"), time.monotonic()
    message = failure(f"redis://:{SECRET}@127.0.0.1:{port}")
    assert "the connection failed" in message
    assert f"127.0.0.1:{port}" in message
    assert time.monotonic() - started < 1.0


def test_a_silent_server_is_given_up_after_the_time_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        message = failure(f"redis://:{SECRET}@127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3)
    assert "did not answer in time" in message
    assert time.monotonic() - started < 2.0


def test_another_kind_of_server_is_recognised(web_server: int) -> None:
    message = failure(f"redis://:{SECRET}@127.0.0.1:{web_server}")
    assert "no Redis server" in message
    assert "6379" in message


def test_tls_to_a_server_without_it_is_explained(web_server: int, redis_server: RedisServer) -> None:
    assert "TLS failed" in failure(f"rediss://:{SECRET}@127.0.0.1:{web_server}")
    # Redis waits for the end of what it takes for a command.
    message = failure(f"rediss://:{SECRET}@127.0.0.1:{redis_server.port}", timeout_s=0.3)
    assert "did not answer in time" in message
    assert "TLS" in message


def test_a_server_that_evicts_our_keys_is_refused(own_redis_server: RedisServer) -> None:
    with connect(own_redis_server.url, timeout_s=5.0) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    assert "allkeys-lru" in failure(own_redis_server.url)
    assert own_redis_server.url not in failure(own_redis_server.url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "unknown scheme"),
        (f"127.0.0.1:6380:{SECRET}", "unknown scheme"),
        (f"http://:{SECRET}@127.0.0.1:6380", "unknown scheme"),
        (f"unix://:{SECRET}@/tmp/redis.sock", "unknown scheme"),
        (f"redis://:{SECRET}@127.0.0.1:port", "cannot be read"),
        (f"redis://:{SECRET}@127.0.0.1:99999", "cannot be read"),
        (f"redis://:{SECRET}/x@127.0.0.1:6380", "cannot be read"),
        (f"redis://:1/{SECRET}@127.0.0.1:6380", "cannot be read"),
        (f"redis://user:12#{SECRET}@127.0.0.1:6380", "cannot be read"),
        (f"redis://user:12?{SECRET}@127.0.0.1:6380", "cannot be read"),
        (f"redis://:{SECRET}@127.0.0.1:6380/zero", "cannot be read"),
        (f"redis://:{SECRET}@:6380", "cannot be read"),
        (f"redis://127.0.0.1:6380?password={SECRET}", "unknown option"),
        (f"redis://:{SECRET}@127.0.0.1:6380?decode_responses=yes", "unknown option"),
        (f"redis://:{SECRET}@127.0.0.1:6380?ssl_novelty=1", "cannot be used"),
        (f"rediss+cluster://:{SECRET}@127.0.0.1:6380?ssl_novelty=1", "cannot be used"),
        (f"redis://:{SECRET}@127.0.0.1:6380,127.0.0.1:6381", "cannot be read"),
        (f"redis+cluster://:{SECRET}@127.0.0.1:6380,", "cannot be read"),
        (f"redis+cluster://:{SECRET}@127.0.0.1:6380/3", "cannot be read"),
    ],
)
def test_a_url_that_cannot_be_used_is_explained(url: str, reason: str) -> None:
    assert reason in failure(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"redis://user:{SECRET}@host:7000/3", "redis://host:7000/3"),
        (f"rediss://:{SECRET}@[::1]:7000?ssl_ca_certs=/ca.pem", "rediss://[::1]:7000"),
        ("redis://host", "redis://host:6379"),
        (f"redis+cluster://:{SECRET}@one:7000,[::1]:7001/0", "redis+cluster://one:7000,[::1]:7001/0"),
    ],
)
def test_an_address_is_shown_without_its_password(url: str, shown: str) -> None:
    assert redacted_url(url) == shown


def test_a_url_may_come_from_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_REDIS_URL", "redis://:secret@host:6380/0")
    assert url_of("env:SFUMATO_REDIS_URL") == "redis://:secret@host:6380/0"
    assert url_of("redis://other:6380/0") == "redis://other:6380/0"


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("SFUMATO_REDIS_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("SFUMATO_REDIS_URL", value)
    with pytest.raises(RedisError, match=r"not set here. Got: 'env:SFUMATO_REDIS_URL'"):
        url_of("env:SFUMATO_REDIS_URL")


def test_a_variables_name_is_no_secret_and_its_value_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_REDIS_URL", "redis://:secret@host:6380/0")
    assert redacted_url("env:SFUMATO_REDIS_URL") == "env:SFUMATO_REDIS_URL"


def test_errors_in_the_middle_of_a_run_do_not_show_the_password(
    own_redis_server: RedisServer, open_streams: Callable[..., Streams]
) -> None:
    streams = open_streams(own_redis_server)
    password = own_redis_server.url.split(":")[2].split("@")[0]
    own_redis_server.stop()
    with pytest.raises(RedisError) as caught:
        streams.counters()
    assert password not in f"{caught.value} {caught.value.__cause__}"
