"""`sfumato evaluate`: base against tuned, on fixed prompts and seeds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from actors.evaluator import Estimate, ScoreImages, estimate, score_prompts, win_rate
from cluster.device import own_device
from cluster.own_rewards import open_rewards
from cluster.run_dir import home_of, read_recipe
from cluster.sources import held_out_prompts, read_prompt_set
from diffusion.chain import Chain
from diffusion.policy import Policy
from diffusion.weights import unpack
from learner.checkpoint import Weights, latest_checkpoint
from protocol.errors import RecipeError, RunDirError
from protocol.paths import spread
from protocol.recipe import Recipe
from protocol.scores import plain_total


@dataclass(frozen=True)
class Comparison:
    """One reward: base, tuned, their paired difference, and how often tuned beats base at the same seed."""

    base: Estimate
    tuned: Estimate
    difference: Estimate
    win_rate: Estimate


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation; `rewards["mean"]` is the weighted sum that was trained on. `weights` are the moving
    average of those trained, or these themselves, live."""

    run: str
    version: int
    prompts: str
    num_prompts: int
    images_per_prompt: int
    seed: int
    rewards: dict[str, Comparison]
    weights: Weights = "live"


def evaluate_run(run_dir: Path, prompts_name: str | None, *, live: bool = False) -> Evaluation:
    """Draws and scores the same images with base and newest checkpointed weights, on a set of prompts that is named as
    in a recipe, or on those that the run holds out. `live` leaves the weights' moving average aside."""
    recipe = read_recipe(run_dir)
    settings = recipe.evaluation
    every = read_prompt_set(prompts_name) if prompts_name else held_out_prompts(recipe, home_of(run_dir))
    if every is None:
        raise RecipeError("there are no prompts to evaluate on", do="give --prompts, or hold some out")
    prompts = spread(every, settings.max_prompts)
    found = latest_checkpoint(run_dir)
    if found is None:
        raise RunDirError(f"the run {run_dir} has no checkpoint yet", do="wait for it, or resume the run")
    torch.set_num_threads(recipe.rollout_worker.threads)
    policy = Policy.from_recipe(recipe, own_device(wants_gpu=recipe.rollout_worker.num_gpus > 0))
    chain = Chain(policy, recipe.sampler)
    with open_scorer(recipe) as score:
        # A policy as loaded computes what the base does: its adapters start as zero.
        base = score_prompts(chain, prompts, settings.images_per_prompt, settings.seed, score)
        policy.load_trainable_state(unpack(found.result_bytes(live=live)))
        tuned = score_prompts(chain, prompts, settings.images_per_prompt, settings.seed, score)
    return Evaluation(
        str(run_dir),
        found.meta.round,
        prompts_name or recipe.prompts.held_out or f"{recipe.prompts.held_out_share:.1%} of {recipe.prompts.train}",
        len(prompts),
        settings.images_per_prompt,
        settings.seed,
        {label: compare(base[label], tuned[label]) for label in base},
        found.meta.result(live=live),
    )


@contextmanager
def open_scorer(recipe: Recipe) -> Iterator[ScoreImages]:
    """Yields a function that scores images with every reward of a recipe: those trained on and those held out."""
    trained = recipe.rewards
    extra = (*recipe.scored_rewards[len(trained) :], *recipe.evaluation.rewards)
    if not (trained or extra):
        raise RecipeError("there is nothing to evaluate by", do="name rewards under evaluation.rewards in the recipe")
    with open_rewards(recipe, (*trained, *extra)) as functions:

        def score(images: np.ndarray, prompt: str) -> Mapping[str, np.ndarray]:
            parts = {label: function(images, prompt, 1) for label, function in functions.items()}
            return {"mean": plain_total(parts, trained), **parts} if trained else parts

        yield score


def compare(base_PN: np.ndarray, tuned_PN: np.ndarray) -> Comparison:
    """Returns the comparison of two (prompts, images) score arrays that share prompts and seeds."""
    return Comparison(estimate(base_PN), estimate(tuned_PN), estimate(tuned_PN - base_PN), win_rate(tuned_PN, base_PN))


def print_table(result: Evaluation) -> None:
    """Prints one row a reward: means with standard errors over prompts, and how often tuned beats base at the same
    prompt and noise."""
    averaged = ", averaged," if result.weights == "average" else ""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"version {result.version}{averaged} against its base on {result.num_prompts} prompts x "
        f"{result.images_per_prompt} images of {result.prompts}",
    )
    for column in ("reward", "base", "tuned", "difference", "wins"):
        is_name = column == "reward"
        table.add_column(column, justify="left" if is_name else "right", no_wrap=not is_name, overflow="fold")
    for label, row in result.rewards.items():
        if label == "mean" and len(result.rewards) == 2:
            continue  # The sum of one reward says nothing new.
        name = "trained sum" if label == "mean" else label
        wins = f"{100 * row.win_rate.mean:.1f} ± {100 * row.win_rate.standard_error:.1f} %"
        table.add_row(name, *(_with_error(part) for part in (row.base, row.tuned, row.difference)), wins)
    Console().print(table)


def write_json(result: Evaluation, path: Path) -> None:
    """Writes the result for other programs."""
    path.write_text(json.dumps(asdict(result), indent=1) + "\n")


def _with_error(part: Estimate) -> str:
    return f"{part.mean:.3f} ± {part.standard_error:.3f}"
