"""Finding a reward by name, file or dotted path, and building it. There is no registry: a name is a module."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from protocol.errors import RewardError
from protocol.paths import ROOT
from rewards.contract import ScoreFunction

FOLDER = Path(__file__).resolve().parent
HELPERS = ("__init__", "composition", "contract", "loading")
OURS = ("protocol", "diffusion", "rewards", "actors", "learner", "cluster")
FORMS = "a built-in reward's name, ./file.py:Name, or a dotted path package.module:Name"


def builtin_names() -> list[str]:
    """Returns the names of the rewards that come with sfumato: the modules of this folder."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in HELPERS)


def build(spec: str, kwargs: Mapping[str, Any]) -> ScoreFunction:
    """Returns a reward's score function: an instance of a class, or a function with its keyword arguments bound.

    Raises RewardError, quoting what the class itself raised.
    """
    found = resolve(spec)
    if not inspect.isclass(found):
        return functools.partial(found, **kwargs)
    try:
        made = found(**kwargs)
    except RewardError:
        raise
    except Exception as error:  # a constructor of any author may raise anything
        raise RewardError(
            f"the reward {spec} cannot be built: {type(error).__name__}: {error}",
            value=dict(kwargs),
            expected=f"keyword arguments of {found.__name__}{_signature(found)}",
        ) from error
    if not callable(made):
        raise RewardError(
            f"the reward {spec} makes objects that cannot be called",
            expected="a class with __call__(self, images, prompts)",
        )
    score: ScoreFunction = made
    return score


def check_exists(spec: str) -> None:
    """Raises RewardError for a built-in name or a file that is not there, without importing anything."""
    path, separator, _ = spec.rpartition(":")
    if separator and path.endswith(".py"):
        _file(spec, path)
    elif not separator and "." not in spec:
        _check_builtin(spec)


def resolve(spec: str) -> Callable[..., Any]:
    """Returns the class or function that a spec names. Raises RewardError saying what to do."""
    path, separator, name = spec.rpartition(":")
    if separator and path.endswith(".py"):
        return _attribute(_load_file(spec, path), name, spec)
    if separator:
        return _attribute(_import(spec, path), name, spec)
    if "." in spec:
        module, _, name = spec.rpartition(".")
        return _attribute(_import(spec, module), name, spec)
    return _builtin(spec)


def _builtin(name: str) -> Callable[..., Any]:
    _check_builtin(name)
    class_name = "".join(part.capitalize() for part in name.split("_"))
    return _attribute(importlib.import_module(f"rewards.{name}"), class_name, name)


def _check_builtin(name: str) -> None:
    names = builtin_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        raise RewardError(
            "there is no built-in reward of this name" + (f"; did you mean {close[0]}?" if close else ""),
            value=name,
            expected=f"one of {', '.join(names)}; or ./file.py:Name; or package.module:Name",
        )


def _file(spec: str, path: str) -> Path:
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise RewardError(
            f"the reward's file {file} does not exist",
            value=spec,
            expected=f"a path relative to {Path.cwd()}, or an absolute one",
        )
    return file


def _load_file(spec: str, path: str) -> ModuleType:
    """Loads a file under a private name: a user's rewards.py must not become our package, nor hide it."""
    file = _file(spec, path)
    private_name = f"_sfumato_reward_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if private_name in sys.modules:
        return sys.modules[private_name]
    module_spec = importlib.util.spec_from_file_location(private_name, file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[private_name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        del sys.modules[private_name]
        raise RewardError(
            f"the reward's file {file} cannot be imported: {type(error).__name__}: {error}", value=spec
        ) from error
    return module


def _import(spec: str, module: str) -> ModuleType:
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.append(working_directory)  # Last, so that nothing there hides a package of ours.
    try:
        return importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything
        advice = "check the path, or give the file as ./file.py:Name"
        if module.split(".")[0] in OURS:
            advice = f"{module.split('.')[0]} is a package of sfumato's; give your own file as ./file.py:Name"
        raise RewardError(
            f"the reward's module {module} cannot be imported: {type(error).__name__}: {error}",
            value=spec,
            expected=FORMS,
            do=advice,
        ) from error


def _attribute(module: ModuleType, name: str, spec: str) -> Callable[..., Any]:
    found = getattr(module, name, None)
    if callable(found):
        target: Callable[..., Any] = found
        return target
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    ours = module.__name__.split(".")[0] in OURS and Path(str(module.__file__)).is_relative_to(ROOT)
    raise RewardError(
        f"{module.__file__} has no class or function {name}",
        value=spec,
        expected=f"one of {', '.join(sorted(public)) or '(it has none)'}",
        do="give your own file as ./file.py:Name" if ours else "correct the name after the colon",
    )


def _signature(found: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(found))
    except (TypeError, ValueError):
        return "(...)"
