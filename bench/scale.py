"""How far the plumbing reaches: `python -m bench.scale [measure] [simulate]`. bench/README.md says what is what.

`measure` runs real rollout actors, streams, codec and weight store with a policy that computes nothing, on this
machine; `simulate` holds the simulation against that, and asks it about clusters. Results are in scale.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from actors.rollout_worker import RolloutWorker
from bench.scale_simulation import Demand, Outcome, Plant, broadcast_s, simulate
from cluster.launch import start_store
from cluster.processes import Endpoint
from cluster.redis_server import RedisServer
from cluster.versions import own_versions
from cluster.weight_store import StoreClient
from learner.receipts import receipt_of
from protocol.groups import Group
from protocol.recipe import Recipe
from protocol.recipe_file import load_recipe
from protocol.stream import GroupReader, Streams, connect
from protocol.tickets import Source, Ticket, TicketPlan

RESULTS = Path(__file__).with_name("scale.json")
RECIPE = load_recipe("recipes/tiny_prdp.yaml")
SD_SHAPE, XL_SHAPE = (8, 51, 4, 64, 64), (8, 51, 4, 128, 128)
"""fp16 latents of 8 siblings and 50 steps: Stable Diffusion 1.x and XL."""

COUNTS = (1, 2, 4, 8, 16, 32, 64)
ACTOR_BYTES = 250 * 2**20
PACED_S = 4.0
NUM_POLLS = 8
VERSION_BYTES = 64 * 2**20
READ_BLOCK_S = 1.0
PLAN = TicketPlan(1, (Source.of_prompts(("a red seven",)),), num_groups=2**20, group_size=8, lag=0)

IMAGE_S = {"SD 1.5": 1.604, "SDXL": 3.315 * 50 / 30}
"""Seconds for an image of 50 steps with guidance on an A100 80GB, PyTorch SDPA, batch 1: fal-ai's
stable-diffusion-benchmarks (512 pixels), and diffusers' tables (1024 pixels, 30 steps in 3.315 s); 8 images a group."""

VERSIONS = {"SD 1.5": {"LoRA": 6.4e6, "full": 1.72e9}, "SDXL": {"LoRA": 46e6, "full": 5.14e9}}
"""Bytes of a published version: rank 8 adapters in fp32, or the whole U-Net in 16 bits."""

SIZES = (100, 200, 500, 1000, 2000, 5000, 10_000)
NETWORK = 25e9 / 8
"""Bytes a second of a card of 25 Gbit/s."""

ACTORS_PER_NODE = 8
LAYOUTS = {"1 server, 1 rank": (1, 1), "1 server, 8 ranks": (1, 8), "4 servers, 16 ranks": (4, 16)}
LAYOUTS |= {"16 servers, 64 ranks": (16, 64), "48 servers, 192 ranks": (48, 192)}
MOST_OTHERS = 20
KEEPS_UP = 0.95
"""Of what its actors could make alone, a cluster that keeps up makes so much."""


@dataclass(frozen=True)
class NoScores:
    """What is there at once."""

    def ready(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True)
class Pending:
    """A ticket whose group is made."""

    ticket: Ticket
    scores: NoScores


class NoCompute:
    """A rollout whose groups have the right size and cost only time."""

    fetched = None
    peak_bytes = 0

    def __init__(self, store: StoreClient, compute_s: float, shape: tuple[int, ...]) -> None:
        self._store, self.compute_s, self._held = store, compute_s, ""
        latents = np.random.default_rng(0).standard_normal(shape).astype(np.float16)
        self._arrays: dict[str, np.ndarray] = {
            "latents_GSCHW": latents,
            "log_prob_GT": np.zeros((shape[0], shape[1] - 1), np.float32),
        }

    def hold(self, digest: str) -> None:
        """Fetches a version, unless it is held."""
        if digest != self._held:
            data = self._store.fetch(digest)
            assert data is not None
            self._held = digest

    def sample(self, ticket: Ticket, after_step: Callable[[], None]) -> Pending:
        """Takes its time, and says between steps that it lives."""
        self.hold(ticket.weights_digest)
        for _ in range(NUM_POLLS):
            time.sleep(self.compute_s / NUM_POLLS)
            after_step()
        return Pending(ticket, NoScores())

    def complete(self, made: Pending) -> Group:
        """Returns the group."""
        t, worker = made.ticket, str(os.getpid())
        numbers = (t.ticket_id, t.round, t.index, t.prompt, t.version, t.weights_digest)
        return Group(*numbers, "{}", "{}", worker, self.compute_s, 0.0, 8, 0, self._arrays)


class PlumbingProcess:
    """A rollout actor as launch.py makes them, but for its policy."""

    def __init__(self, name: str, recipe: Recipe, endpoint: Endpoint, store: Any, shape: tuple[int, ...]) -> None:
        self._name, self._recipe, self._endpoint, self._stop = name, recipe, endpoint, threading.Event()
        self._rollout = NoCompute(StoreClient(store), 0.0, shape)

    def run(self, compute_s: float) -> None:
        """Answers tickets until `stop`."""
        self._stop.clear()
        self._rollout.compute_s = compute_s
        rollout: Any = self._rollout
        RolloutWorker(self._name, rollout, self._endpoint.open(), self._recipe).run(self._stop.is_set)

    def stop(self) -> None:
        """Lets `run` return."""
        self._stop.set()

    def hold(self, digest: str) -> float:
        """Returns by the clock when a version is here."""
        self._rollout.hold(digest)
        return time.time()

    def cpu_s(self) -> float:
        """Returns the CPU time that this process has used."""
        return time.process_time()


class Bench:
    """A run without a learner: the store, the streams, and a reader that does what a rank does with a group."""

    def __init__(self, server: RedisServer, shape: tuple[int, ...]) -> None:
        self._shape, self._endpoint = shape, Endpoint(server.url, "scale", 1, 1, 60.0, own_versions())
        self._server = connect(server.url, timeout_s=60.0)
        self._streams: Streams = self._endpoint.open()
        self._streams.open()
        self._store = start_store(RECIPE)
        self._actors: list[Any] = []
        self._reader, self._num_issued, self._num_versions = GroupReader(self._streams, [0]), 0, 0
        self._digest = ""

    def grow(self, count: int) -> None:
        """Starts actors until there are so many."""
        remote: Any = ray.remote(PlumbingProcess).options(num_cpus=0, max_concurrency=3)
        new = range(len(self._actors), count)
        self._actors += [remote.remote(str(name), RECIPE, self._endpoint, self._store, self._shape) for name in new]
        ray.get([actor.cpu_s.remote() for actor in self._actors])

    def broadcast(self) -> float:
        """Publishes a version; returns how long it takes until every actor has it."""
        self._num_versions += 1
        self._digest = f"{self._num_versions:064x}"
        data = np.random.default_rng(self._num_versions).bytes(VERSION_BYTES)
        started = time.time()
        StoreClient(self._store).publish(self._num_versions, self._digest, data)
        return max(ray.get([actor.hold.remote(self._digest) for actor in self._actors])) - started

    def flow(self, compute_s: float, num_groups: int) -> dict[str, float]:
        """Lets the actors answer so many tickets, one out for each actor; returns what was seen of those in the
        middle, and CPU seconds a group."""
        runs = [actor.run.remote(compute_s) for actor in self._actors]
        for _ in self._actors:
            self._issue()
        issued_at = {self._id(number): time.time() for number in range(self._num_issued)}
        latencies_s: list[float] = []
        skipped = num_groups // 4
        before, after = self._usage(), {}
        while len(latencies_s) < num_groups:
            ray.get(ray.wait(runs, timeout=0)[0])  # Raises what an actor was lost to.
            for arrival in self._reader.read(block_s=READ_BLOCK_S):
                assert isinstance(arrival.content, Group)
                receipt_of(arrival.content)
                now = time.time()
                latencies_s.append(now - issued_at[arrival.content.ticket_id] - compute_s)
                issued_at[self._id(self._num_issued)] = now
                self._issue()
                if len(latencies_s) == skipped:
                    before = self._usage()
                if len(latencies_s) == num_groups - skipped:
                    after = self._usage()
            self._reader.trim()
        self._drain(runs)
        return self._seen(latencies_s[skipped : num_groups - skipped], compute_s, before, after)

    def _seen(
        self, latencies_s: list[float], compute_s: float, before: dict[str, float], after: dict[str, float]
    ) -> dict[str, float]:
        used = {name: after[name] - before[name] for name in before}
        ours = used["workers"] + used["server"] + used["rank"]
        latency_s = statistics.mean(latencies_s)
        return {
            # Little's law: actors that began together answer in bursts, between which no clock should be read.
            "groups_per_s": len(self._actors) / (latency_s + compute_s),
            "latency_s": latency_s,
            **{f"{name}_s": used[name] / len(latencies_s) for name in ("workers", "server", "rank")},
            "cores_of_others": (used["all"] - ours) / used["clock"],
        }

    def _usage(self) -> dict[str, float]:
        # What a system says of other processes comes in ticks of 10 ms; each knows of itself to the microsecond.
        server, machine = self._server.info("cpu"), psutil.cpu_times()
        return {
            "workers": sum(ray.get([actor.cpu_s.remote() for actor in self._actors])),
            "server": server["used_cpu_user"] + server["used_cpu_sys"],
            "rank": time.process_time(),
            "all": sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice,
            "clock": time.time(),
        }

    def _drain(self, runs: list[Any]) -> None:
        ray.get([actor.stop.remote() for actor in self._actors])
        ray.get(runs)
        self._streams.delete_attempt()
        self._streams.open()
        self._reader = GroupReader(self._streams, [0])

    def _issue(self) -> None:
        self._streams.issue([PLAN.ticket(0, self._num_issued, self._digest)])
        self._num_issued += 1

    def _id(self, number: int) -> str:
        return f"{0:06d}-{number:04d}"


def measure(
    counts: Sequence[int] = COUNTS, shape: tuple[int, ...] = SD_SHAPE, paced_s: float = PACED_S
) -> dict[str, Any]:
    """Returns what is measured at each number of actors that fits into memory."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    points = []
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder)) as server:
        bench = Bench(server, shape)
        for count in counts:
            if psutil.virtual_memory().available < count * ACTOR_BYTES:
                break
            bench.grow(count)
            broadcasts = [bench.broadcast() for _ in range(3)]
            for compute_s, num_groups in ((0.0, max(32, 2 * count)), (paced_s, 3 * count)):
                if compute_s and count == 1:
                    num_groups = 8
                seen = {"actors": count, "compute_s": compute_s, "broadcast_s": statistics.median(broadcasts)}
                seen |= bench.flow(compute_s, num_groups)
                print({name: round(value, 4) for name, value in seen.items()}, flush=True)
                points.append(seen)
    ray.shutdown()
    return {"group_bytes": np.prod(shape).item() * 2, "version_bytes": VERSION_BYTES, "points": points}


def demand_of(measured: dict[str, Any]) -> Demand:
    """Returns what a group costs: CPU time with one actor that has nothing else to do."""
    first = next(point for point in measured["points"] if point["actors"] == 1 and not point["compute_s"])
    return Demand(measured["group_bytes"], first["workers_s"], first["server_s"], first["rank_s"])


def busy_others(measured: dict[str, Any]) -> int:
    """Returns how many processes of others, that always want a core, explain best how one actor alone went on."""
    first = measured["points"][0]

    def miss(num_others: int) -> float:
        return abs(_simulated(measured, first, num_others) - first["groups_per_s"])

    return min(range(MOST_OTHERS), key=miss)


def validate(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the simulation beside each measured point. Only the first has been used to fit it."""
    num_others, rows = busy_others(measured), []
    for point in measured["points"]:
        told, seen = _simulated(measured, point, num_others), point["groups_per_s"]
        row = {"actors": point["actors"], "compute_s": point["compute_s"]}
        rows.append(row | {"measured_groups_per_s": seen, "simulated_groups_per_s": told, "error": told / seen - 1})
    errors = [abs(row["error"]) for row in rows[1:]]
    return {"others": num_others, "median_error": statistics.median(errors), "max_error": max(errors), "points": rows}


def _simulated(measured: dict[str, Any], point: dict[str, float], num_others: int) -> float:
    count = int(point["actors"])
    plant = Plant(count, point["compute_s"], count, cores=os.cpu_count(), num_others=num_others)
    return simulate(plant, demand_of(measured), max(32, 3 * count)).groups_per_s


def ask(model: str, shape: tuple[int, ...], demand: Demand) -> dict[str, Any]:
    """Returns, for each layout, how much of what the actors could make alone comes through, by their number."""
    demand = demand.of_bytes(float(np.prod(shape) * 2))
    compute_s = 8 * IMAGE_S[model]
    answers: dict[str, Any] = {"group_bytes": demand.group_bytes, "compute_s": compute_s, "layouts": {}}
    for layout, (num_servers, num_ranks) in LAYOUTS.items():
        rows: list[dict[str, Any]] = []
        for size in SIZES:
            plant = Plant(size, compute_s, 2 * size, num_servers, num_ranks, NETWORK, NETWORK)
            told = simulate(plant, demand, 3 * size)
            rows.append(_row(size, told, size / (compute_s + demand.worker_s)))
            if rows[-1]["share"] < KEEPS_UP / 2:
                break
        fails = next((row for row in rows if row["share"] < KEEPS_UP), None)
        most = max((row["actors"] for row in rows if row["share"] >= KEEPS_UP), default=0)
        answers["layouts"][layout] = {
            "keeps_up_to": most,
            "first_bottleneck": fails and max(fails["busy"], key=fails["busy"].__getitem__),
            "rows": rows,
        }
    return answers | {"broadcast": _broadcasts(model, compute_s)}


def _row(size: int, told: Outcome, alone: float) -> dict[str, Any]:
    return {"actors": size, "share": told.groups_per_s / alone, **asdict(told)}


def _broadcasts(model: str, compute_s: float) -> dict[str, Any]:
    """Times of handing a version to all nodes, in units of the time that a group takes to compute."""
    return {
        form: {size: [s / compute_s for s in broadcast_s(num, -(-size // ACTORS_PER_NODE), NETWORK)] for size in SIZES}
        for form, num in VERSIONS[model].items()
    }


def main(names: list[str]) -> None:
    """Measures, simulates, or both; keeps what it does not do anew."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if "measure" in (names or ["measure"]):
        results["measured"] = measure()
    if "simulate" in (names or ["simulate"]):
        demand = demand_of(results["measured"])
        results["demand"] = asdict(demand)
        results["validation"] = validate(results["measured"])
        shapes = {"SD 1.5": SD_SHAPE, "SDXL": XL_SHAPE}
        results["simulated"] = {model: ask(model, shape, demand) for model, shape in shapes.items()}
    RESULTS.write_text(json.dumps(_rounded(results), indent=1) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main(sys.argv[1:])
