"""A Redis Cluster of three servers on loopback, each with a third of the slots."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from cluster.redis_server import RedisServer, free_port
from tests.tls_proxy import Authority

HOST = "127.0.0.1"
NUM_NODES = 3
NODE_TIMEOUT_MS = 2000
FORM_TIMEOUT_S = 30.0


class ClusterMember(RedisServer):
    """One of the servers. Started again, it is empty and has its slots."""

    def __init__(self, folder: Path, password: str) -> None:
        folder.mkdir()
        super().__init__(folder)
        self._password = password

    @property
    def public_port(self) -> int:
        """The port by which clients know it."""
        return self.port

    def _config(self) -> str:
        cluster = ["cluster-enabled yes", f"cluster-node-timeout {NODE_TIMEOUT_MS}", f"masterauth {self._password}"]
        return super()._config() + "\n".join(cluster) + "\n"

    def ask(self, *command: object) -> bytes:
        """Sends a command to this server alone."""
        answer: bytes = self._client.execute_command(*command)
        return answer

    def serves(self) -> bool:
        """True if it sees the whole cluster, and all of it at work."""
        facts = self.ask("CLUSTER INFO")
        told = facts if isinstance(facts, dict) else {}
        return told.get("cluster_state") == "ok" and told.get("cluster_known_nodes") == str(NUM_NODES)


class TlsMember(ClusterMember):
    """One that speaks TLS with clients and the others; the port without is for `ask` alone."""

    def __init__(self, folder: Path, password: str, authority: Authority) -> None:
        super().__init__(folder, password)
        self._authority, self._pair = authority, authority.issue(HOST)
        self._public_port = free_port(HOST)

    @property
    def public_port(self) -> int:
        """The port by which clients know it."""
        return self._public_port

    def _config(self) -> str:
        files = {"cert": self._pair.certificate, "key": self._pair.key, "ca-cert": self._authority.certificate}
        tls = [f"tls-{kind}-file {path}" for kind, path in files.items()]
        tls += [f"tls-port {self.public_port}", "tls-cluster yes", "tls-auth-clients no"]
        return super()._config() + "\n".join(tls) + "\n"


class RedisCluster:
    """The servers together, in the form that tests know a single one by; with TLS where an authority is given."""

    def __init__(self, folder: Path, authority: Authority | None = None) -> None:
        password, folders = secrets.token_urlsafe(32), [folder / str(number) for number in range(NUM_NODES)]
        self.members = [
            TlsMember(own, password, authority) if authority else ClusterMember(own, password) for own in folders
        ]
        self._scheme, self._password = "rediss+cluster" if authority else "redis+cluster", password
        self._is_formed = False

    @property
    def url(self) -> str:
        """The URL by which `connect` joins."""
        hosts = ",".join(f"{HOST}:{member.public_port}" for member in self.members)
        return f"{self._scheme}://:{self._password}@{hosts}"

    @property
    def port(self) -> int:
        """The first server's port."""
        return self.members[0].port

    def start(self) -> None:
        """Starts what does not run; returns when every slot is served."""
        for member in self.members:
            member.start()
        if not self._is_formed:
            self._form()
        deadline = time.monotonic() + FORM_TIMEOUT_S
        while not all(member.serves() for member in self.members):
            assert time.monotonic() < deadline, "the cluster was not formed in time"
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends all."""
        for member in self.members:
            member.stop()

    def restart(self) -> None:
        """Replaces all by empty ones."""
        self.stop()
        self.start()

    def empty(self) -> None:
        """Brings all back as they were at the start."""
        self.start()
        for member in self.members:
            member.ask("FLUSHALL")
            member.ask("CONFIG SET", "maxmemory", 0)

    def _form(self) -> None:
        bounds = [number * REDIS_CLUSTER_HASH_SLOTS // NUM_NODES for number in range(NUM_NODES + 1)]
        for number, member in enumerate(self.members):
            member.ask("CLUSTER SET-CONFIG-EPOCH", number + 1)
            member.ask("CLUSTER ADDSLOTS", *range(bounds[number], bounds[number + 1]))
            self.members[0].ask("CLUSTER MEET", HOST, member.public_port)
        self._is_formed = True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def keys_of(member: ClusterMember) -> list[str]:
    """Returns the names of all keys that one server holds."""
    client: redis.Redis = member._client
    return sorted(key.decode() for key in client.scan_iter())
