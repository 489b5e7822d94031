"""Reaching a Redis server or a Redis Cluster, and saying what is wrong when that fails.

    redis://   rediss://                    one server; the second with TLS
    redis+cluster://   rediss+cluster://    a Redis Cluster, by one of its nodes or several: host:port,host:port

No message ever holds the password.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast
from urllib.parse import SplitResult, parse_qsl, urlsplit

import redis
from redis import exceptions as redis_errors
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.cluster import REDIS_ALLOWED_KEYS, ClusterNode
from redis.retry import Retry

from protocol.errors import RedisError

OLDEST_SERVER = (6, 2)
"""XPENDING ... IDLE and XTRIM ... MINID came with Redis 6.2."""

FROM_ENVIRONMENT = "env:"
CLUSTER = "+cluster"
SCHEMES = ("redis", "rediss", f"redis{CLUSTER}", f"rediss{CLUSTER}")
TLS_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
MODES = {
    False: ("is a member of a Redis Cluster", "one server of its own", "write redis+cluster:// or rediss+cluster://"),
    True: ("is no member of a Redis Cluster", "a node in cluster mode", "write redis:// or rediss://"),
}
"""What is wrong, what was expected and what to do, where a server's mode is not what the URL says."""

_REFUSALS = (redis_errors.AuthenticationError, redis_errors.NoPermissionError)
# The cluster client's own kind is no RedisError.
_ERRORS = (redis_errors.RedisError, redis_errors.RedisClusterException)
_RAY = "Ray's own head node listens on 6379"

Client = redis.Redis | redis.RedisCluster
Method = TypeVar("Method", bound=Callable[..., Any])


def connect(url: str, *, timeout_s: float) -> Client:
    """Returns a client of a server or cluster that answers, accepts us and can hold a run, or raises `RedisError`.

    `timeout_s` bounds connecting and every single answer. TLS settings come as redis-py's `ssl_...` query
    options: `rediss://:password@host:port/0?ssl_ca_certs=/path/ca.pem`.
    """
    address = redacted_url(url)
    _check_files(url, address)
    options: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    options |= {"retry": Retry(NoBackoff(), 0), "protocol": 2, "decode_responses": False}
    try:
        client = _join(url, options) if CLUSTER in address else redis.Redis.from_url(url, **options)
        for facts in server_facts(client):
            _check_server(facts, address)
    except _ERRORS as error:
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


def _join(url: str, options: dict[str, Any]) -> redis.RedisCluster:
    """Joins a cluster by any of its nodes that answers. Raises ValueError for options that its client would drop."""
    user, hosts, rest = _parts(url.replace(CLUSTER, "", 1))
    if unknown := [name for name, _ in parse_qsl(rest.query) if name not in REDIS_ALLOWED_KEYS]:
        raise ValueError(f"a cluster's client has no {unknown[0]}")
    make: Any = ClusterNode
    nodes = [make(str(host.hostname), host.port or 6379) for host in hosts]
    first = rest._replace(netloc=user + hosts[0].netloc).geturl()
    return redis.RedisCluster.from_url(first, startup_nodes=nodes, **options)


def server_facts(client: Client) -> list[dict[str, Any]]:
    """Returns what INFO says of the server, or of each primary of the cluster. Raises redis-py's errors."""
    if isinstance(client, redis.Redis):
        return [client.info()]
    cluster: Any = client
    return [client.get_redis_connection(node).info() for node in cluster.get_primaries()]


def address_of(client: Client) -> str:
    """Returns host:port of a client's server, or of a node of its cluster."""
    if isinstance(client, redis.RedisCluster):
        cluster: Any = client
        return f"the cluster of {cluster.get_default_node().name}"
    options = client.connection_pool.connection_kwargs
    return f"{options.get('host')}:{options.get('port')}"


def redacted_url(url: str) -> str:
    """Returns `scheme://host:port/db` without user and password, `env:NAME` as it stands, or raises `RedisError` about
    its form."""
    if url.startswith(FROM_ENVIRONMENT):
        return url
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES:
        expected = f"{', '.join(f'{known}://' for known in SCHEMES)}, then [user][:password]@host:port"
        raise RedisError("the Redis URL has an unknown scheme", value=scheme if separator else "", expected=expected)
    form = RedisError(
        "the Redis URL cannot be read",
        expected="redis://[user][:password]@host:port/db, rediss://... for TLS, or "
        "redis+cluster://[user][:password]@host:port,host:port",
        do="percent-encode the password",
    )
    try:
        _, hosts, parts = _parts(url)
        shown = [f"{f'[{host.hostname}]' if ':' in str(host.hostname) else host.hostname}" for host in hosts]
        shown = [f"{name}:{host.port or 6379}" for name, host in zip(shown, hosts, strict=True)]
    except ValueError:
        # The parser quotes what it cannot read, which may be a piece of the password.
        raise form from None
    is_cluster = scheme.endswith(CLUSTER)
    path = r"/?0?" if is_cluster else r"(/\d*)?"
    if not all(host.hostname for host in hosts) or (len(hosts) > 1 and not is_cluster):
        raise form
    if not re.fullmatch(path, parts.path) or "@" in rest[len(parts.netloc) :]:
        raise form
    _check_options(parts.query)
    return f"{scheme}://{','.join(shown)}{parts.path}"


def _parts(url: str) -> tuple[str, list[SplitResult], SplitResult]:
    """Returns `user:password@` or nothing, the hosts, and the URL's parts. Raises ValueError."""
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    return user + at, [urlsplit(f"//{host}") for host in hosts.split(",")], parts


def _check_options(query: str) -> None:
    names = [option.partition("=")[0] for option in query.split("&") if option]
    if unknown := [name for name in names if not name.startswith("ssl_")]:
        raise RedisError("the Redis URL has an unknown option", value=unknown[0], expected="ssl_... options only")


def _check_files(url: str, address: str) -> None:
    """redis-py would call a file that is not there a broken connection."""
    for name, path in parse_qsl(urlsplit(url).query):
        if name in TLS_FILES and not os.path.exists(path):
            raise RedisError(
                f"{name} in the URL of {address} names a file that this machine does not have",
                value=path,
                expected="a PEM file, at the same path on every node",
                do="correct the path, or copy the file there",
            )


def _check_server(facts: dict[str, Any], address: str) -> None:
    version = str(facts.get("redis_version", "0"))
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_SERVER:
        raise RedisError(f"the Redis server at {address} is too old", value=version, expected="6.2 or newer")
    if facts.get("cluster_enabled") and CLUSTER not in address:
        raise _wrong_mode(address)
    # Our keys carry no expiry, so only the allkeys policies would throw them away.
    policy = str(facts.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys"):
        raise RedisError(
            f"the Redis server at {address} throws keys away when it is full",
            value=f"maxmemory-policy {policy}",
            expected="noeviction",
            do="run CONFIG SET maxmemory-policy noeviction, or use a server of its own for sfumato",
        )


def _wrong_mode(address: str) -> RedisError:
    what, expected, do = MODES[CLUSTER in address]
    return RedisError(f"the Redis server at {address} {what}", expected=expected, do=do)


def _explained(error: Exception, address: str) -> RedisError:
    """Returns our error for one of redis-py's: which server, what was wrong, what to do."""
    while isinstance(error, redis_errors.RedisClusterException) and isinstance(
        inner := error.__cause__ or error.__context__, Exception
    ):
        # The cluster client wraps what its nodes have said.
        error = inner
    if "cluster support disabled" in str(error):
        return _wrong_mode(address)
    what, do = _diagnosis(error)
    return RedisError(f"{what} (Redis at {address}): {error}", do=do)


def _diagnosis(error: Exception) -> tuple[str, str]:
    """Returns what is wrong and what to do, by the first kind of error that fits."""
    text = str(error)
    if isinstance(error, redis_errors.OutOfMemoryError):
        return "the server is full", "raise its maxmemory, or lower the recipe's groups a round, steps or lag"
    if isinstance(error, _REFUSALS) or "NOAUTH" in text:
        return "the server refuses us", "check user and password in the URL (redis://user:password@host:port)"
    if "SSL" in text or "certificate" in text.lower():
        return (
            "TLS failed",
            "use redis:// or redis+cluster:// if the server has no TLS; name its CA by ?ssl_ca_certs=/path/ca.pem",
        )
    if isinstance(error, redis_errors.ClusterError | redis_errors.RedisClusterException):
        return "the cluster does not serve all keys", "look at CLUSTER INFO; start the nodes that are down"
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
        except _ERRORS as error:
            raise _explained(error, self.address) from error

    return cast(Method, call)
