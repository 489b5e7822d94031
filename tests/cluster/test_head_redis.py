"""A cluster's own Redis server: started once, found again, and its password in one file only."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.redis_server import free_port
from protocol.paths import ROOT
from protocol.stream import connect

HOST = "127.0.0.1"


@pytest.fixture
def port() -> Iterator[int]:
    """A free port; whoever of ours listens there in the end is killed."""
    port = free_port(HOST)
    yield port
    for process in listeners(port):
        process.kill()


def listeners(port: int) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["name"])
        if "redis" in process.info["name"]
        and any(connection.laddr.port == port for connection in process.net_connections())
    ]


def ask(folder: Path, port: int) -> subprocess.CompletedProcess[str]:
    """Runs the command as the cluster files do."""
    return subprocess.run(
        [sys.executable, "-m", "cluster.head_redis", "--host", HOST, "--port", str(port), "--folder", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_second_call_finds_the_server_of_the_first_with_all_that_it_holds(tmp_path: Path, port: int) -> None:
    first = ask(tmp_path / "state", port)
    assert first.returncode == 0, first.stderr
    url = first.stdout.strip()
    with connect(url, timeout_s=5.0) as client:
        client.set("key", "value")
        assert ask(tmp_path / "state", port).stdout.strip() == url
        assert client.get("key") == b"value"
        assert client.config_get("save") == {"save": ""}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


def test_the_password_is_in_a_file_of_the_users_own_and_not_in_the_process_list(tmp_path: Path, port: int) -> None:
    url = ask(tmp_path / "state", port).stdout.strip()
    password = url.removeprefix("redis://:").partition("@")[0]
    file = tmp_path / "state" / "redis-password"
    assert file.read_text() == password
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (server,) = listeners(port)
    assert password not in " ".join(server.cmdline())
    assert [path for path in tmp_path.rglob("*") if path.is_file() and password in path.read_text()] == [file]


def test_a_server_that_was_killed_comes_back_under_the_same_url(tmp_path: Path, port: int) -> None:
    url = ask(tmp_path, port).stdout.strip()
    (server,) = listeners(port)
    os.kill(server.pid, signal.SIGKILL)
    server.wait(10)
    assert ask(tmp_path, port).stdout.strip() == url


def test_a_port_that_somebody_else_has_is_an_error_that_says_so(tmp_path: Path, port: int) -> None:
    with socket.socket() as other:
        other.bind((HOST, port))
        other.listen()
        refused = ask(tmp_path, port)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"error: the Redis server at {HOST}:{port} did not start" in refused.stderr
