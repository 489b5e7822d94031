"""Every algorithm on Stable Diffusion XL: the same learner, a network that is told more."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.learner.test_every_algorithm import CASES, Desk, desk, parameters, weights_of
from tests.models import make_tiny_xl_model

__all__ = ["desk"]

pytestmark = pytest.mark.usefixtures("gang_of_one")
QUICK = ("prdp", "spin", "ncp_dpo", "sharpening_rlhf")
"""One of each content, and the perceptual encoder; the rest is slow."""


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe's model section."""
    folder = make_tiny_xl_model(tmp_path_factory.mktemp("xl") / "model")
    return {"path": str(folder), "trainable": {"rank": 2, "alpha": 2}}


@parameters(QUICK)
def test_an_algorithm_learns_on_xl(desk: Desk, xl: dict[str, Any], name: str) -> None:
    run = desk.run(f"xl-{name}", CASES[name], model=xl)
    rows = run.train()
    assert all(math.isfinite(row["loss"]) for row in rows)
    published = [row["published_digest"] for row in run.lines("ledger.jsonl")]
    assert len(set(published)) > 1, "the weights have moved"
    assert all(tensor.isfinite().all() for tensor in weights_of(run).values())
    if rows[0]["parity/max_abs"] is not None:
        assert max(row["parity/max_abs"] for row in rows) < 1e-6
