"""What people read of a step's metrics: spreads need both moments, and every window's clipping has one name."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

from learner.algorithms import prdp

CLIP_FRACTIONS = ("prdp/saturated_fraction", "pg/clip_fraction")


def summarise(means: dict[str, float]) -> dict[str, float]:
    """Returns the metrics of one optimizer step from means over all ranks."""
    if "prdp/product_mean" in means:
        means = prdp.summarise(means)
    summary = dict(means)
    _replace(summary, "pairs/margin_square", "pairs/margin_std", lambda square: square - means["pairs/margin"] ** 2)
    _replace(summary, "pg/advantage_square", "pg/advantage_rms", lambda square: square)
    for name in CLIP_FRACTIONS:
        if name in summary:
            summary["clip_fraction"] = summary[name]
    return summary


def _replace(summary: dict[str, float], square: str, std: str, variance: Callable[[float], float]) -> None:
    if square in summary:
        summary[std] = sqrt(max(0.0, variance(summary.pop(square))))
