"""Reaching a Redis server, and saying what is wrong when that fails. No message ever holds the password."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import redis
from redis import exceptions as redis_errors
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from protocol.errors import RedisError

OLDEST_SERVER = (6, 2)
"""XPENDING ... IDLE and XTRIM ... MINID came with Redis 6.2."""

FROM_ENVIRONMENT = "env:"

_REFUSALS = (redis_errors.AuthenticationError, redis_errors.NoPermissionError)
_RAY = "Ray's own head node listens on 6379"

Method = TypeVar("Method", bound=Callable[..., Any])


def connect(url: str, *, timeout_s: float) -> redis.Redis:
    """Returns a client of a server that answers, accepts us and can hold a run, or raises `RedisError`.

    `timeout_s` bounds connecting and every single answer. TLS settings come as redis-py's `ssl_...` query
    options: `rediss://:password@host:port/0?ssl_ca_certs=/path/ca.pem`.
    """
    address = redacted_url(url)
    try:
        client = redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            decode_responses=False,
        )
        _check_server(client, address)
    except redis_errors.RedisError as error:
        raise _explained(error, address) from error
    except (TypeError, ValueError) as error:
        raise RedisError(f"the options of {address} cannot be used: {error}") from None
    # Mid-run a brief drop is worth some patience; a wrong address at the start is not.
    client.set_retry(Retry(ExponentialBackoff(cap=1.0, base=0.05), 3))
    return client


def url_of(named: str) -> str:
    """Returns what the environment variable NAME holds for `env:NAME`, and any other URL as it stands.

    The variable is read where this is called: of a run by its driver, which tells the others.
    """
    if not named.startswith(FROM_ENVIRONMENT):
        return named
    if url := os.environ.get(named.removeprefix(FROM_ENVIRONMENT)):
        return url
    raise RedisError(
        "the recipe takes the Redis URL from an environment variable that is not set here",
        value=named,
        expected="redis://[user][:password]@host:port/db in that variable, where the driver runs",
        do="set it, or set redis.url=null for a server of our own where the cluster is one machine",
    )


def redacted_url(url: str) -> str:
    """Returns `scheme://host:port/db` without user and password, `env:NAME` as it stands, or raises `RedisError` about
    its form."""
    if url.startswith(FROM_ENVIRONMENT):
        return url
    expected = "redis://[user][:password]@host:port/db or rediss://... for TLS"
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("redis", "rediss"):
        raise RedisError("the Redis URL has an unknown scheme", value=scheme if separator else "", expected=expected)
    form = RedisError("the Redis URL cannot be read", expected=expected, do="percent-encode the password")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 6379
    except ValueError:
        # The parser quotes what it cannot read, which may be a piece of the password.
        raise form from None
    if not host or not re.fullmatch(r"(/\d*)?", parts.path) or "@" in rest[len(parts.netloc) :]:
        raise form
    _check_options(parts.query)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{parts.path}"


def _check_options(query: str) -> None:
    names = [option.partition("=")[0] for option in query.split("&") if option]
    if unknown := [name for name in names if not name.startswith("ssl_")]:
        raise RedisError("the Redis URL has an unknown option", value=unknown[0], expected="ssl_... options only")


def _check_server(client: redis.Redis, address: str) -> None:
    info: Any = client.info()
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_SERVER:
        raise RedisError(f"the Redis server at {address} is too old", value=version, expected="6.2 or newer")
    # Our keys carry no expiry, so only the allkeys policies would throw them away.
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys"):
        raise RedisError(
            f"the Redis server at {address} throws keys away when it is full",
            value=f"maxmemory-policy {policy}",
            expected="noeviction",
            do="run CONFIG SET maxmemory-policy noeviction, or use a server of its own for sfumato",
        )


def _explained(error: redis_errors.RedisError, address: str) -> RedisError:
    """Returns our error for one of redis-py's: which server, what was wrong, what to do."""
    what, do = _diagnosis(error)
    return RedisError(f"{what} (Redis at {address}): {error}", do=do)


def _diagnosis(error: redis_errors.RedisError) -> tuple[str, str]:
    """Returns what is wrong and what to do, by the first kind of error that fits."""
    text = str(error)
    if isinstance(error, redis_errors.OutOfMemoryError):
        return "the server is full", "raise its maxmemory, or lower the recipe's groups a round, steps or lag"
    if isinstance(error, _REFUSALS) or "NOAUTH" in text:
        return "the server refuses us", "check user and password in the URL (redis://user:password@host:port)"
    if "SSL" in text or "certificate" in text.lower():
        return (
            "TLS failed",
            "use redis:// if the server has no TLS; name its CA by ?ssl_ca_certs=/path/ca.pem",
        )
    if isinstance(error, redis_errors.TimeoutError):
        return "the server did not answer in time", "check host, port, load, and whether both sides use TLS"
    if isinstance(error, redis_errors.ConnectionError):
        return "the connection failed", f"start the server; check host and port ({_RAY}); TLS needs rediss://"
    if isinstance(error, redis_errors.InvalidResponse):
        return "this is no Redis server", f"check host and port ({_RAY})"
    return "the server refused a command", "check that it is Redis 6.2 or newer and allows stream commands"


def explain_errors(method: Method) -> Method:
    """Turns redis-py's errors into `RedisError`, so that callers can retry without importing redis."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except redis_errors.RedisError as error:
            raise _explained(error, self.address) from error

    return cast(Method, call)
