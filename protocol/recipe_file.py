"""Reading a recipe: YAML, dotted overrides, and validation errors that a person can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
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
        apply_override(document, override)
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


def apply_override(document: dict[str, Any], override: str) -> None:
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
    details = error.errors(include_url=False)
    return "\n".join(f"  - {_explain_one(detail)}" for detail in details if not _is_echo(detail, details))


def _is_echo(detail: Any, details: Sequence[Any]) -> bool:
    """True for a list that is called too short because its entries are wrong."""
    depth = len(detail["loc"])
    return detail["type"] == "too_short" and any(
        other["loc"][:depth] == detail["loc"] for other in details if len(other["loc"]) > depth
    )


def _explain_one(detail: Any) -> str:
    place = _place(detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            legal = sorted({name for kind in place.around for name in kind.model_fields})
            return f"unknown key {place.key}. {_closest(place.last, legal)}Legal keys here: {', '.join(legal)}"
        case "missing":
            return f"{place.key} is missing: {place.description}"
        case "union_tag_invalid" | "union_tag_not_found":
            ((name, *_), tags) = zip(*map(_tag, place.inside), strict=True)
            hint = _closest(str(detail["ctx"].get("tag")), tags)
            return f"{place.key}.{name} is none of {', '.join(tags)}. {hint}Got: {detail['input']!r}"
        case "value_error":
            # These messages are ours; most begin with their key.
            message = str(detail["msg"]).removeprefix("Value error, ")
            return message if message.startswith(place.key) else f"{place.key}: {message}"
    return f"{place.key}: {detail['msg']}. Got: {detail['input']!r}. {place.description}".rstrip()


def _closest(word: str, legal: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, legal, n=1)
    return f"Did you mean {close[0]}? " if close else ""


@dataclass(frozen=True)
class _Place:
    """Where an error is: `_Place(path=("algorithm", "kl_weight"), around=(Prdp,), inside=())`: the path as a person
    writes it, the sections that its last key may stand in, and those that may be below."""

    path: tuple[str | int, ...]
    around: tuple[type[BaseModel], ...]
    inside: tuple[type[BaseModel], ...]

    @property
    def key(self) -> str:
        """The dotted path."""
        return ".".join(map(str, self.path))

    @property
    def last(self) -> str:
        """The last key."""
        return str(self.path[-1])

    @property
    def description(self) -> str:
        """What the last key means."""
        fields = [kind.model_fields[self.last] for kind in self.around if self.last in kind.model_fields]
        return " ".join((fields[0].description or "").split()) if fields else ""


def _place(location: Sequence[str | int]) -> _Place:
    """Follows pydantic's location of an error, in which a union's tag stands as if it were a key."""
    path: list[str | int] = []
    around: list[type[BaseModel]] = []
    inside: list[type[BaseModel]] = [Recipe]
    for part in location:
        tagged = [kind for kind in inside if _tag(kind)[1] == part] if len(inside) > 1 else []
        if tagged:
            inside = tagged
            continue
        path.append(part)
        if isinstance(part, str):
            around = inside
            fields = [kind.model_fields[part] for kind in around if part in kind.model_fields]
            inside = [kind for field in fields for kind in _sections_in(field.annotation)]
    return _Place(tuple(path), tuple(around), tuple(inside))


def _tag(kind: type[BaseModel]) -> tuple[str, str]:
    """Returns what tells a section from the others of its union: the field that may have one value only, and that."""
    literals = {name: get_args(field.annotation) for name, field in kind.model_fields.items()}
    return next((name, one[0]) for name, one in literals.items() if len(one) == 1 and isinstance(one[0], str))


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in _sections_in(inner)]
