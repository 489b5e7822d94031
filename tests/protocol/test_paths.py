"""Prompts that stand for a file are taken evenly from all of it."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from protocol.paths import spread


@given(st.integers(1, 50), st.integers(1, 60))
def test_a_spread_is_even_and_in_order(num_items: int, at_most: int) -> None:
    items = [f"{number:03d}" for number in range(num_items)]
    chosen = spread(items, at_most)
    assert len(chosen) == min(num_items, at_most) == len(set(chosen))
    assert chosen == sorted(chosen)
    assert chosen[0] == items[0]
    gaps = np.diff([int(item) for item in [*chosen, f"{num_items:03d}"]])
    assert gaps.max() - gaps.min() <= 1


def test_a_spread_without_a_limit_is_everything() -> None:
    assert spread(["a", "b"], None) == ["a", "b"]
