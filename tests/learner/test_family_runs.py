"""Every algorithm on the other model families: the same learner, a network of another kind."""

from __future__ import annotations

import math
from typing import Any

import pytest

from protocol.algorithms import ALGORITHMS
from tests.learner.test_every_algorithm import CASES, Desk, T, desk, weights_of
from tests.models import make_tiny_flux_model, make_tiny_model, make_tiny_sd3_model, make_tiny_xl_model

__all__ = ["desk"]

pytestmark = pytest.mark.usefixtures("gang_of_one")

MAKE = {
    "v_prediction": lambda folder: make_tiny_model(folder, prediction_type="v_prediction"),
    "xl": make_tiny_xl_model,
    "sd3": make_tiny_sd3_model,
    "flux": make_tiny_flux_model,
}
FLOWS = ("sd3", "flux")
QUICK = {
    "v_prediction": ("ncp_dpo",),
    "xl": ("ncp_dpo",),
    "sd3": ("spin", "sharpening_rlhf", "policy_gradient_flow"),
    "flux": ("prdp",),
}
"""One of each content and the perceptual encoder, and what flows alone have; the rest is slow."""

TOLERANCE = 5e-6
"""Of a log-probability, latent_mean."""

FLOW_CASE = {
    **CASES["policy_gradient"],
    "algorithm": {"name": "policy_gradient", "clip_range": None, "kl_coef": 0.04, "kl_form": "flow_grpo"},
}
ALL = {**CASES, "policy_gradient_flow": FLOW_CASE}


def supported_cases() -> list[Any]:
    """Each family with each algorithm that is for what its network predicts: family, name, parts of a recipe."""
    found = []
    for family in MAKE:
        prediction = "flow" if family in FLOWS else "epsilon"
        for name, parts in ALL.items():
            supported = prediction in ALGORITHMS[parts["algorithm"]["name"]].predictions
            if supported and (family in FLOWS or name != "policy_gradient_flow"):
                marks = () if name in QUICK[family] else pytest.mark.slow
                found.append(pytest.param(family, name, parts, marks=marks, id=f"{family}-{name}"))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A recipe's model section for each family."""
    folder = tmp_path_factory.mktemp("models")
    lora = {"rank": 2, "alpha": 2}
    return {
        name: {"path": str(make(folder / name)), "trainable": lora, "resolution": 16} for name, make in MAKE.items()
    }


@pytest.mark.parametrize(("family", "name", "parts"), supported_cases())
def test_an_algorithm_learns_on_a_family(
    desk: Desk, models: dict[str, dict[str, Any]], family: str, name: str, parts: dict[str, Any]
) -> None:
    sampler = {"num_steps": T, **parts.get("sampler", {})}
    if family in FLOWS:
        sampler |= {"kernel": "flow_grpo", "eta": 0.7}
    # A group's batch and a micro-batch round differently, and guidance enlarges that.
    learner = {"learning_rate": 1e-3, "micro_batch_size": 8, "parity_tolerance": TOLERANCE}
    run = desk.run(f"{family}-{name}", {**parts, "sampler": sampler}, model=models[family], learner=learner)
    rows = run.train()
    assert all(math.isfinite(row["loss"]) for row in rows)
    published = [row["published_digest"] for row in run.lines("ledger.jsonl")]
    assert len(set(published)) > 1, "the weights have moved"
    assert all(tensor.isfinite().all() for tensor in weights_of(run).values())
    if rows[0]["parity/max_abs"] is not None:
        assert max(row["parity/max_abs"] for row in rows) < TOLERANCE
