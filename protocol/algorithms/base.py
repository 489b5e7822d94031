"""What all algorithms' settings share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field

from protocol.section import PositiveFloat, PositiveInt, Section

Fraction = Annotated[float, Field(ge=0, le=1)]


Content = Literal["trajectories", "images", "excursions"]
"""What a sampled group carries: all states with their log-probabilities, clean latents, or candidates' states."""

SourceKind = Literal["prompts", "images", "pairs"]
"""What a ticket starts from: a prompt to sample, a dataset's image, or its preference pair."""


Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]
"""What a base model's network predicts: the noise, v, the clean latent, or a flow's velocity."""


class Passes(Section):
    """What all algorithms share: how a round is cut into optimizer steps, and what they ask of a recipe."""

    content: ClassVar[Content] = "images"
    """What sampled groups carry for it."""
    sources: ClassVar[tuple[SourceKind, ...]] = ("prompts",)
    """What it can learn from."""
    min_group_size: ClassVar[int] = 1
    """The fewest siblings that it can learn from."""
    predictions: ClassVar[tuple[Prediction, ...]] = get_args(Prediction)
    """The base models that it can train, by what their networks predict."""

    num_updates: PositiveInt = 1
    """K: passes of inner updates over a round."""
    inner_minibatches: PositiveInt = 1
    """Optimizer steps a pass is split into."""

    @property
    def max_lag(self) -> int | None:
        """The largest lag at which its loss still means what it says; None: any."""
        return None

    @property
    def num_steps_per_round(self) -> int:
        """Optimizer steps in a round."""
        return self.num_updates * self.inner_minibatches


class Iteration(Section):
    """One iteration of self-play: its opponent is the weights at its start. AdamW's state and schedule start afresh."""

    rounds: PositiveInt
    """Rounds of the iteration."""
    learning_rate: PositiveFloat | None = None
    """AdamW's learning rate; null: learner.learning_rate."""
