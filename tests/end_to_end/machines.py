"""Machines with addresses of their own on a network of their own: Linux network namespaces, joined by a bridge.

What runs in one reaches another only by its address, and a cable that is pulled loses packets without a word, as a
machine does that dies: no connection is closed, nothing is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil

from protocol.paths import ROOT
from tests.end_to_end.runs import environment
from tests.tls_proxy import Authority, TlsProxy

PREFIX = "10.77.0."
REDIS_ADDRESS = f"{PREFIX}100"
"""Of the head too; so what goes to Redis can be lost while what goes to Ray is not."""

RAY_FOLDER = Path("/tmp/ray")
GCS_PORT, REDIS_PORT = 6379, 6380
NOWHERE = "02:00:00:00:00:ff"
"""The hardware address of nobody."""

START_TIMEOUT_S = 60.0
OBJECT_STORE_BYTES = 2**28


class NoNetworkError(Exception):
    """This system makes no networks for us: it is no Linux, we are not root, or iproute2 is not installed."""


class Machine:
    """An address, a cable, and what runs behind them. Made by `Network.add`."""

    def __init__(self, network: str, name: str, number: int, folder: Path) -> None:
        """`folder` becomes its own /tmp/ray, by which Ray's processes find the node that they are on."""
        self.address = f"{PREFIX}{number}"
        folder.mkdir()
        RAY_FOLDER.mkdir(exist_ok=True)
        self._space, self._switch, self._cable = f"{network}-{name}", network, f"cable{number}"
        hide = ("unshare", "--mount", "sh", "-c", f'mount --bind "$0" {RAY_FOLDER} && exec "$@"', str(folder))
        self.prefix = ("ip", "netns", "exec", self._space, *hide)
        """Words before a command that has it run here."""
        self._started: list[subprocess.Popen[bytes]] = []
        ip("netns", "add", self._space)
        ip(
            *("link", "add", "eth0", "netns", self._space, "type", "veth"),
            *("peer", "name", self._cable, "netns", self._switch),
        )
        ip("link", "set", self._cable, "master", "switch", "up", space=self._switch)
        ip("link", "set", "lo", "up", space=self._space)
        ip("link", "set", "eth0", "up", space=self._space)
        self.take(self.address)
        # Ray finds its own address by asking which way the world is.
        ip("route", "add", "default", "via", f"{PREFIX}254", space=self._space)

    def take(self, address: str) -> None:
        """Answers to an address, beside others."""
        ip("address", "add", f"{address}/24", "dev", "eth0", space=self._space)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """What this thread opens, and what threads that it starts open, is opened on the machine."""
        with open("/proc/thread-self/ns/net") as ours, open(f"/run/netns/{self._space}") as theirs:
            _enter(theirs.fileno())
            try:
                yield
            finally:
                _enter(ours.fileno())

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Starts what ends with the machine."""
        with log.open("w") as output:
            process = subprocess.Popen(
                [*self.prefix, *command], env=environment({}), stdout=output, stderr=subprocess.STDOUT
            )
        self._started.append(process)
        return process

    def pull_cable(self) -> None:
        """Loses every packet to and from the machine."""
        ip("link", "set", self._cable, "down", space=self._switch)

    def plug_in(self) -> None:
        """Loses nothing more."""
        ip("link", "set", self._cable, "up", space=self._switch)

    def runs(self, title: str) -> bool:
        """Whether a process whose title says so runs on it."""
        return any(title in " ".join(process.cmdline()) for process in self._processes())

    def lose_what_goes_to(self, address: str) -> None:
        """Loses every packet to an address."""
        ip("neighbour", "replace", address, "lladdr", NOWHERE, "nud", "permanent", "dev", "eth0", space=self._space)

    def find_again(self, address: str) -> None:
        """Loses nothing more to an address."""
        ip("neighbour", "delete", address, "dev", "eth0", space=self._space)

    def take_down(self) -> None:
        """Kills all that runs on it and removes it."""
        for process in self._processes():
            process.kill()
        for process in self._started:
            process.wait()
        ip("netns", "delete", self._space)

    def _processes(self) -> Iterator[psutil.Process]:
        for pid in map(int, ip("netns", "pids", self._space).split()):
            with contextlib.suppress(psutil.NoSuchProcess):
                yield psutil.Process(pid)


class Network:
    """A switch, and machines on it that are nodes of one Ray cluster. Every driver on the head that gets `env` joins
    them, and finds a Redis server there, which has an address of its own and wants TLS."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._name = folder, f"sfumato-{secrets.token_hex(3)}"
        self._machines: dict[str, Machine] = {}
        self.env: dict[str, str] = {}

    def add(self, name: str, resources: Mapping[str, float]) -> Machine:
        """Connects a new machine that has these custom resources."""
        machine = self._connect(name)
        self._start_ray(machine, f"--address={self.env['RAY_ADDRESS']}", f"--resources={json.dumps(resources)}")
        return machine

    def __getitem__(self, name: str) -> Machine:
        return self._machines[name]

    def _connect(self, name: str) -> Machine:
        machine = Machine(self._name, name, len(self._machines) + 1, self._folder / name)
        self._machines[name] = machine
        return machine

    def _start_ray(self, machine: Machine, *options: str) -> None:
        log = self._folder / f"{machine.address}.log"
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *options]
        command += [f"--node-ip-address={machine.address}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        ray = machine.start([*command, "--num-cpus=4"], log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while "block" not in log.read_text():
            assert ray.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    def _start_redis(self) -> str:
        """Starts a server as the cluster files do, with TLS before it. Returns its URL."""
        folder = self._folder / "redis"
        authority = Authority(self._folder / "authority")
        command = ["-m", "cluster.head_redis", f"--host={REDIS_ADDRESS}", f"--port={REDIS_PORT}", f"--folder={folder}"]
        url = subprocess.check_output([*self.head.prefix, sys.executable, *command], cwd=ROOT, text=True).strip()
        pair = authority.issue(REDIS_ADDRESS)
        with self.head.inside():
            proxy = self._open.enter_context(TlsProxy(REDIS_PORT, pair, host=REDIS_ADDRESS))
        url = url.replace("redis://", "rediss://").replace(f":{REDIS_PORT}/", f":{proxy.port}/")
        return f"{url}?ssl_ca_certs={authority.certificate}"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as self._open:
            self._make_switch()
            self.head = self._connect("head")
            self.head.take(REDIS_ADDRESS)
            self._start_ray(self.head, "--head", f"--port={GCS_PORT}", "--include-dashboard=false")
            self.env = {
                "RAY_ADDRESS": f"{self.head.address}:{GCS_PORT}",
                "SFUMATO_REDIS_URL": self._start_redis(),
            }
            self._open = self._open.pop_all()
        return self

    def _make_switch(self) -> None:
        try:
            ip("netns", "add", self._name)
            self._open.callback(self._take_down)
            ip("link", "add", "switch", "type", "bridge", space=self._name)
            ip("link", "set", "switch", "up", space=self._name)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoNetworkError(str(error)) from error

    def _take_down(self) -> None:
        for machine in self._machines.values():
            machine.take_down()
        ip("netns", "delete", self._name)

    def __exit__(self, *_: object) -> None:
        self._open.close()


def ip(*words: str, space: str | None = None) -> str:
    """Runs iproute2's command and returns what it prints. Raises CalledProcessError."""
    command = ["ip", *(["-netns", space] if space else []), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _enter(space: int) -> None:
    CLONE_NEWNET = 0x40000000
    if ctypes.CDLL(None, use_errno=True).setns(space, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
