"""Settings of Diffusion-Sharpening, on excursions: a few sampling steps from a noised latent."""

from __future__ import annotations

from typing import ClassVar, Literal

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

    content: ClassVar[Content] = "excursions"
    sources: ClassVar[tuple[SourceKind, ...]] = ("prompts", "images")
    max_lag: ClassVar[int | None] = 1


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
