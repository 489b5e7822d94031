"""What end-to-end tests share: a workshop with a tiny model, and each run made once however many tests look at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.runs import Run, finished, sfumato
from tests.models import make_tiny_model

RECIPE = {
    "seed": 0,
    "rounds": 3,
    "model": {"path": "model"},
    "prompts": {"train": "prompts.txt", "held_out": "held_out.txt"},
    "batch": {"num_groups": 4, "group_size": 4},
    "sampler": {"num_steps": 4},
    # Kilobytes of tiny images hardly differ; the weight makes gradients of an ordinary size.
    "rewards": [{"name": "jpeg_compressibility", "weight": 100.0}],
    "algorithm": {"name": "prdp", "kl_weight": 1e-2, "clip_eps": 1e-2, "num_updates": 2},
    "learner": {"world_size": 1, "learning_rate": 1e-3, "micro_batch_size": 16},
    "redis": {"claim_idle_s": 3.0, "reissue_after_s": 3.0},
    "checkpoints": {"every_rounds": 2},
    "evaluation": {"images_per_prompt": 2, "grid_prompts": 2, "grid_images": 3},
}


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with model/, prompts.txt, held_out.txt and recipe.yaml."""
    folder = tmp_path_factory.mktemp("workshop")
    make_tiny_model(folder / "model")
    (folder / "prompts.txt").write_text("a red seven\na blue one\na green two\n")
    (folder / "held_out.txt").write_text("a red one\na blue two\na green seven\n")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return folder


@pytest.fixture(scope="session")
def train(workshop: Path) -> Callable[..., Run]:
    """Trains with overrides: `train("lag=1", "rollouts=2")`. Asked again, gives the run that is there."""
    made: dict[frozenset[str], Run] = {}

    def train_(*overrides: str) -> Run:
        key = frozenset(overrides)
        if key not in made:
            folder = workshop / f"run-{len(made)}"
            process = sfumato("train", "recipe.yaml", "--run-dir", folder, *overrides, cwd=workshop)
            made[key] = finished(process, folder)
        return made[key]

    return train_
