"""Several rewards in one number. Every part is kept beside the sum."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def weighted_sum(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Returns sum(weight * score) as fp32 (G,), added up in fp64 in the order of `weights`."""
    if parts.keys() != weights.keys():
        raise ValueError(f"scores of {sorted(parts)} do not go with weights of {sorted(weights)}")
    total = sum(weight * parts[name].astype(np.float64) for name, weight in weights.items())
    return np.asarray(total, dtype=np.float32)


def named_scores(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Returns scores by the names that they have in a group: `reward_G`, the weighted sum, and each part as
    `reward_<label>_G`, all fp32 (G,). Without rewards there are no scores."""
    if not (parts or weights):
        return {}
    return {"reward_G": weighted_sum(parts, weights), **{f"reward_{label}_G": part for label, part in parts.items()}}
