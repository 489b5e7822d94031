"""What the tests of the model's mathematics share: a small random model on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models import make_tiny_model, make_tiny_xl_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny Stable Diffusion pipeline that predicts noise."""
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="session")
def tiny_xl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion XL pipeline, whose autoencoder is to be upcast."""
    return make_tiny_xl_model(tmp_path_factory.mktemp("tiny_xl") / "model")


@pytest.fixture(scope="session")
def tiny_velocity_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same networks, said to predict v."""
    folder = tmp_path_factory.mktemp("tiny_v") / "model"
    return str(make_tiny_model(folder, prediction_type="v_prediction"))
