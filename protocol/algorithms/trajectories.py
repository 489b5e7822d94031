"""Settings of the algorithms on trajectories: per-step log-probabilities."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from protocol.algorithms.base import Content, Iteration, Passes, SourceKind
from protocol.section import NonNegativeFloat, PositiveFloat, PositiveInt


class Prdp(Passes):
    """PRDP: proximal reward difference prediction (Deng et al., arXiv 2402.08714)."""

    name: Literal["prdp"]
    """The algorithm."""
    kl_weight: PositiveFloat
    """w: the regression target is the reward difference divided by it, in the reductions below."""
    clip_eps: NonNegativeFloat | None
    """Half-width of the proximal window on one step's log-ratio, after the latent reduction; null: none."""
    latent_reduce: Literal["latent_mean", "latent_sum"] = "latent_mean"
    """Reduction of log-probabilities over latent entries."""
    time_reduce: Literal["time_mean", "time_sum"] = "time_mean"
    """Reduction of log-ratios over scored steps."""
    tie_policy: Literal["keep", "drop"] = "keep"
    """Pairs of equal reward: a target of 0 (Algorithm 1), or left out (the paper's listing)."""
    loss_scale: Literal["quarter_beta", "none"] = "quarter_beta"
    """`quarter_beta` multiplies the loss by kl_weight / 4: its on-policy gradient is minus that of the
    regularised reward for every kl_weight. `none` is the paper's."""
    clip_center: Literal["round_start", "behaviour"] = "round_start"
    """Centre of the window: the weights at the round's start, or those that sampled (equal at lag 0)."""

    @property
    def window(self) -> float | None:
        """Half-width of the window on one step, in the latent reduction."""
        return self.clip_eps

    content: ClassVar[Content] = "trajectories"
    min_group_size: ClassVar[int] = 2


class PolicyGradient(Passes):
    """Group-centred policy gradient: the baseline is the group's own mean (Flow-GRPO arXiv 2505.05470, DanceGRPO
    arXiv 2505.07818)."""

    name: Literal["policy_gradient"]
    """The algorithm."""
    advantage: Literal["centred", "leave_one_out", "group_std", "global_std"] = "leave_one_out"
    """r - mean; that times G/(G-1); divided by the group's std (DanceGRPO), or by the round's (Flow-GRPO)."""
    clip_range: NonNegativeFloat | None
    """Half-width of the window on one step's ratio, after the latent reduction; null: none."""
    latent_reduce: Literal["latent_mean", "latent_sum"] = "latent_mean"
    """Reduction of log-ratios over latent entries before the exponential."""
    kl_coef: NonNegativeFloat = 0.0
    """Factor of the per-step KL to the pretrained model, latent_mean; 0 never evaluates that."""
    kl_form: Literal["exact", "flow_grpo"] = "exact"
    """`flow_grpo` divides by the variance per unit of time instead of the step's, as Flow-GRPO does: smaller by the
    step's length. Its kernels only."""

    @property
    def window(self) -> float | None:
        """Half-width of the window on one step, in the latent reduction."""
        return self.clip_range

    content: ClassVar[Content] = "trajectories"
    min_group_size: ClassVar[int] = 2

    @property
    def max_lag(self) -> int | None:
        """Ratios are taken to the weights that sampled."""
        return 1


class Ddpo(Passes):
    """DDPO with per-prompt reward statistics (Black et al., arXiv 2305.13301), as ddpo-pytorch does it."""

    name: Literal["ddpo"]
    """The algorithm."""
    clip_range: NonNegativeFloat | None = 1e-4
    """Half-width of the window on one step's ratio, after the latent reduction; null: none."""
    latent_reduce: Literal["latent_mean", "latent_sum"] = "latent_mean"
    """Reduction of log-ratios over latent entries before the exponential."""
    buffer_size: PositiveInt = 32
    """Newest rewards of a prompt that its mean and std are taken of."""
    min_count: PositiveInt = 16
    """A prompt with fewer rewards in its buffer uses the whole round's mean and std."""
    max_advantage: PositiveFloat = 5.0
    """Advantages are clipped to plus and minus this."""

    @model_validator(mode="after")
    def _buffer_can_fill(self) -> Self:
        if self.min_count > self.buffer_size:
            raise ValueError(
                f"algorithm: min_count {self.min_count} is more than buffer_size {self.buffer_size} can ever hold"
            )
        return self

    @property
    def window(self) -> float | None:
        """Half-width of the window on one step, in the latent reduction."""
        return self.clip_range

    content: ClassVar[Content] = "trajectories"

    @property
    def max_lag(self) -> int | None:
        """Ratios are taken to the weights that sampled."""
        return 1


class SpinExact(Passes):
    """SPIN-Diffusion's trajectory objective: the logistic loss of whole trajectories' log-ratios (Yuan et al., arXiv
    2402.10210), against real images' teacher-forced trajectories."""

    name: Literal["spin_exact"]
    """The algorithm."""
    iterations: Annotated[tuple[Iteration, ...], Field(min_length=1)]
    """Iterations of self-play; their rounds add up to the recipe's."""
    spin_lambda: PositiveFloat = 2.0
    """Factor on the trajectory log-ratio, sum_sum; an inner problem solved contracts by 1 - 1/spin_lambda."""

    content: ClassVar[Content] = "trajectories"
    sources: ClassVar[tuple[SourceKind, ...]] = ("images", "pairs")
