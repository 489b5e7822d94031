"""A reward's own environment: what its pins change, laid over the main environment. Torch and most else are shared.

    asked for --> [locked] --> bare, over the main one --> pip --> tried --> marked as done: used by all from now on
                     |                                      |        |
                     |  another process makes it: wait      +--------+--> failed: pip's reason, or what cannot be
                     +--> marked meanwhile: done                          imported; removed

An environment is a virtual environment without pip of its own, whose .pth file adds the main one's packages after
its own. It lies in $SFUMATO_CACHE (or ~/.cache/sfumato), named after its pins and the main environment, so a change
of either makes a new one. What is not marked, because its making was killed, is made again. Pip ends with whoever
started it; where the system cannot see to that, it has inherited the lock, and the next one waits for its end.

Ray's own `runtime_env={"pip": ...}` would copy the main environment whole, and again for every local run.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cluster.bound import bound
from protocol.errors import RewardError
from protocol.roles import Reward
from rewards.loading import pins_of

SHARED = ("torch", "ray", "pydantic")
"""Packages that stay as they are: too large to have twice, or what a reward actor and the run speak through."""

TRIAL = "import numpy, pyarrow, pydantic, ray, torch"
"""What a reward actor needs whatever its reward is; Ray imports pyarrow where there is one."""

STEPS = ("waiting", "making", "trying", "Collecting", "Downloading", "Building", "Installing")
"""Beginnings of the lines that a person wants to see; pip has many more to say."""

MARK = "environment.json"
LONGEST_REASON = 25


@dataclass(frozen=True)
class Environment:
    """Where an environment is, or will be. The folder is the same on every node.

    A worked example: Environment("image_reward", ("image-reward==1.5", "timm==0.6.13"),
    Path("/home/ada/.cache/sfumato/environments/5d41402abc4b2a76")).
    """

    label: str
    pins: tuple[str, ...]
    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        """Where pip installs what the pins change."""
        return Path(sysconfig.get_path("purelib", "venv", vars={"base": str(self.folder)}))

    @property
    def log(self) -> Path:
        """All that pip said when it was last made."""
        return self.folder.with_suffix(".log")

    def size_bytes(self) -> int | None:
        """Returns its size on disk, None where it is not made yet on this machine."""
        try:
            mark = json.loads((self.folder / MARK).read_text())
        except (OSError, ValueError):
            return None
        return int(mark["size_bytes"]) if mark["main"] == _main_digest() else None


def cache_folder() -> Path:
    """Returns where environments are kept. Deleting it is safe while no run is on."""
    root = os.environ.get("SFUMATO_CACHE") or "~/.cache/sfumato"
    return Path(root).expanduser().absolute() / "environments"


def environment_of(label: str, pins: Sequence[str]) -> Environment:
    """Returns the environment for some pins on top of this process's; makes nothing."""
    key = json.dumps([sorted(pins), _main_digest()])
    return Environment(label, tuple(pins), cache_folder() / hashlib.sha256(key.encode()).hexdigest()[:16])


def prepare(
    rewards: Sequence[Reward], tell: Callable[[str], None], *, debug: bool = False
) -> dict[str, dict[str, Any]]:
    """Makes the environments of those rewards that have pins, on every node that is alive.

    Returns label -> what their actors' `runtime_env` must hold; nothing for rewards of the main environment. Raises
    RewardError with pip's own reason. Ray must be connected; nodes that join later have none of them.
    """
    environments = [environment_of(reward.label, pins) for reward in rewards if (pins := pins_of(reward))]
    for environment in environments:
        for line in _make_everywhere(environment):
            if debug or line.startswith(STEPS):
                tell(f"installing {environment.label}'s environment: {line}")
    # Ray hands it to a shell.
    return {each.label: {"py_executable": shlex.quote(str(each.python))} for each in environments}


def make(environment: Environment) -> Iterator[str]:
    """Makes an environment on this machine unless it is there, yielding what is being done. Raises RewardError."""
    if environment.size_bytes() is not None:
        return
    with _lock_file(environment) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield "waiting for another process that makes it"
            fcntl.flock(lock, fcntl.LOCK_EX)
        if environment.size_bytes() is not None:
            return
        shutil.rmtree(environment.folder, ignore_errors=True)
        try:
            yield f"making it in {environment.folder}"
            _lay_over_main(environment)
            yield from _install(environment, lock)
            _complete_numpy(environment.site_packages / "numpy")
            yield "trying whether its packages go with Ray's and torch"
            _try(environment)
            _mark(environment)
        finally:
            if environment.size_bytes() is None:
                shutil.rmtree(environment.folder, ignore_errors=True)


def _make_everywhere(environment: Environment) -> Iterator[str]:
    import ray
    from ray.exceptions import RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    remote = ray.remote(num_cpus=0, max_retries=0)(make)
    at_work = [
        remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(environment)
        for node in others
    ]
    yield from make(environment)
    try:
        for lines in at_work:
            for line in lines:
                yield ray.get(line)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, RewardError) else error) from None


@functools.cache
def _main_digest() -> str:
    """Names this process's environment: its interpreter, its folders and what is installed there."""
    folders = [Path(folder) for folder in _main_folders()]
    installed = sorted(entry.name for folder in folders for entry in folder.glob("*-info"))
    said = json.dumps([platform.python_version(), sys.base_prefix, *map(str, folders), *installed])
    return hashlib.sha256(said.encode()).hexdigest()


def _main_folders() -> list[str]:
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [folder for folder in (*user, *site.getsitepackages()) if os.path.isdir(folder)]


def _lock_file(environment: Environment) -> IO[str]:
    try:
        environment.folder.parent.mkdir(parents=True, exist_ok=True)
        return environment.folder.with_suffix(".lock").open("w")
    except OSError as error:
        raise RewardError(
            f"the environment of {environment.label} cannot be made: {error.strerror}",
            value=str(environment.folder),
            expected="a folder that can be written, on every node",
            do="set SFUMATO_CACHE to such a folder",
        ) from None


def _is_installed(name: str) -> bool:
    """By its metadata: looking for the module itself sets off setuptools' replacement of distutils."""
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _lay_over_main(environment: Environment) -> None:
    """Makes it without pip where the main one has pip, which then serves both."""
    without_pip = ["--without-pip"] if _is_installed("pip") else []
    command = [sys.executable, "-m", "venv", *without_pip, str(environment.folder)]
    done = subprocess.run(bound(command), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RewardError(
            f"the environment of {environment.label} cannot be made: {(done.stdout + done.stderr).strip()}",
            expected="a Python with its venv module, and pip",
        )
    # In this order, and with the .pth files of the main one, by which editable packages are found.
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in _main_folders()]
    (environment.site_packages / "sfumato-main.pth").write_text("".join(lines))
    constraints = [f"{name}=={importlib.metadata.version(name)}\n" for name in SHARED]
    (environment.folder / "constraints.txt").write_text("".join(constraints))


def _install(environment: Environment, lock: IO[str]) -> Iterator[str]:
    """Runs pip, which finds the main environment's packages and installs what they do not satisfy."""
    options = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    constraints = ["--constraint", str(environment.folder / "constraints.txt")]
    command = [str(environment.python), "-P", "-m", "pip", "install", *options, *constraints, "--", *environment.pins]
    told = []
    with (
        environment.log.open("w") as log,
        subprocess.Popen(
            bound(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),
            text=True,
            errors="replace",
        ) as pip,
    ):
        try:
            for line in pip.stdout or ():
                log.write(line)
                told.append(line.rstrip())
                if line.strip():
                    yield line.strip()
        except BaseException:
            pip.kill()
            raise
    if pip.returncode:
        raise RewardError(
            f"the environment of {environment.label} cannot be installed; pip says:\n{_reason(told)}\n"
            f"All that pip said is in {environment.log}",
            value=environment.pins,
            expected=f"pins that go together, and with {', '.join(SHARED)} as the main environment has them",
        )


def _reason(lines: list[str]) -> str:
    """Returns pip's words from its first error on, shortened in the middle."""
    first = next((n for n, line in enumerate(lines) if line.lower().lstrip().startswith("error:")), -LONGEST_REASON)
    reason = [line for line in lines[first:] if line.strip()]
    if len(reason) > LONGEST_REASON:
        reason = [*reason[:5], "...", *reason[5 - LONGEST_REASON :]]
    return "\n".join(f"    {line}" for line in reason)


def _complete_numpy(numpy: Path) -> None:
    """NumPy 1.26 has stubs of NumPy 2's modules, to read its pickles, but not the one that arrays in Ray's object store
    name; older ones have none."""
    for name in ("numeric", "multiarray"):
        stub = numpy / "_core" / f"{name}.py"
        if (numpy / "core" / f"{name}.py").is_file() and not stub.exists():
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(f"import sys\n\nimport numpy.core.{name}\n\nsys.modules[__name__] = numpy.core.{name}\n")


def _try(environment: Environment) -> None:
    done = subprocess.run(bound([environment.python, "-P", "-c", TRIAL]), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RewardError(
            f"the environment of {environment.label} is installed, but no actor can run in it: {reason}",
            value=environment.pins,
            expected=f"an environment in which `{TRIAL}` works",
            do="add a pin that mends it: with numpy<2, for example, pyarrow<22",
        )


def _mark(environment: Environment) -> None:
    size_bytes = sum(file.lstat().st_size for file in environment.folder.rglob("*"))
    mark = {"pins": environment.pins, "main": _main_digest(), "size_bytes": size_bytes}
    unfinished = environment.folder / f"{MARK}.tmp"
    unfinished.write_text(json.dumps(mark, indent=1))
    unfinished.rename(environment.folder / MARK)
