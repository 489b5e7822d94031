"""Settings of Diffusion-Sharpening, on excursions: a few sampling steps from a noised latent."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from protocol.algorithms.base import Content, Fraction, Passes, SourceKind
from protocol.section import PositiveFloat, PositiveInt, Section


class Excursion(Section):
    """How Diffusion-Sharpening's candidates are made: from siblings sampled of a prompt, or from a dataset's image."""

    noise: Literal["fresh", "shared", "coupled"]
    """One noise a candidate, one for all, or for each its own sample's x_T."""
    num_states: PositiveInt = 3
    """M: sampling steps and so states of an excursion; fewer where the first timestep is too small for them."""
    stride: PositiveInt = 40
    """Timesteps between two states."""
    eta: Fraction = 0.0
    """DDIM's noise level between states."""


class _Sharpening(Passes):
    excursion: Excursion
    """How candidates are made."""
    select_on: Literal["path_mean", "path_sum", "final_x0"] = "path_mean"
    """A candidate's score: the mean (released code) or the sum (paper) of the rewards of its predicted images, or the
    reward of the clean image that it started from."""
    selection: Literal["best", "random"] = "best"
    """`random` asks for rewards and ignores them: the control."""
    prompt_dropout: Fraction = 0.0
    """Share of groups whose errors are taken with the empty prompt, drawn by key in every pass; their candidates were
    made with their prompt (the released code draws once an example, for both)."""
    backprop_through_steps: bool = False
    """The policy visits the chosen candidates' states again, with a graph through the steps between them (released
    code); else states are the group's and constants. Needs eta 0, for what noise there was is not kept, and lag 0."""

    @model_validator(mode="after")
    def _steps_can_be_taken_again(self) -> Self:
        if self.backprop_through_steps and self.excursion.eta > 0:
            raise ValueError(
                f"algorithm.backprop_through_steps needs steps without noise, but excursion.eta is {self.excursion.eta}"
            )
        return self

    content: ClassVar[Content] = "excursions"
    sources: ClassVar[tuple[SourceKind, ...]] = ("prompts", "images")

    @property
    def max_lag(self) -> int | None:
        """Older weights visit other states: one version's are near, but what is visited again must be the same."""
        return 0 if self.backprop_through_steps else 1


class SharpeningSft(_Sharpening):
    """Diffusion-Sharpening, SFT variant (arXiv 2502.12146): regression on the best candidate."""

    name: Literal["sharpening_sft"]
    """The algorithm."""


class SharpeningRlhf(_Sharpening):
    """Diffusion-Sharpening, RLHF variant: the best candidate against the worst."""

    name: Literal["sharpening_rlhf"]
    """The algorithm."""
    beta_full: PositiveFloat
    """Factor of the error differences."""
    margin: Literal["none", "inside", "outside"] = "none"
    """The reward margin: absent, inside the logistic (paper), or outside it, without a gradient (released code)."""
    ref_times: Literal["all", "first"] = "all"
    """States at which reference errors are taken: the policy's, or the first only (released code)."""

    min_group_size: ClassVar[int] = 2
