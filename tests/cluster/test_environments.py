"""Rewards' own environments: real pip, packages from a folder of ours, and a real Ray actor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.environments import MARK, Environment, environment_of, make, prepare
from protocol.errors import RewardError
from protocol.paths import ROOT
from protocol.roles import Reward
from tests.cluster.package_shelf import add_package

# hjson stands for a package that the main environment has too, in another version.
PINS = ("hjson==0.0.1",)
REWARD = """
'''How old hjson is.'''
PINS = ("hjson==0.0.1",)

class Age:
    def __call__(self, images, prompts):
        import hjson
        return images.mean(axis=(1, 2, 3)) + hjson.age
"""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty cache, and a pip that sees our packages only."""
    shelf = tmp_path_factory.mktemp("shelf")
    add_package(shelf, "hjson", "0.0.1", "age = 1000.0\n")
    add_package(shelf, "old_model", "1.0", "", requires="torch<2")
    add_package(shelf, "pyarrow", "0.1", "raise ImportError('this pyarrow is too old for anything')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(shelf))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def made() -> Environment:
    """An environment that is there, with what its making said."""
    environment = environment_of("age", PINS)
    assert environment.size_bytes() is None
    first, second = make(environment), make(environment)
    assert next(first).startswith("making it in")
    # Whoever comes while it is being made waits, and then uses what was made.
    assert next(second) == "waiting for another process that makes it"
    assert "Successfully installed hjson-0.0.1" in list(first)
    assert list(second) == []
    return environment


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray as a run starts it."""
    hook = {"worker_process_setup_hook": "sfumato.set_up_ray_worker"}
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", runtime_env=hook)
    try:
        yield
    finally:
        ray.shutdown()


def run(environment: Environment, code: str) -> str:
    """What the environment's interpreter prints."""
    command = [str(environment.python), "-P", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_pins_lie_over_the_main_environment_and_all_else_is_shared(made: Environment) -> None:
    code = "import importlib.metadata as m, importlib.util as u; print(m.version('hjson'), u.find_spec('torch').origin)"
    torch = find_spec("torch")
    assert torch is not None
    assert run(made, f"{code}; import hjson, sfumato; print(hjson.age, sfumato.__file__)").split() == [
        *("0.0.1", str(torch.origin)),
        *("1000.0", str(ROOT / "sfumato.py")),
    ]
    assert version("hjson") != "0.0.1"
    size_bytes = made.size_bytes()
    assert size_bytes is not None
    assert size_bytes < 1e6


def test_what_is_there_is_used_as_it_is(made: Environment) -> None:
    before = (made.folder / MARK).stat().st_mtime_ns
    assert list(make(environment_of("another", PINS))) == []
    assert (made.folder / MARK).stat().st_mtime_ns == before


def test_an_environment_is_named_by_its_pins_whatever_their_order() -> None:
    one, two = environment_of("a", ("x==1", "y==2")), environment_of("b", ("y==2", "x==1"))
    assert one.folder == two.folder != environment_of("a", ("x==1",)).folder


def test_an_environment_over_another_main_one_is_made_again(made: Environment) -> None:
    mark = made.folder / MARK
    text = mark.read_text()
    mark.write_text(text.replace('"main": "', '"main": "0'))
    assert made.size_bytes() is None
    mark.write_text(text)
    assert made.size_bytes() is not None


def test_an_environment_whose_making_was_killed_is_made_again() -> None:
    environment = environment_of("killed", ("hjson", "hjson==0.0.1"))
    making = "[print(line, flush=True) for line in make(environment_of('killed', sys.argv[1:]))]"
    code = f"import sys; from cluster.environments import environment_of, make; {making}"
    command = [sys.executable, "-c", code, *environment.pins]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        while "hjson" not in process.stdout.readline():
            pass
        os.kill(process.pid, signal.SIGKILL)
    assert environment.folder.exists()
    assert environment.size_bytes() is None
    again = (line for line in make(environment) if not line.startswith("waiting"))
    assert next(again).startswith("making it in")
    again.close()


def test_what_is_given_up_leaves_nothing(made: Environment) -> None:
    environment = environment_of("given up", (*PINS, "hjson"))
    lines = make(environment)
    next(lines)
    assert environment.folder.parent.exists()
    lines.close()
    assert not environment.folder.exists()


@pytest.mark.parametrize(
    ("pin", "told"),
    [
        ("no_such_package==1", r"pip says:\n +ERROR: .* no_such_package==1"),
        ("what is this", r"pip says:\n +ERROR: Invalid requirement: 'what is this'"),
        ("torch==1.0", r"(?s)pip says:.* torch==1.0.*constraint\) torch=="),
        ("old_model", r"(?s)pip says:.*old-model 1.0 depends on torch<2.*constraint\) torch=="),
        ("pyarrow==0.1", "no actor can run in it: ImportError: this pyarrow is too old for anything"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason_and_leaves_nothing(pin: str, told: str) -> None:
    environment = environment_of("odd", (pin,))
    with pytest.raises(RewardError, match=told) as caught:
        list(make(environment))
    assert "the environment of odd" in str(caught.value)
    assert str((pin,)) in str(caught.value)
    assert not environment.folder.exists()


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "file"))
    with pytest.raises(RewardError, match=r"Not a directory.*set SFUMATO_CACHE"):
        list(make(environment_of("a", PINS)))


def test_an_actor_runs_in_its_rewards_environment_beside_those_of_the_main_one(tmp_path: Path) -> None:
    class Scoring:
        """Sent by value, since workers cannot import a test's module."""

        def score(self, spec: str, images: Any) -> Any:
            from rewards.loading import build

            return build(spec, {})(images, ["p"] * len(images))

        def refuse(self) -> None:
            raise RewardError("refused", value=3)

    file = tmp_path / "mine.py"
    file.write_text(REWARD)
    own, none = Reward(name=f"{file}:Age"), Reward(name=f"{file}:Age", pins=())
    with local_ray():
        told: list[str] = []
        assert prepare([none], told.append) == {}
        additions = prepare([own], told.append)
        assert additions.keys() == {"Age"}
        assert all(line.startswith("installing Age's environment: ") for line in told)
        options = {"env_vars": {"OMP_NUM_THREADS": "1"}, **additions["Age"]}
        actor = ray.remote(Scoring).options(num_cpus=1, runtime_env=options).remote()
        images = np.full((3, 4, 4, 3), 7, np.uint8)
        assert list(ray.get(actor.score.remote(own.name, ray.put(images)), timeout=60)) == [1007.0] * 3
        with pytest.raises(RewardError, match=r"refused\. Got: 3"):
            ray.get(actor.refuse.remote())
        # The main environment's hjson has no age.
        other = ray.remote(Scoring).options(num_cpus=1).remote()
        with pytest.raises(AttributeError, match="age"):
            ray.get(other.score.remote(none.name, images), timeout=60)


@pytest.mark.slow
def test_arrays_pass_between_numpy_2_and_numpy_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the registry. What crosses has to be read by both: pickles of NumPy 2 name modules that NumPy 1 lacks."""
    monkeypatch.delenv("PIP_NO_INDEX")
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\n"
        "def old(images, prompts):\n"
        "    assert np.__version__ == '1.26.4'\n"
        "    return images.mean(axis=(1, 2, 3))\n"
    )
    reward = Reward(name=f"{file}:old", pins=("numpy==1.26.4", "pyarrow<22"))

    class Scoring:
        def score(self, images: Any) -> Any:
            from rewards.loading import build

            return build(reward.name, {})(images, [""] * len(images))

    with local_ray():
        additions = prepare([reward], lambda _: None)
        actor = ray.remote(Scoring).options(runtime_env=additions["old"]).remote()
        images = np.full((2, 64, 64, 3), 9, np.uint8)
        with warnings.catch_warnings():
            # NumPy 2 says that pickles of NumPy 1 name modules of old.
            warnings.simplefilter("ignore", DeprecationWarning)
            scores = ray.get(actor.score.remote(ray.put(images)), timeout=120)
        assert scores.tolist() == [9.0, 9.0]
