"""Settings of the algorithms on images: errors of the network's prediction at drawn timesteps."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from protocol.algorithms.base import Fraction, Iteration, Passes, Prediction, SourceKind
from protocol.section import NonNegativeFloat, PositiveFloat, Section

MATCH_DPO: Literal["match_dpo"] = "match_dpo"


def _number_or_match(value: Any) -> Any:
    """One message for both, where pydantic would have one for each."""
    if value == MATCH_DPO:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{value!r} is neither a number above 0 nor {MATCH_DPO}")
    return number


MatchedBeta = Annotated[float | Literal["match_dpo"], BeforeValidator(_number_or_match)]
"""A beta_full, or `match_dpo`: that for which logits between features have the scale of DPO's at 2500, on the base."""


class ImageAlgorithm(Passes):
    """What the methods on images share: where timesteps and noise come from."""

    min_tau: Annotated[int, Field(ge=0, le=999)] = 0
    """Smallest training timestep that is drawn; the largest is the model's last."""
    prompt_dropout: Fraction = 0.0
    """Share of units whose prompt is replaced by the empty one, drawn by key; a pair drops both or none."""


class Perception(Section):
    """The noise-conditioned embedding space of NCP (Gambashidze et al., arXiv 2406.17636): errors are taken between
    features of the frozen U-Net encoder, one denoising step further."""

    blocks: Literal["down", "down_mid", "mid", "multi", "identity"] = "down"
    """Features: the last of the down blocks, of the middle block after them, both, those of every down block and the
    middle one, or the latent itself (a control: weighted noise-space errors)."""
    encoder_weights: Literal["frozen_base", "random_init", "ema", "live"] = "frozen_base"
    """Whose encoder: the pretrained model's, one with random weights (a control), the moving average of the one being
    trained (needs learner.ema), or that one itself."""
    input: Literal["tau_minus_1", "uniform"] = "tau_minus_1"
    """What it is fed: the state one DDPM step further with shared step noise, or re-noised to a fresh timestep."""
    norm: Literal["none", "relative", "k2"] = "none"
    """Divide the error by nothing, by the target features' energy, or by the squared step factor k."""


class Pairs(Section):
    """Pairs made online, from a group's rewards."""

    rule: Literal["best_worst", "all_pairs", "threshold"] = "best_worst"
    """The best sibling against the worst; all pairs, weights adding up to 1 in a group; or all pairs whose rewards
    differ by more than `threshold`. Ties are dropped and counted."""
    threshold: NonNegativeFloat = 0.0
    """Smallest difference of rewards that makes a pair under rule `threshold`, exclusive."""

    @model_validator(mode="after")
    def _threshold_is_used(self) -> Self:
        if self.threshold and self.rule != "threshold":
            raise ValueError(f"pairs: threshold {self.threshold} has no effect under rule {self.rule}")
        return self


class _Sft(ImageAlgorithm):
    select: Literal["best", "random"] = "best"
    """Of a sampled group the image with the highest reward, or one at random (the control). A dataset's images and the
    winners of its pairs are taken as they are."""

    sources: ClassVar[tuple[SourceKind, ...]] = ("prompts", "images", "pairs")


class _Preference(ImageAlgorithm):
    pairs: Pairs = Pairs()
    """How pairs are made of a sampled group's rewards. A dataset's pairs are taken as they are."""
    shared_noise: bool = True
    """Both members of a pair get one noise; false: one each (the timestep is one in any case)."""

    sources: ClassVar[tuple[SourceKind, ...]] = ("prompts", "pairs")
    min_group_size: ClassVar[int] = 2


class _Dpo(_Preference):
    beta_half: PositiveFloat | None = None
    """Factor in the paper's convention: the logit is -beta_half/2 times the error differences. Give exactly one."""
    beta_full: MatchedBeta | None = None
    """Factor in diffusers' convention, half the other. `match_dpo`: 2500 times the base's mean error in noise over that
    between features, so that logits have the scale of DPO's at 2500."""

    @model_validator(mode="after")
    def _has_one_beta(self) -> Self:
        if (self.beta_half is None) == (self.beta_full is None):
            raise ValueError(
                "algorithm: exactly one of beta_half (the paper's convention) and beta_full (diffusers', half of it) "
                f"is needed, but they are {self.beta_half} and {self.beta_full}"
            )
        return self

    @property
    def beta(self) -> float | None:
        """The factor in the convention of `beta_full`; None: to be matched on the base."""
        if self.beta_half is not None:
            return self.beta_half / 2
        return None if self.beta_full == MATCH_DPO else self.beta_full


class _Cpo(_Preference):
    beta_full: MatchedBeta
    """Factor of the error difference. `match_dpo`: 2500 times the base's mean error in noise over that between
    features."""
    sft_weight: NonNegativeFloat = 1.0
    """Factor of the winner's own error; at 0 nothing bounds the loser's error."""
    max_loser_error_ratio: PositiveFloat = 10.0
    """The run stops when the loser's error passes so many times its start."""

    @property
    def beta(self) -> float | None:
        """The factor; None: to be matched on the base."""
        return None if self.beta_full == MATCH_DPO else self.beta_full


class _Perceptual(Section):
    predictions: ClassVar[tuple[Prediction, ...]] = ("epsilon", "v_prediction", "sample")
    """The embedding space is a U-Net's, one DDPM step further: flow-matching transformers have neither."""

    min_tau: Annotated[int, Field(ge=0, le=999)] = 1
    """Smallest training timestep that is drawn; at 0 every perceptual error is 0."""
    perception: Perception = Perception()
    """The embedding space."""


class Sft(_Sft):
    """Denoising regression on images: a dataset's, or chosen from the model's own by reward."""

    name: Literal["sft"]
    """The algorithm."""


class Dpo(_Dpo):
    """Diffusion-DPO (Wallace et al., arXiv 2311.12908)."""

    name: Literal["dpo"]
    """The algorithm."""
    beta_full: PositiveFloat | None = None
    """Factor in diffusers' convention, half the other."""

    @property
    def beta(self) -> float:
        """The factor in the convention of `beta_full`."""
        return self.beta_full if self.beta_full is not None else (self.beta_half or 0.0) / 2


class Cpo(_Cpo):
    """Diffusion-CPO: preference without a reference (Gambashidze et al., arXiv 2406.17636, Eq. 11)."""

    name: Literal["cpo"]
    """The algorithm."""
    beta_full: PositiveFloat
    """Factor of the error difference."""


class NcpSft(_Perceptual, _Sft):
    """NCP-SFT: SFT's loss on errors in the noise-conditioned embedding space."""

    name: Literal["ncp_sft"]
    """The algorithm."""


class NcpDpo(_Perceptual, _Dpo):
    """NCP-DPO: DPO's loss on errors in the noise-conditioned embedding space."""

    name: Literal["ncp_dpo"]
    """The algorithm."""


class NcpCpo(_Perceptual, _Cpo):
    """NCP-CPO: CPO's loss on errors in the noise-conditioned embedding space."""

    name: Literal["ncp_cpo"]
    """The algorithm."""


class SpinIteration(Iteration):
    """One iteration of self-play in the form that is trained."""

    beta_half: PositiveFloat
    """Factor in the paper's convention: the logit is -beta_half/2 times the error differences."""

    @property
    def beta(self) -> float:
        """The factor in the convention of `beta_full`."""
        return self.beta_half / 2


class Spin(ImageAlgorithm):
    """SPIN-Diffusion as it is trained: Diffusion-DPO's loss with the real image as winner, the opponent's as loser and
    the opponent as reference (Yuan et al., arXiv 2402.10210)."""

    name: Literal["spin"]
    """The algorithm."""
    iterations: Annotated[tuple[SpinIteration, ...], Field(min_length=1)]
    """Iterations of self-play; their rounds add up to the recipe's."""
    shared_noise: bool = True
    """Both members of a pair get one noise; false: one each, which changes the optimum."""

    def iteration_at(self, round_: int) -> SpinIteration:
        """Returns the iteration that a round belongs to."""
        ends = accumulate(iteration.rounds for iteration in self.iterations)
        return next((i for i, end in zip(self.iterations, ends, strict=True) if round_ < end), self.iterations[-1])

    sources: ClassVar[tuple[SourceKind, ...]] = ("images", "pairs")
