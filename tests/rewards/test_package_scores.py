"""image_reward and hpsv2 in the environments that their pins make, against the packages' own `score`.

The weights are random, since tests have no network; the code that reads them is the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.environments import environment_of, make
from protocol.paths import ROOT
from rewards.contract import probe_images
from rewards.loading import declared
from tests.rewards.hub_cache import add_repository

pytestmark = pytest.mark.slow

PROMPTS = ["a red cat", "two dogs", "two dogs", f"{'a very long prompt ' * 20}"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
MED_CONFIG = {
    **{"model_type": "bert", "hidden_size": 768, "encoder_width": 768, "num_attention_heads": 12},
    **{"num_hidden_layers": 2, "intermediate_size": 256, "hidden_act": "gelu", "add_cross_attention": True},
    **{"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.02},
    **{"layer_norm_eps": 1e-12, "max_position_embeddings": 512, "pad_token_id": 0, "type_vocab_size": 2},
    # The package adds two tokens of its own.
    "vocab_size": len(VOCABULARY) + 2,
}
"""ImageReward's own, with 2 layers for 12."""


@pytest.fixture(scope="module", autouse=True)
def _environments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Environments of these tests' own, removed at their end."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFUMATO_CACHE", str(cache))
        yield
    shutil.rmtree(cache)


@pytest.fixture
def images() -> np.ndarray:
    """Four images that are higher than wide; the first two are the same."""
    images = np.ascontiguousarray(probe_images(4, 96)[:, :, :64])
    images[1] = images[0]
    return images


def scores_of(name: str, folder: Path, hub: Path, images: np.ndarray, **told: Any) -> Any:
    """What `score_with_<name>.py` prints when the environment's python runs it without a network."""
    environment = environment_of(name, declared(name).pins)
    for _ in make(environment):
        pass
    np.save(hub / "images.npy", images)
    done = subprocess.run(
        [environment.python, ROOT / "tests" / "rewards" / f"score_with_{name}.py", folder],
        input=json.dumps({"images": str(hub / "images.npy"), "prompts": PROMPTS, **told}),
        env={**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def differ(scores: list[float]) -> bool:
    """Whether another prompt for the same image, and another image for the same prompt, change the score."""
    return abs(scores[0] - scores[1]) > 1e-3 and abs(scores[1] - scores[2]) > 1e-3


def test_image_reward_scores_as_its_package_does(tmp_path: Path, images: np.ndarray) -> None:
    add_repository(tmp_path, "bert-base-uncased", {"vocab.txt": "\n".join(VOCABULARY).encode()})
    folder = add_repository(tmp_path, "THUDM/ImageReward", {"med_config.json": json.dumps(MED_CONFIG).encode()})
    scores = scores_of("image_reward", folder, tmp_path, images)
    assert differ(scores["theirs"]), scores["theirs"]
    assert scores["ours"] == pytest.approx(scores["theirs"], abs=1e-5)
    assert scores["bfloat16"] == pytest.approx(scores["theirs"], abs=0.05)


def test_hpsv2_scores_as_its_package_does_in_both_versions(tmp_path: Path, images: np.ndarray) -> None:
    base = add_repository(tmp_path, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", {})
    folder = add_repository(tmp_path, "xswu/HPSv2", {})
    scores = scores_of("hpsv2", folder, tmp_path, images, base=str(base))
    assert scores["theirs"]["v2.0"] != pytest.approx(scores["theirs"]["v2.1"], abs=1e-3)
    for version, theirs in scores["theirs"].items():
        assert differ(theirs), theirs
        assert scores["ours"][version] == pytest.approx(theirs, abs=1e-6)
    assert scores["bfloat16"] == pytest.approx(scores["theirs"]["v2.1"], abs=0.01)
