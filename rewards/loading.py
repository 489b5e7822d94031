"""Finding a reward by name, file or dotted path, and building it. There is no registry: a name is a module.

What a reward's file declares of itself is read from its syntax tree, since its imports may only work in the
environment that its own PINS make:

    '''Sharpness of an image by an edge detector.'''           the summary: the first line of the docstring
    PINS = ("opencv-python-headless==4.10.0.84",)              absent or empty: the main environment
    DOWNLOADS = "28 MB: some/repository weights.safetensors"   absent: nothing
    IMAGE_SIZE = 32                                            absent: images of any size
    EXAMPLE_PROMPT = 'a sign that says "Open"'                 absent: prompts of any form
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from protocol.errors import RewardError
from protocol.paths import ROOT
from protocol.roles import Reward
from rewards.contract import ScoreFunction

FOLDER = Path(__file__).resolve().parent
OURS = ("protocol", "diffusion", "rewards", "actors", "learner", "cluster")
FORMS = "a built-in reward's name, ./file.py:Name, or a dotted path package.module:Name"


@dataclass(frozen=True)
class Declaration:
    """What a reward's file says of itself. The driver reads it, and `sfumato rewards list` shows it.

    A worked example: Declaration(("image-reward==1.5", "transformers==4.40.2"), "1.8 GB: THUDM/ImageReward",
    "0.2 GB", "How people would rate an image.", None, "").
    """

    pins: tuple[str, ...] = ()
    """Packages of an environment of its own; empty: it runs in the main one."""
    downloads: str = ""
    """What the reward fetches when it is first built, with its size; empty: nothing."""
    environment: str = ""
    """The size on disk of what the pins install; empty: not said."""
    summary: str = ""
    """The first line of the module's docstring."""
    image_size: int | None = None
    """The only height and width that it can judge, in pixels; None: any."""
    example_prompt: str = ""
    """A prompt of the form that it needs, to try it with; empty: any will do."""


def builtin_names() -> list[str]:
    """Returns the names of the rewards that come with sfumato: this folder's modules with a class of their name whose
    objects are called."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if _class_of(file.stem) in _callable_classes(file))


def declared(spec: str) -> Declaration:
    """Returns what the file of a reward declares, without importing any of it. Raises RewardError.

    A dotted path whose source is not found on `sys.path` declares nothing.
    """
    file = source_of(spec)
    if file is None:
        return Declaration()
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise RewardError(f"the reward's file {file} cannot be read: {error}", value=spec) from None
    pins = _literal(tree, "PINS", (tuple, list), file, "a tuple of what pip installs, such as ('timm==1.0.31',)")
    if not all(isinstance(pin, str) for pin in pins or ()):
        raise RewardError(f"PINS in {file} are not all text", value=pins, expected="such as ('timm==1.0.31',)")
    return Declaration(
        pins=tuple(pins or ()),
        environment=_literal(tree, "ENVIRONMENT", (str,), file, "text: the size of what PINS install") or "",
        downloads=_literal(tree, "DOWNLOADS", (str,), file, "text: the size and what") or "",
        summary=(ast.get_docstring(tree) or "").partition("\n")[0],
        image_size=_literal(tree, "IMAGE_SIZE", (int,), file, "pixels"),
        example_prompt=_literal(tree, "EXAMPLE_PROMPT", (str,), file, "text") or "",
    )


def pins_of(reward: Reward) -> tuple[str, ...]:
    """Returns the packages of a reward's own environment: the recipe's, or else what its file declares."""
    return declared(reward.name).pins if reward.pins is None else reward.pins


def build(spec: str, kwargs: Mapping[str, Any], device: str = "cpu") -> ScoreFunction:
    """Returns a reward's score function: an instance of a class, or a function with its keyword arguments bound.

    What has a parameter `device` gets it, unless `kwargs` does. Raises RewardError, quoting what the class raised.
    """
    found = resolve(spec)
    arguments = {"device": device, **kwargs} if "device" in _parameters(found) else kwargs
    if not inspect.isclass(found):
        # With its attributes, since `is_pure` and `group_wise` may be among them.
        return functools.update_wrapper(functools.partial(found, **arguments), found)
    try:
        made = found(**arguments)
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
    source_of(spec)


def source_of(spec: str) -> Path | None:
    """Returns the file of a reward, found without importing anything; None for a dotted path that is not on `sys.path`.

    Raises RewardError for a built-in name or a file that is not there.
    """
    path, separator, _ = spec.rpartition(":")
    if separator and path.endswith(".py"):
        return _file(spec, path)
    if not separator and "." not in spec:
        _check_builtin(spec)
        return FOLDER / f"{spec}.py"
    return _module_source(path if separator else spec.rpartition(".")[0])


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
    return _attribute(importlib.import_module(f"rewards.{name}"), _class_of(name), name)


def _class_of(module: str) -> str:
    return "".join(part.capitalize() for part in module.split("_"))


def _callable_classes(file: Path) -> set[str]:
    """Judged by syntax: some of these modules import what the main environment need not have."""
    classes = [node for node in ast.parse(file.read_bytes()).body if isinstance(node, ast.ClassDef)]
    return {node.name for node in classes if "__call__" in {getattr(item, "name", "") for item in node.body}}


def _literal(tree: ast.Module, name: str, types: tuple[type, ...], file: Path, expected: str) -> Any:
    """Returns the value of a module's constant, None where it has none."""
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or name not in _assigned(node):
            continue
        try:
            value = ast.literal_eval(node.value) if node.value else None
        except ValueError:
            value = None
        if not isinstance(value, types):
            raise RewardError(
                f"{name} in {file} cannot be read without running the file",
                value=ast.unparse(node),
                expected=expected,
                do="write it out, without names or calls",
            )
        return value
    return None


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _module_source(module: str) -> Path | None:
    """Looks along the path that `_import` takes. `importlib.util.find_spec` would import the parents."""
    places: list[str] | None = [*sys.path, str(Path.cwd())]
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:count]), places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


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


def _parameters(found: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(found).parameters
    except (TypeError, ValueError):
        return {}


def _signature(found: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(found))
    except (TypeError, ValueError):
        return "(...)"
