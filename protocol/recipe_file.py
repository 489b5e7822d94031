"""Reading a recipe: YAML, dotted overrides, and validation errors that a person can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from protocol.errors import RecipeError
from protocol.paths import ROOT
from protocol.recipe import Recipe


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (as in YAML 1.2) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe, applies `key.sub=value` overrides in order, and validates the whole.

    Values of overrides are YAML, so `model.trainable={form: full}` and `rewards.0.weight=2` work.
    Raises RecipeError naming the key, the value and the legal keys.
    """
    document = _read_yaml(Path(path))
    for override in overrides:
        _apply(document, override)
    return parse_recipe(document, source=str(path))


def parse_recipe(document: dict[str, Any], *, source: str) -> Recipe:
    """Validates a recipe that is already in memory."""
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise RecipeError(f"{source} is not a recipe that can run:\n{_explain(error)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """Returns the resolved recipe as YAML; loading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    file = path if path.is_file() else ROOT / path
    try:
        document = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise RecipeError(
            f"the recipe {path} does not exist",
            expected=f"a YAML file; those that come with sfumato: {_shipped_recipes()}",
            do="correct the path",
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}", expected="a YAML file") from None
    if not isinstance(document, dict):
        raise RecipeError(f"the recipe {path} has no keys", value=type(document).__name__, expected="a YAML mapping")
    return document


def _shipped_recipes() -> str:
    return ", ".join(sorted(f"recipes/{file.name}" for file in (ROOT / "recipes").glob("*.yaml")))


def _apply(document: dict[str, Any], override: str) -> None:
    """Sets one dotted key in place, making the mappings on the way."""
    dotted, separator, text = override.partition("=")
    if not separator or not dotted:
        raise RecipeError(
            "an override is not of the form key.sub=value",
            value=override,
            expected="for example learner.learning_rate=1e-4",
            do="check the spelling and quote the whole if it has spaces",
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"the value of override {dotted} is not YAML: {error}", value=text) from None
    *parents, last = dotted.split(".")
    node: Any = document
    for key in parents:
        node = _descend(node, key, dotted)
        if not isinstance(node, dict | list):
            raise RecipeError(f"override {dotted}: {key} is not a section", value=node)
    _assign(node, last, value, dotted)


def _descend(node: Any, key: str, dotted: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, key, dotted)]
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _assign(node: Any, key: str, value: Any, dotted: str) -> None:
    if isinstance(node, list):
        node[_list_index(node, key, dotted)] = value
    else:
        node[key] = value


def _list_index(node: list[Any], key: str, dotted: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise RecipeError(
            f"override {dotted}: {key!r} does not name an entry of a list",
            expected=f"a number from 0 to {len(node) - 1}",
        )
    return int(key)


def _explain(error: ValidationError) -> str:
    return "\n".join(f"  - {_explain_one(detail)}" for detail in error.errors(include_url=False))


def _explain_one(detail: Any) -> str:
    location = [part for part in detail["loc"] if part not in ("lora", "full")]
    key = ".".join(str(part) for part in location)
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key}. {_legal_keys(location)}"
    if detail["type"] == "missing":
        return f"{key} is missing: {_description(location)}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    return f"{key}: {message}. Got: {detail['input']!r}. {_description(location)}".rstrip()


def _legal_keys(location: Sequence[Any]) -> str:
    legal = sorted({name for kind in _sections_at(location[:-1]) for name in kind.model_fields})
    close = difflib.get_close_matches(str(location[-1]), legal, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    return f"{hint}Legal keys here: {', '.join(legal)}"


def _description(location: Sequence[Any]) -> str:
    for kind in _sections_at(location[:-1]):
        field = kind.model_fields.get(str(location[-1]))
        if field is not None:
            return " ".join((field.description or "").split())
    return ""


def _sections_at(location: Sequence[Any]) -> list[type[BaseModel]]:
    """Returns the recipe sections that a key path leads to: several where a union stands."""
    kinds: list[type[BaseModel]] = [Recipe]
    for part in location:
        if isinstance(part, int):
            continue
        fields = [kind.model_fields[part] for kind in kinds if part in kind.model_fields]
        kinds = [kind for field in fields for kind in _sections_in(field.annotation)]
    return kinds


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in _sections_in(inner)]
