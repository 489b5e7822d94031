"""A Redis server for all runs of a cluster, beside Ray's head. The cluster files start it before Ray:

    export SFUMATO_REDIS_URL=$(python -m cluster.head_redis); ray start --head ...

    asked for --> it answers ----------------------------------------------------------------> its URL is printed
              --> password made, once, in a file of this user's own --> started, on its own --^

Drivers, which `ray job submit` starts on the head, inherit the variable, and recipes name it: `redis.url: env:
SFUMATO_REDIS_URL`. The password is neither in a recipe nor in `ps`, and other nodes have it from the driver alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from cluster.redis_server import START_TIMEOUT_S, find_redis_server, server_config
from protocol.errors import RedisError
from protocol.stream import connect

PORT = 6380
"""Ray's head listens on 6379."""


def main(arguments: list[str] | None = None) -> int:
    """Prints the URL of the server, having started it where it does not run. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m cluster.head_redis", description="Starts a Redis server.")
    parser.add_argument("--host", default=None, help="address to listen on; default: this node's private one")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}")
    parser.add_argument("--maxmemory", default="0", help="as Redis writes it, such as 32gb; default: no limit")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".sfumato", help="for password and log")
    options = parser.parse_args(arguments)
    try:
        print(serve(options.host or own_address(), options.port, options.maxmemory, options.folder))
    except RedisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def own_address() -> str:
    """Returns the address of this machine that Ray's nodes know it by."""
    from ray.util import get_node_ip_address

    return str(get_node_ip_address())


def serve(host: str, port: int, maxmemory: str, folder: Path) -> str:
    """Returns the URL of a server that answers. Raises RedisError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    password = _password(folder / "redis-password")
    url = f"redis://:{password}@{host}:{port}/0"
    if _answers(url):
        return url
    process = _start(server_config(host, port, password, maxmemory), folder / "redis.log")
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers(url):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RedisError(
                f"the Redis server at {host}:{port} did not start",
                expected="a free port, and an address of this machine",
                do=f"read {folder / 'redis.log'}",
            )
        time.sleep(0.05)
    return url


def _password(file: Path) -> str:
    with (
        contextlib.suppress(FileExistsError),
        os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as new,
    ):
        new.write(secrets.token_urlsafe(32))
    return file.read_text()


def _start(config: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            [find_redis_server(), "-"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            start_new_session=True,  # It outlives this command, and `ray stop`.
        )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(config.encode())
    return process


def _answers(url: str) -> bool:
    try:
        connect(url, timeout_s=1.0).close()
    except RedisError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
