"""Is there enough memory for a recipe? Estimates against machines before a run, against measured peaks after it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.machine import driver_gpus, free_memory_bytes, total_memory_bytes
from cluster.ray_head import head_address
from protocol.activations import MARGIN
from protocol.errors import RecipeError
from protocol.memory import GIB, Item, Process, describe, estimate
from protocol.recipe import Recipe

CUDA_BYTES = 600 * 2**20
"""What CUDA and its libraries take of a GPU in each process, beside torch's tensors."""

POLL_S = 0.5
PEAKS = {"a learner rank": "memory/learner_peak_bytes", "a rollout actor": "memory/rollout_peak_bytes"}


@dataclass(frozen=True)
class Machine:
    """A node's memory: `Machine("10.0.0.7", host_bytes=540_000_000_000, free_bytes=520_000_000_000,
    gpu_bytes=(85_520_809_984,) [1 GPU])`."""

    name: str
    host_bytes: int
    free_bytes: int
    gpu_bytes: tuple[int, ...] = ()


def this_machine() -> Machine:
    """Returns this machine's memory, with its container's limit, and its GPUs' as the driver tells it."""
    gpus = tuple(int(line.split(",")[1].split()[0]) * 2**20 for line in driver_gpus())
    return Machine("this machine", total_memory_bytes(), free_memory_bytes(), gpus)


def check_memory(recipe: Recipe, machines: Sequence[Machine], warn: Callable[[str], None]) -> None:
    """Raises RecipeError where even the least that a recipe may need is too much for the machines; calls `warn` where
    the estimate is. Says nothing of a model that is not on disk yet."""
    for short in shortages(estimate(recipe) or [], machines):
        if short.is_certain:
            raise RecipeError(
                f"{short.what} by the estimate",
                value=describe(short.items),
                expected=f"at most {short.room_bytes / GIB:.1f} GiB; the estimate may be {MARGIN:.0%} too high",
                do=f"the most is for {short.items[0].name}: {short.items[0].do}",
            )
        warn(f"{short.what} by the estimate: {describe(short.items)}; the room is {short.room_bytes / GIB:.1f} GiB")


@dataclass(frozen=True)
class Shortage:
    """Something that does not fit: the items in question, the largest first, and the room for them."""

    what: str
    items: tuple[Item, ...]
    room_bytes: int
    is_certain: bool


def shortages(processes: Sequence[Process], machines: Sequence[Machine]) -> Iterable[Shortage]:
    """Yields what does not fit, certain ones first: each process into a GPU and into a machine, and all of them into
    all GPUs and all machines."""
    found = [
        *_too_small(processes, "gpu", [size for machine in machines for size in machine.gpu_bytes]),
        *_too_small(processes, "host", [machine.host_bytes for machine in machines]),
    ]
    free_bytes = sum(machine.free_bytes for machine in machines)
    if not found and _total(processes, "host") > free_bytes:
        items = _all_items(processes, "host")
        found.append(Shortage("this run needs more main memory than is free", items, free_bytes, is_certain=False))
    return sorted(found, key=lambda short: not short.is_certain)


def _too_small(processes: Sequence[Process], place: str, rooms: Sequence[int]) -> Iterable[Shortage]:
    """Of GPUs nothing is known where none is seen; what asks for them is then refused by Ray's count."""
    if not rooms:
        return
    words, taken = (
        ("GPU memory than a GPU has", CUDA_BYTES) if place == "gpu" else ("main memory than a machine has", 0)
    )
    room = max(rooms) - taken
    for process in processes:
        if (size := process.size_bytes(place)) > room:
            items = process.held(place)
            yield Shortage(f"{process.role} needs more {words}", items, room, size * (1 - MARGIN) > room)
    everyone = sum(process.count for process in processes if process.held(place))
    total, room = _total(processes, place), sum(rooms) - taken * everyone
    if total > room:
        words = "GPU memory than all GPUs have" if place == "gpu" else "main memory than there is"
        items = _all_items(processes, place)
        yield Shortage(f"this run needs more {words}", items, room, total * (1 - MARGIN) > room)


def _total(processes: Sequence[Process], place: str) -> int:
    return sum(process.count * process.size_bytes(place) for process in processes)


def _all_items(processes: Sequence[Process], place: str) -> tuple[Item, ...]:
    """Returns every item, times the processes that hold it, the largest first."""
    items = [
        Item(f"{item.name} ({process.count} x {process.role})", process.count * item.size_bytes, place, item.do)
        for process in processes
        for item in process.held(place)
    ]
    return tuple(sorted(items, key=lambda item: -item.size_bytes))


def check_here(recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Checks a run on this machine alone; with RAY_ADDRESS the cluster's nodes are asked once they are known."""
    if not head_address():
        check_memory(recipe, [this_machine()], warn)


def check_nodes(recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Asks every node of the cluster that this process has joined for its memory, and checks the run on them."""
    import ray
    from ray.exceptions import TaskUnschedulableError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask, machines = ray.remote(num_cpus=0)(this_machine), dict[str, Machine]()
    while nodes := [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in machines]:
        asked = {
            node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
            for node in nodes
        }
        for node, answer in asked.items():
            try:
                machines[node] = ray.get(answer, timeout=recipe.supervision.start_timeout_s)
            except TaskUnschedulableError:  # It has just come, or gone: schedulers hear of it a moment later.
                time.sleep(POLL_S)
    check_memory(recipe, list(machines.values()), warn)


def peak_numbers(recipe: Recipe, run_dir: Path) -> dict[str, str]:
    """Returns the estimate beside the most that was measured, for each role that a run's metrics tell of."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    numbers = {}
    for process in estimate(recipe) or []:
        peaks = [row[PEAKS[process.role]] for row in rows if PEAKS.get(process.role) in row]
        if peaks:
            estimated = process.size_bytes("gpu" if process.is_on_gpu else "host")
            words = f"{max(peaks) / GIB:.2f} GiB at its peak, {estimated / GIB:.2f} GiB by the estimate"
            numbers[f"memory of {process.role}"] = words
    return numbers
