"""The settings of each algorithm: what `algorithm` in a recipe may hold. The algorithms are in learner/algorithms/.

Betas go by the names of what they multiply (algorithms.md 0.3): `beta_half` and `beta_full` differ by a factor of 2,
`kl_weight` and `spin_lambda` are other things again, and a bare `beta` is refused.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from protocol.algorithms.base import Content, Fraction, Iteration, Passes, Prediction, SourceKind
from protocol.algorithms.excursions import Excursion, SharpeningRlhf, SharpeningSft
from protocol.algorithms.images import (
    Cpo,
    Dpo,
    ImageAlgorithm,
    NcpCpo,
    NcpDpo,
    NcpSft,
    Pairs,
    Perception,
    Sft,
    Spin,
    SpinIteration,
)
from protocol.algorithms.trajectories import Ddpo, PolicyGradient, Prdp, SpinExact

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Content",
    "Cpo",
    "Ddpo",
    "Dpo",
    "Excursion",
    "Fraction",
    "ImageAlgorithm",
    "Iteration",
    "NcpCpo",
    "NcpDpo",
    "NcpSft",
    "Pairs",
    "Passes",
    "Perception",
    "PolicyGradient",
    "Prdp",
    "Prediction",
    "Sft",
    "SharpeningRlhf",
    "SharpeningSft",
    "SourceKind",
    "Spin",
    "SpinExact",
    "SpinIteration",
]

Algorithm = Annotated[
    Prdp
    | PolicyGradient
    | Ddpo
    | SpinExact
    | Sft
    | Dpo
    | Cpo
    | NcpSft
    | NcpDpo
    | NcpCpo
    | Spin
    | SharpeningSft
    | SharpeningRlhf,
    Field(discriminator="name"),
]
"""What `algorithm` in a recipe may hold."""

ALGORITHMS: dict[str, type[Passes]] = {
    get_args(kind.model_fields["name"].annotation)[0]: kind for kind in get_args(get_args(Algorithm)[0])
}
"""All of them, by name."""
