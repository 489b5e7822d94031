"""How scores are named on their way, and how several become one number. Every part is kept beside the sum.

reward actors           a group on the wire                       a group that is learnt from
label -> (N,)   -->     reward_<label>_G, or of M states    -->   those and reward_G (of M states also
                        a candidate state_reward_<label>_GM       reward_<label>_G and state_reward_GM)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from protocol.roles import Fixed, Reward

TOTAL, STATE_TOTAL = "reward_G", "state_reward_GM"


def part_name(label: str) -> str:
    """Returns the field of a reward's scores, one a sibling."""
    return f"reward_{label}_G"


def state_part_name(label: str) -> str:
    """Returns the field of a reward's scores, one a state of each candidate."""
    return f"state_reward_{label}_GM"


def labels_in(names: Iterable[str]) -> list[str]:
    """Returns the labels of the rewards whose parts are among a group's fields, sorted."""
    ends = (("reward_", "_G"), ("state_reward_", "_GM"))
    parts = {
        name[len(start) : -len(end)]
        for name in names
        for start, end in ends
        if name.startswith(start) and name.endswith(end) and name not in (TOTAL, STATE_TOTAL)
    }
    return sorted(parts)


def weighted_sum(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Returns sum(weight * score) as fp32, added up in fp64 in the order of `weights`."""
    if parts.keys() != weights.keys():
        raise ValueError(f"scores of {sorted(parts)} do not go with weights of {sorted(weights)}")
    total = sum(weight * parts[name].astype(np.float64) for name, weight in weights.items())
    return np.asarray(total, dtype=np.float32)


def plain_total(parts: Mapping[str, np.ndarray], rewards: Sequence[Reward]) -> np.ndarray:
    """Returns the sum as one set of images by itself has it, fp32: a running normalisation, which is the run's, is left
    out, so that base and tuned weights are measured alike."""
    scores = {reward.label: parts[reward.label].astype(np.float64) for reward in rewards}
    for reward in rewards:
        if isinstance(reward.normalise, Fixed):
            scores[reward.label] = (scores[reward.label] - reward.normalise.mean) / reward.normalise.std
    return weighted_sum(scores, {reward.label: reward.weight for reward in rewards})
