"""The sources of a run's tickets, as they were when it was made: a changed file must not change the run.

prompts.txt     the training prompts, one a line
held_out.txt    the prompts never trained on, if there are any
checks.txt      the prompts of the firewall's checks, if there is one
data-0.jsonl    the usable rows of the first dataset, and so on; data-0.skipped.jsonl tells of the others
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

from protocol.datasets import Dataset, Manifest
from protocol.errors import RunDirError
from protocol.paths import manifest_path, spread
from protocol.prompt_sets import Hub, Lists, Prompts, make_lists, read_set
from protocol.recipe import Recipe
from protocol.tickets import Checks, Source, TicketPlan

PROMPTS, HELD_OUT, CHECKS = "prompts.txt", "held_out.txt", "checks.txt"


def prepare_sources(recipe: Recipe, run_dir: Path, tell: Callable[[str], None]) -> None:
    """Reads prompts and scans datasets into a run directory, each once in the life of a run. Raises ModelError or
    RecipeError."""
    _prepare_prompts(recipe.prompts, run_dir, tell)
    if recipe.firewall is not None:
        prompts = held_out_prompts(recipe, run_dir) or _read_list(run_dir / PROMPTS)
        _keep_list(run_dir / CHECKS, spread(prompts, recipe.firewall.num_prompts))
    for number, dataset in enumerate(recipe.data):
        if not manifest_path(run_dir, number).exists():
            _scan(dataset, manifest_path(run_dir, number), tell)


def held_out_prompts(recipe: Recipe, run_dir: Path) -> list[str] | None:
    """Returns the held-out prompts that a run began with, or None if its recipe holds none out. Raises RunDirError."""
    if recipe.prompts.held_out is None and recipe.prompts.held_out_share is None:
        return None
    return _read_list(run_dir / HELD_OUT)


def read_prompt_set(name: str) -> list[str]:
    """Returns the prompts of any set that a recipe may name, of the hub too. Raises ModelError."""
    found = read_set(name, fetch=_fetch)
    assert found is not None, "a set that can be fetched is read"
    return list(found.prompts)


def _prepare_prompts(settings: Prompts, run_dir: Path, tell: Callable[[str], None]) -> None:
    missing = settings
    if (run_dir / HELD_OUT).exists():
        missing = missing.model_copy(update={"held_out": None})
    if (run_dir / PROMPTS).exists() and (settings.held_out_share is None or (run_dir / HELD_OUT).exists()):
        missing = missing.model_copy(update={"train": None})
    if missing.train is None and missing.held_out is None:
        return
    lists = make_lists(missing, _fetch)
    for name, prompts in ((HELD_OUT, lists.held_out), (PROMPTS, lists.train)):
        if prompts is not None:
            _keep_list(run_dir / name, prompts)
    tell(_words(lists))


def _words(lists: Lists) -> str:
    parts = [f"{len(lists.train)} to train on"] if lists.train is not None else []
    parts += [f"{len(lists.held_out)} held out{lists.shared}"] if lists.held_out is not None else []
    return "prompts: " + ", ".join(parts) + (f" (dropped: {lists.dropped})" if lists.dropped else "")


def _fetch(hub: Hub) -> Iterable[Any]:
    from actors.datasets import read_column

    return read_column(hub)


def _keep_list(path: Path, prompts: Iterable[str]) -> None:
    if not path.exists():
        draft = path.with_name(f".tmp-{path.name}")
        draft.write_bytes("".join(f"{prompt}\n" for prompt in prompts).encode())
        draft.replace(path)


def _read_list(path: Path) -> list[str]:
    try:
        prompts = [line for line in path.read_bytes().decode().split("\n") if line]
    except (OSError, UnicodeDecodeError) as error:
        raise RunDirError(f"the run's prompts {path} cannot be read: {error}", do="put the file back") from error
    if not prompts:
        raise RunDirError(f"the run's prompts {path} are gone: the file is empty", do="put the file back")
    return prompts


def _scan(dataset: Dataset, path: Path, tell: Callable[[str], None]) -> None:
    from actors.datasets import scan

    manifest = scan(dataset, lambda done, total: tell(f"reading dataset {dataset.path}: {done} of {total} rows"))
    manifest.write(path)
    skipped = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in manifest.skipped_counts.items())
    tell(
        f"dataset {dataset.path}: {len(manifest.items)} rows usable, {len(manifest.skipped)} skipped"
        + (f" ({skipped}; listed in {path.stem}.skipped.jsonl)" if skipped else "")
    )


def read_plan(recipe: Recipe, run_dir: Path) -> TicketPlan:
    """Returns what fixes every ticket of a run."""
    sources = []
    if recipe.prompts.train is not None:
        sources.append(Source.of_prompts(_read_list(run_dir / PROMPTS), recipe.prompts.weight))
    for number, dataset in enumerate(recipe.data):
        items = Manifest.read(manifest_path(run_dir, number)).items
        captions, rows = tuple(item.caption for item in items), tuple(item.row for item in items)
        sources.append(Source(dataset.kind, captions, rows, dataset.weight))
    starts = accumulate((iteration.rounds for iteration in recipe.iterations[:-1]), initial=0)
    checks = None
    if recipe.firewall is not None:
        prompts = tuple(_read_list(run_dir / CHECKS))
        settings = recipe.firewall
        checks = Checks(settings.every_rounds, prompts, settings.images_per_prompt, recipe.evaluation.seed)
    return TicketPlan(
        recipe.seed,
        tuple(sources),
        recipe.batch.num_groups,
        recipe.batch.group_size,
        recipe.lag,
        tuple(starts) if recipe.iterations else (),
        recipe.behaviour == "base",
        checks,
    )
