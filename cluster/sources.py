"""The sources of a run's tickets, as they were when it was made: a changed file must not change the run.

prompts.txt     the training prompts
checks.txt      the prompts of the firewall's checks, if there is one
data-0.jsonl    the usable rows of the first dataset, and so on; data-0.skipped.jsonl tells of the others
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

from protocol.datasets import Dataset, Manifest
from protocol.paths import find_file, manifest_path, read_prompts, spread
from protocol.recipe import Recipe
from protocol.tickets import Checks, Source, TicketPlan

PROMPTS, CHECKS = "prompts.txt", "checks.txt"


def prepare_sources(recipe: Recipe, run_dir: Path, tell: Callable[[str], None]) -> None:
    """Copies prompts and scans datasets into a run directory, each once in the life of a run. Raises ModelError or
    RecipeError."""
    if recipe.prompts.train is not None:
        _keep(run_dir / PROMPTS, find_file(recipe.prompts.train).read_bytes())
    if recipe.firewall is not None:
        file = recipe.prompts.held_out or recipe.prompts.train
        assert file is not None, "a recipe with a firewall has prompts"
        prompts = spread(read_prompts(file), recipe.firewall.num_prompts)
        _keep(run_dir / CHECKS, "".join(f"{prompt}\n" for prompt in prompts).encode())
    for number, dataset in enumerate(recipe.data):
        if not manifest_path(run_dir, number).exists():
            _scan(dataset, manifest_path(run_dir, number), tell)


def _keep(path: Path, content: bytes) -> None:
    if not path.exists():
        draft = path.with_name(f".tmp-{path.name}")
        draft.write_bytes(content)
        draft.replace(path)


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
        sources.append(Source.of_prompts(read_prompts(str(run_dir.absolute() / PROMPTS)), recipe.prompts.weight))
    for number, dataset in enumerate(recipe.data):
        items = Manifest.read(manifest_path(run_dir, number)).items
        captions, rows = tuple(item.caption for item in items), tuple(item.row for item in items)
        sources.append(Source(dataset.kind, captions, rows, dataset.weight))
    starts = accumulate((iteration.rounds for iteration in recipe.iterations[:-1]), initial=0)
    checks = None
    if recipe.firewall is not None:
        prompts = tuple(read_prompts(str(run_dir.absolute() / CHECKS)))
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
