"""The forward process of a model: how much noise a latent holds at each timestep that the model was trained on.

    VariancePreserving   x = sqrt(abar) x0 + sqrt(1 - abar) noise     the network predicts noise, v or x0
    Flow                 x = (1 - s) x0 + s noise                     the network predicts the velocity, noise - x0

Timesteps are indices, 0 the cleanest. What a regression is taken against, and so what "error" means, is the noise for
the one and the velocity for the other (algorithms.md 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffusion.kernels import PredictionType, predicted_noise_and_clean
from diffusion.schedules import NoiseLevel, StepConstants, make_flow_schedule, make_schedule, noise_level

TargetType = Literal["epsilon", "flow"]


@dataclass(frozen=True)
class VariancePreserving:
    """A diffusion model's: alpha_bar (M,), its cumulative signal levels, M 1000 as a rule."""

    alpha_bar: Tensor

    target_type: ClassVar[TargetType] = "epsilon"

    def __len__(self) -> int:
        return len(self.alpha_bar)

    def level(self, timestep_N: Tensor) -> NoiseLevel:
        """Returns the levels of N timesteps."""
        return noise_level(self.alpha_bar, timestep_N)

    def told(self, timestep_N: Tensor) -> Tensor:
        """Returns what the network is told of N timesteps: themselves."""
        return timestep_N

    def target(self, noise_NCHW: Tensor, clean_NCHW: Tensor) -> Tensor:  # noqa: ARG002
        """Returns what the network's error is taken against: the noise."""
        return noise_NCHW

    def predicted_target(
        self, state_NCHW: Tensor, output_NCHW: Tensor, timestep_N: Tensor, prediction_type: PredictionType
    ) -> Tensor:
        """Returns what a network's output says of the target."""
        return predicted_noise_and_clean(state_NCHW, output_NCHW, self.level(timestep_N), prediction_type)[0]

    def steps(self, timestep_M: Tensor, eta: float) -> StepConstants:
        """Returns DDIM's constants at falling timesteps, the last step of which lands on the clean latent."""
        return make_schedule(self.alpha_bar, timestep_M, kernel="ddim", eta=eta, last_step="unscored")


@dataclass(frozen=True)
class Flow:
    """A flow-matching model's (Lipman et al., arXiv 2210.02747; Esser et al., arXiv 2403.03206): share_M (M,) fp64,
    rising to 1, the noise's share s of a latent at each timestep of training, shifted as the model's scheduler says."""

    share_M: Tensor

    target_type: ClassVar[TargetType] = "flow"

    def __len__(self) -> int:
        return len(self.share_M)

    def level(self, timestep_N: Tensor) -> NoiseLevel:
        """Returns the levels of N timesteps."""
        share_N = self.share_M[timestep_N]
        return NoiseLevel(timestep_N, 1 - share_N, share_N)

    def told(self, timestep_N: Tensor) -> Tensor:
        """Returns what the network is told of N timesteps: their share of noise, in thousandths, fp32."""
        return told_share(self.share_M[timestep_N])

    def target(self, noise_NCHW: Tensor, clean_NCHW: Tensor) -> Tensor:
        """Returns what the network's error is taken against: the velocity."""
        return noise_NCHW - clean_NCHW

    def predicted_target(
        self,
        state_NCHW: Tensor,  # noqa: ARG002
        output_NCHW: Tensor,
        timestep_N: Tensor,  # noqa: ARG002
        prediction_type: PredictionType,  # noqa: ARG002
    ) -> Tensor:
        """Returns what a network's output says of the target: it is the velocity."""
        return output_NCHW

    def steps(self, timestep_M: Tensor, eta: float) -> StepConstants:
        """Returns the constants of Euler's steps at falling timesteps, with DanceGRPO's noise for eta above 0; the last
        step lands on the clean latent."""
        return make_flow_schedule(self.share_M[timestep_M], timestep_M, kernel="dance_grpo", eta=eta)


Process = VariancePreserving | Flow


def told_share(share_N: Tensor) -> Tensor:
    """Returns shares of noise as flow networks are told them: in thousandths, fp32."""
    return (1000 * share_N).to(torch.float32)
