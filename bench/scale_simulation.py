"""A discrete-event simulation of the plumbing: tickets, Redis servers, the learner's intake.

    tickets --> actor: compute, encode --> server: store --> server: hand out --> rank: decode --> a new ticket

What a group costs each of them in CPU time is measured (bench/scale.py); what a cluster has of each is a parameter.
The same flow is simulated on this machine's cores, which all parts share, to hold the model against measurements,
and on a cluster, where each part has a machine of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

QUANTUM_S = 0.005
"""For so long a process keeps a core that others wait for."""

WARM_UP = 0.25
"""The share of groups at the start, and again at the end, that is not counted."""

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Demand:
    """What one group asks for: bytes on the wire, and CPU seconds of its worker, its server and its learner rank."""

    group_bytes: float
    worker_s: float
    server_s: float
    rank_s: float

    def of_bytes(self, group_bytes: float) -> Demand:
        """Returns the demand of a group of another size: all of it is copying and hashing."""
        scale = group_bytes / self.group_bytes
        return Demand(group_bytes, self.worker_s * scale, self.server_s * scale, self.rank_s * scale)


@dataclass(frozen=True)
class Plant:
    """What there is. `cores` are those that everything shares, with `num_others` processes that always want one; None:
    every part has one of its own."""

    num_actors: int
    compute_s: float
    window: int
    num_servers: int = 1
    num_ranks: int = 1
    server_bytes_per_s: float = float("inf")
    rank_bytes_per_s: float = float("inf")
    cores: int | None = None
    num_others: int = 0


@dataclass(frozen=True)
class Outcome:
    """Groups a second once warm, the mean time from a ticket's issue to its group less the computing, and the busy
    share of each part."""

    groups_per_s: float
    latency_s: float
    busy: dict[str, float]


@dataclass
class _Unit:
    """A server or a rank: one thing at a time."""

    turn: simpy.Resource
    busy_s: float = 0.0


@dataclass
class _Simulation:
    plant: Plant
    demand: Demand
    num_groups: int
    env: simpy.Environment = field(default_factory=simpy.Environment)
    arrivals: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        plant = self.plant
        self.tickets = simpy.Store(self.env)
        self.cores = simpy.Resource(self.env, plant.cores) if plant.cores else None
        self.servers = [_Unit(simpy.Resource(self.env)) for _ in range(plant.num_servers)]
        self.ranks = [_Unit(simpy.Resource(self.env)) for _ in range(plant.num_ranks)]
        self.num_issued = 0

    def run(self) -> Outcome:
        for _ in range(self.plant.window):
            self.issue()
        for number in range(self.plant.num_actors):
            self.env.process(self.actor(number))
        for _ in range(self.plant.num_others):
            self.env.process(self.other())
        self.env.run(until=self.env.process(self.all_arrived()))
        return self.outcome()

    def issue(self) -> None:
        self.tickets.put((self.num_issued, self.env.now))
        self.num_issued += 1

    def all_arrived(self) -> Process:
        self.done = self.env.event()
        yield self.done

    def actor(self, number: int) -> Process:
        # A run's actors do not go in step: their first groups end at any time.
        yield self.env.timeout(self.plant.compute_s * number / self.plant.num_actors)
        while True:
            index, issued_at = yield self.tickets.get()
            yield self.env.timeout(self.plant.compute_s)
            yield from self.work(self.demand.worker_s)
            yield from self.serve(index)
            self.env.process(self.take_in(index, issued_at))

    def take_in(self, index: int, issued_at: float) -> Process:
        rank = self.ranks[index % self.plant.num_ranks]
        with rank.turn.request() as turn:
            yield turn
            received_s = self.demand.group_bytes / self.plant.rank_bytes_per_s
            yield from self.serve(index, received_s)
            started = self.env.now
            yield from self.work(self.demand.rank_s)
            rank.busy_s += self.env.now - started + received_s
        self.arrivals.append((self.env.now, self.env.now - issued_at - self.plant.compute_s))
        if len(self.arrivals) == self.num_groups:
            self.done.succeed()
        self.issue()

    def serve(self, index: int, at_least_s: float = 0.0) -> Process:
        """A server stores a group, or hands it out: by one thread, while its network card sends."""
        server = self.servers[index % self.plant.num_servers]
        with server.turn.request() as turn:
            yield turn
            started = self.env.now
            yield from self.work(self.demand.server_s / 2)
            sent_s = max(self.demand.group_bytes / self.plant.server_bytes_per_s, at_least_s)
            yield self.env.timeout(max(0.0, started + sent_s - self.env.now))
            server.busy_s += self.env.now - started

    def work(self, cpu_s: float) -> Process:
        if self.cores is None:
            yield self.env.timeout(cpu_s)
            return
        left_s = cpu_s
        while left_s > 0:
            with self.cores.request() as turn:
                yield turn
                yield self.env.timeout(min(QUANTUM_S, left_s))
            left_s -= QUANTUM_S

    def other(self) -> Process:
        """Somebody else's process on the same machine."""
        while True:
            yield from self.work(QUANTUM_S)

    def outcome(self) -> Outcome:
        skipped = int(self.num_groups * WARM_UP)
        counted = self.arrivals[skipped : self.num_groups - skipped]
        elapsed_s = counted[-1][0] - counted[0][0]
        parts = {"servers": self.servers, "ranks": self.ranks}
        return Outcome(
            groups_per_s=(len(counted) - 1) / elapsed_s,
            latency_s=sum(latency_s for _, latency_s in counted) / len(counted),
            busy={name: sum(u.busy_s for u in units) / len(units) / self.env.now for name, units in parts.items()},
        )


def simulate(plant: Plant, demand: Demand, num_groups: int) -> Outcome:
    """Returns what comes of so many groups, in a closed loop: each group that is taken in lets out a new ticket, of
    which `window` are out at a time."""
    return _Simulation(plant, demand, num_groups).run()


def broadcast_s(version_bytes: float, num_nodes: int, bytes_per_s: float) -> tuple[float, float]:
    """Returns bounds of the time until every node holds a version: each node that has it hands it on (the number of
    holders doubles), and all fetch it from the store's own node."""
    once_s = version_bytes / bytes_per_s
    return once_s * num_nodes.bit_length(), once_s * num_nodes
