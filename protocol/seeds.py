"""Counter-derived seeds: every random number of a run has a key, none has a history.

A seed is a hash of (run seed, what it is for, its coordinates). No draw depends on rank, batch, order or on
how many draws came before it (algorithms.md 0.10), so any process can make any draw again at any time.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

SEED_BITS = 63
"""Seeds fit a signed 64-bit integer, which torch, numpy and the wire all take."""


class Purpose(StrEnum):
    """What a draw is for. Two purposes never share a stream of numbers."""

    SIBLING = "sibling"
    INITIAL_NOISE = "initial_noise"
    STEP_NOISE = "step_noise"
    PROMPT_ORDER = "prompt_order"
    ADAPTER_INIT = "adapter_init"
    ENCODER_INIT = "encoder_init"
    PARITY_PROBE = "parity_probe"
    EVALUATION = "evaluation"
    SOURCE = "source"
    TIMESTEP = "timestep"
    TRAINING_NOISE = "training_noise"
    PERCEPTION_NOISE = "perception_noise"
    PERCEPTION_TIMESTEP = "perception_timestep"
    SELECTION = "selection"
    PROMPT_DROPOUT = "prompt_dropout"
    POSTERIOR = "posterior"
    FLIP = "flip"
    TEACHER_FORCING = "teacher_forcing"
    EXCURSION_TIMESTEP = "excursion_timestep"
    EXCURSION_NOISE = "excursion_noise"


def derive_seed(root: int, purpose: Purpose, *coordinates: int | str) -> int:
    """Returns a seed in [0, 2**63) that depends on every argument and on nothing else."""
    key = "/".join([str(root), purpose.value, *map(_unambiguous, coordinates)])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


def draw_uniform(root: int, purpose: Purpose, *coordinates: int | str) -> float:
    """Returns a number drawn from [0, 1) by key."""
    # As many bits as a float holds: a larger number could round up to 1.
    drawn: float = (derive_seed(root, purpose, *coordinates) >> (SEED_BITS - 53)) / 2**53
    return drawn


def _unambiguous(coordinate: int | str) -> str:
    text = str(coordinate)
    return f"{len(text)}:{text}"
