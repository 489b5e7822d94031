"""The reward firewall: held-out rewards that are looked at every few rounds, and never trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from protocol.roles import Reward
from protocol.section import PositiveFloat, PositiveInt, Section


class Firewall(Section):
    """What is drawn and scored on fixed prompts and seeds, and what happens when the trained reward climbs while a
    held-out one falls."""

    every_rounds: PositiveInt = 5
    """A check with the first round, and then each so many."""
    num_prompts: PositiveInt = 8
    """Prompts of a check, spread evenly over prompts.held_out, or over prompts.train without one."""
    images_per_prompt: PositiveInt = 4
    """Images of each prompt. Their seeds are those of evaluation."""
    rewards: Annotated[tuple[Reward, ...], Field(min_length=1)]
    """Held-out rewards, such as image_diversity: only scored in checks."""
    margin: PositiveFloat = 0.5
    """How far a held-out reward's mean may fall below its best so far, in standard deviations of its scores in the
    first check, while the trained reward is above what it was then."""
    on_trip: Literal["warn", "roll_back", "stop"] = "warn"
    """`warn` goes on. `roll_back` goes on from the weights of the last good check. `stop` ends the run with an error,
    with a checkpoint, and with the weights of the last good check in export/."""
    max_roll_backs: PositiveInt = 1
    """With roll_back: after so many, the next trip stops the run."""
