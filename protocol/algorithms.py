"""The settings of each algorithm: what `algorithm` in a recipe may hold. The algorithms are in learner/algorithms/."""

from __future__ import annotations

from typing import Literal

from protocol.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section


class Prdp(Section):
    """PRDP: proximal reward difference prediction (Deng et al., arXiv 2402.08714)."""

    name: Literal["prdp"]
    """The algorithm's module in learner/algorithms/."""
    kl_weight: PositiveFloat
    """w: the regression target is the reward difference divided by it, in the reductions below."""
    clip_eps: NonNegativeFloat | None
    """Half-width of the proximal window on one step's log-ratio, after the latent reduction; null: none."""
    num_updates: PositiveInt = 1
    """K: passes of inner updates over a round."""
    inner_minibatches: PositiveInt = 1
    """Optimizer steps a pass is split into."""
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
    def num_steps_per_round(self) -> int:
        """Optimizer steps in a round."""
        return self.num_updates * self.inner_minibatches
