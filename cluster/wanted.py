"""`sfumato scale`: what a person asks a driver for, in a file of the run directory that the driver looks at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.run_dir import SCALE_FILE, is_driven, read_recipe, write_text
from protocol.errors import RecipeError, RunDirError
from protocol.recipe import Recipe
from protocol.roles import MAX_ACTORS, Rollouts

ALONE = "a run does without rollout actors where its learner samples too: resume it with rollouts=0"


@dataclass(frozen=True)
class Wanted:
    """What was asked for since the driver started: `Wanted(Rollouts(min=2, max=8), {"image_reward": 4})`. `rollouts`
    is None where nobody has asked: then the recipe's count."""

    rollouts: Rollouts | None = None
    replicas: Mapping[str, int] = field(default_factory=dict)


def read_wanted(run_dir: Path) -> Wanted:
    """Returns what a run was asked for."""
    try:
        document = json.loads((run_dir / SCALE_FILE).read_text())
    except FileNotFoundError:
        return Wanted()
    rollouts = document["rollouts"]
    return Wanted(None if rollouts is None else Rollouts.model_validate(rollouts), document["replicas"])


def scale(run_dir: Path, rollouts: str | None, rewards: Sequence[str]) -> Wanted:
    """Asks the driver of a run for other sizes, written as on the command line; what is not named stays as it is.
    Returns all that was asked for by now. Raises RecipeError or RunDirError, and asks for nothing then."""
    recipe = read_recipe(run_dir)
    asked = Wanted(
        None if rollouts is None else parse_rollouts(rollouts, fewest=0 if recipe.is_colocated else 1),
        dict(parse_reward(text, recipe) for text in rewards),
    )
    if asked == Wanted():
        raise RecipeError("there is nothing to scale", do="add --rollouts N or --reward NAME=M")
    if not is_driven(run_dir):
        raise RunDirError(
            "no driver is running this run, so there is nothing to scale",
            value=str(run_dir),
            do="resume it with rollouts=N or rewards.0.replicas=M",
        )
    before = read_wanted(run_dir)
    wanted = Wanted(asked.rollouts or before.rollouts, {**before.replicas, **asked.replicas})
    document = {
        "rollouts": wanted.rollouts.model_dump() if wanted.rollouts else None,
        "replicas": dict(wanted.replicas),
    }
    write_text(run_dir / SCALE_FILE, json.dumps(document))
    return wanted


def parse_rollouts(text: str, fewest: int = 1) -> Rollouts:
    """Returns `4` as a fixed number, and `2:16` as bounds between which the run scales by itself; with a `fewest` of 0
    a run whose learner samples too may do without."""
    low, _, high = text.partition(":")
    bounds = [_count("--rollouts", text, part, fewest) for part in ([low, high] if ":" in text else [low, low])]
    if bounds[0] > bounds[1]:
        raise RecipeError("--rollouts: the minimum is above the maximum", value=text, expected="MIN:MAX, such as 2:16")
    return Rollouts(min=bounds[0], max=bounds[1])


def parse_reward(text: str, recipe: Recipe) -> tuple[str, int]:
    """Returns (label, actors) of `NAME=M`."""
    label, separator, count = text.partition("=")
    labels = [reward.label for reward in recipe.scored_rewards]
    if not separator:
        raise RecipeError("--reward is not of the form NAME=M", value=text, expected="for example image_reward=4")
    if label not in labels:
        raise RecipeError(
            f"the run has no reward {label}", expected=f"one of {', '.join(labels)}" if labels else "none: it asks none"
        )
    return label, _count(f"--reward {label}", text, count)


def _count(option: str, text: str, number: str, fewest: int = 1) -> int:
    if not number.isdecimal() or not fewest <= int(number) <= MAX_ACTORS:
        raise RecipeError(
            f"{option}: this is no number of actors",
            value=text,
            expected=f"{fewest} to {MAX_ACTORS}",
            do=ALONE if option == "--rollouts" and fewest and number == "0" else "",
        )
    return int(number)
