"""What `sfumato doctor` says of the machine. Nothing heavy is imported into this process: a broken torch, torchvision
or diffusers is a finding, not the end of the examination."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.doctor.finding import Finding, Verdict, guarded
from cluster.doctor.packages import TorchFacts, check_imports, check_packages, torch_facts
from cluster.ray_head import check_head, head_address
from protocol.errors import RedisError, TrainingError
from protocol.memory import PROCESS_BYTES, estimate
from protocol.paths import ROOT, model_source
from protocol.recipe import Full, Recipe

GIB = 2**30
LEAST_BYTES = GIB
"""Below this much free memory or disk nothing can be started."""

ROOMY_BYTES = 4 * GIB
DISK_TIMES_WEIGHTS = 8
"""A checkpoint of full fine-tuning, in sizes of a half-precision U-Net: DeepSpeed's fp32 master and moments, their
consolidated copy, and the published bytes."""


def machine_findings(recipe: Recipe | None, run_folder: Path) -> Iterator[Finding]:
    """Examines this machine, for a recipe where there is one. Starts and ends a Redis server; leaves nothing behind."""
    facts = torch_facts()
    yield from guarded("system", lambda: [check_system()])
    yield from guarded("GPU", lambda: [check_gpu(facts, driver_gpus(), recipe)])
    yield from guarded("NCCL", lambda: [check_nccl(facts, recipe)])
    yield from guarded("imports", lambda: check_imports(facts))
    yield from guarded("packages", lambda: check_packages(ROOT / "constraints.txt"))
    yield from guarded("Redis", lambda: [check_redis_server(recipe)])
    yield from guarded("Ray", lambda: [check_ray()])
    yield from guarded("cores", lambda: [check_cores(recipe, num_cores())])
    yield from guarded("memory", lambda: [check_memory(recipe, free_memory_bytes())])
    yield from guarded("disk", lambda: [check_disk(recipe, run_folder)])
    yield from guarded("/dev/shm", lambda: [check_shared_memory(Path("/dev/shm"))])
    yield from guarded("cache", check_caches)


def driver_gpus() -> list[str]:
    """Returns what NVIDIA's driver says of each GPU: name, total and free MiB, version."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = "--query-gpu=name,memory.total,memory.free,driver_version"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=60, check=False
    )
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def check_system() -> Finding:
    """Linux, and a Python that is new enough."""
    found = f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    if platform.system() != "Linux":
        return Finding("system", "warning", found, do="sfumato is tested on Linux only")
    return Finding("system", "ok", found)


def check_gpu(facts: TorchFacts, driver: list[str], recipe: Recipe | None) -> Finding:
    """What the driver shows, what torch can use of it, and what the recipe asks for."""
    wanted = wanted_gpus(recipe)
    if facts["torch"] is None:
        return Finding("GPU", "warning", "unknown, since torch cannot be imported", do="see imports")
    build = f"torch {facts['torch']}, " + (f"CUDA {facts['cuda']}" if facts["cuda"] else "a build for CPUs")
    if not facts["gpus"]:
        return _no_gpu(build, facts["cuda"], driver, wanted)
    found = f"{'; '.join(driver or facts['gpus'])} ({build})"
    without = sorted(set(facts["capabilities"]) - _served(facts["kernels"]))
    if without:
        do = "install the build of torch that is made for this GPU"
        return Finding("GPU", "error", f"{found}; torch has no kernels for {', '.join(without)}", do=do)
    if recipe and any(learner.precision == "bf16" for learner in recipe.learners) and not facts["bf16"]:
        return Finding("GPU", "error", f"{found}; no bf16", do="set learner.precision=fp32")
    if wanted > len(facts["gpus"]):
        do = "join other machines to the Ray cluster, or lower rollouts, learner.world_size or num_gpus"
        return Finding("GPU", "warning", f"{found}; the recipe's roles ask for {wanted:g} GPUs", do=do)
    return Finding("GPU", "ok", found)


def _no_gpu(build: str, cuda: str | None, driver: list[str], wanted: float) -> Finding:
    verdict: Verdict = "error" if wanted else "warning"
    if driver and cuda is None:
        do = "install a CUDA build of the same torch (https://pytorch.org/get-started/locally)"
        return Finding("GPU", verdict, f"{'; '.join(driver)}, but {build} cannot use it", do=do)
    if driver:
        do = "update the driver to what this CUDA needs, or unset CUDA_VISIBLE_DEVICES"
        return Finding("GPU", verdict, f"{'; '.join(driver)}, but {build} does not see it", do=do)
    if wanted:
        do = "right for a head node without GPUs; otherwise set num_gpus=0 of the roles, or mend the driver"
        return Finding("GPU", "warning", f"none ({build}); the recipe's roles ask for {wanted:g}", do=do)
    return Finding("GPU", "ok", f"none; everything computes on CPUs ({build})")


def _served(kernels: list[str]) -> set[str]:
    """Returns capabilities that a torch build serves: kernels of a generation run on all its later minor versions."""
    numbers = [int(name.removeprefix("sm_")) for name in kernels if name.removeprefix("sm_").isdigit()]
    return {f"sm_{number // 10 * 10 + minor}" for number in numbers for minor in range(number % 10, 10)}


def check_nccl(facts: TorchFacts, recipe: Recipe | None) -> Finding:
    """Learner ranks on GPUs talk through NCCL, those on CPUs through gloo."""
    on_gpus = recipe is not None and any(learner.num_gpus > 0 for learner in recipe.learners)
    if facts["torch"] is None:
        return Finding("NCCL", "warning", "unknown, since torch cannot be imported", do="see imports")
    if facts["nccl"]:
        return Finding("NCCL", "ok", f"NCCL {facts['nccl']}")
    if facts["gpus"] and on_gpus:
        return Finding("NCCL", "error", "this torch has no NCCL", do="install the official CUDA build of torch")
    if not facts["gloo"]:
        return Finding("NCCL", "error", "neither NCCL nor gloo", do="install the official build of torch")
    return Finding("NCCL", "ok", "not needed without GPUs; ranks on CPUs talk through gloo")


def check_redis_server(recipe: Recipe | None) -> Finding:
    """The recipe's server answers and is fit, or one of our own can be started."""
    from cluster.redis_server import RedisServer
    from protocol.stream import connect, redacted_url, server_facts, url_of

    try:
        if recipe is not None and recipe.redis.url is not None:
            from cluster.driver import check_redis

            check_redis(recipe)
            url = url_of(recipe.redis.url)
            with connect(url, timeout_s=recipe.redis.timeout_s) as client:
                return _describe_redis(server_facts(client), redacted_url(url))
        with (
            tempfile.TemporaryDirectory() as folder,
            RedisServer(Path(folder)) as server,
            connect(server.url, timeout_s=10.0) as client,
        ):
            return _describe_redis(server_facts(client), "our own, started and ended")
    except RedisError as error:
        return Finding("Redis", "error", str(error), do="see above")


def check_ray() -> Finding:
    """The cluster that runs are to join answers."""
    address = head_address()
    if address is None:
        return Finding("Ray", "ok", "RAY_ADDRESS names no cluster; each run starts a Ray of its own")
    try:
        check_head()
    except TrainingError as error:
        return Finding("Ray", "error", str(error), do="see above")
    return Finding("Ray", "ok", f"the head at {address} answers")


def _describe_redis(servers: Sequence[Any], where: str) -> Finding:
    limits = [limit for facts in servers if (limit := int(facts["maxmemory"]))]
    policies = {str(facts["maxmemory_policy"]) for facts in servers}
    many = f"{len(servers)} servers, " if len(servers) > 1 else ""
    found = f"{servers[0]['redis_version']} ({where}), {many}{', '.join(sorted(policies))}, "
    found += f"maxmemory {min(limits) / GIB:.2f} GiB" if limits else "no memory limit"
    if policies != {"noeviction"}:
        return Finding("Redis", "warning", found, do="run CONFIG SET maxmemory-policy noeviction on the server")
    return Finding("Redis", "ok", found)


def check_cores(recipe: Recipe | None, cores: int) -> Finding:
    """Rollouts and learner ranks mostly take turns, so each role by itself should find a core for every thread."""
    found = f"{cores} cores for this process"
    set_threads = os.environ.get("OMP_NUM_THREADS")
    found += f", OMP_NUM_THREADS={set_threads}" if set_threads else ""
    if recipe is None:
        return Finding("cores", "ok", found)
    threads = {
        "rollouts": recipe.rollouts.min * recipe.rollout_worker.threads,
        "the learner": recipe.learner.world_size * recipe.learner.threads,
    }
    found += "; " + ", ".join(f"{name}: {number} threads" for name, number in threads.items())
    if max(threads.values()) > cores:
        do = "lower rollouts, learner.world_size or threads, or start more nodes; the weights do not depend on rollouts"
        return Finding("cores", "warning", found, do=do)
    return Finding("cores", "ok", found)


def check_memory(recipe: Recipe | None, free_bytes: int) -> Finding:
    """Free memory against what the processes of a run are estimated to hold of it."""
    found, needed = f"{free_bytes / GIB:.1f} GiB free", 0
    if recipe is not None:
        needed = _needed_memory(recipe)
        found += f"; the run needs some {needed / GIB:.1f} GiB"
    if free_bytes < LEAST_BYTES:
        return Finding("memory", "error", found, do="end other programs")
    if free_bytes < max(needed, ROOMY_BYTES):
        do = "end other programs, lower rollouts or learner.world_size, or use a larger machine"
        return Finding("memory", "warning", found, do=do)
    return Finding("memory", "ok", found)


def _needed_memory(recipe: Recipe) -> int:
    """Of a model that is not on disk yet only the libraries are known."""
    processes = estimate(recipe)
    if processes is None:
        return PROCESS_BYTES * (recipe.rollouts.min + sum(learner.world_size for learner in recipe.learners))
    return sum(process.count * process.size_bytes("host") for process in processes)


def check_disk(recipe: Recipe | None, run_folder: Path) -> Finding:
    """The folder that runs go to can be written and holds the checkpoints that are kept."""
    folder = _nearest(run_folder)
    free_bytes = shutil.disk_usage(folder).free
    found, needed = f"{free_bytes / GIB:.1f} GiB free for {run_folder}", 0
    if not _can_write(folder):
        return Finding("disk", "error", f"{folder} cannot be written", do="give --run-dir in a folder of yours")
    if recipe is not None and isinstance(recipe.model.trainable, Full):
        weights = folder_bytes(model_source(recipe.model.path), "unet")
        needed = (recipe.checkpoints.keep_last + 1) * DISK_TIMES_WEIGHTS * weights
        found += f"; checkpoints need some {needed / GIB:.1f} GiB"
    if free_bytes < LEAST_BYTES:
        return Finding("disk", "error", found, do="free some, or give --run-dir on another disk")
    if free_bytes < max(needed, ROOMY_BYTES):
        return Finding("disk", "warning", found, do="free some, or lower checkpoints.keep_last")
    return Finding("disk", "ok", found)


def check_shared_memory(folder: Path) -> Finding:
    """Ray keeps its objects there; where it is too small, on a disk, which is slow."""
    if not folder.is_dir():
        return Finding("/dev/shm", "warning", "not there: Ray's object store will be on a disk", do="mount a tmpfs")
    free_bytes = shutil.disk_usage(folder).free
    found = f"{free_bytes / GIB:.1f} GiB free for Ray's object store"
    if free_bytes < LEAST_BYTES:
        do = "start the container with --shm-size=4g or --ipc=host"
        return Finding("/dev/shm", "warning", found, do=do)
    return Finding("/dev/shm", "ok", found)


def check_caches() -> Iterator[Finding]:
    """Where rewards' environments and models of the hub are kept can be written."""
    folders = {
        "SFUMATO_CACHE": Path(os.environ.get("SFUMATO_CACHE") or "~/.cache/sfumato"),
        "HF_HOME": Path(os.environ.get("HF_HOME") or "~/.cache/huggingface"),
    }
    for variable, folder in folders.items():
        path = folder.expanduser().absolute()
        if _can_write(_nearest(path)):
            yield Finding(variable, "ok", f"{path} can be written")
        else:
            yield Finding(variable, "error", f"{path} cannot be written", do=f"set {variable} to a folder that can be")


def wanted_gpus(recipe: Recipe | None) -> float:
    """Returns how many GPUs a recipe's roles ask for in all."""
    if recipe is None:
        return 0.0
    learners = sum(learner.num_gpus * learner.world_size for learner in recipe.learners)
    rewards = sum(reward.num_gpus * reward.replicas for reward in recipe.scored_rewards)
    return learners + rewards + recipe.rollout_worker.num_gpus * recipe.rollouts.min


def num_cores() -> int:
    """Returns how many cores this process may use: its affinity, and its container's quota."""
    cores = len(os.sched_getaffinity(0))
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return max(1, min(cores, math.ceil(int(quota[0]) / int(quota[1]))))
    return cores


def free_memory_bytes() -> int:
    """Returns what may still be taken: of the machine's memory, and of the container's limit."""
    lines = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def total_memory_bytes() -> int:
    """Returns the machine's memory, or the container's limit."""
    lines = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)
    total, limit = int(lines["MemTotal"].split()[0]) * 1024, _read("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def folder_bytes(source: str, part: str = "") -> int:
    """Returns the size of a model folder's safetensors files; 0 for a hub id, which is not looked up."""
    return sum(file.stat().st_size for file in (Path(source) / part).rglob("*.safetensors"))


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _nearest(path: Path) -> Path:
    """Returns the folder itself, or the nearest one above it that exists."""
    path = path.expanduser().absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
