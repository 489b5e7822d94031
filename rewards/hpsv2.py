"""How people would rate an image for its prompt: HPS v2 and v2.1 (Wu et al., arXiv 2306.09341)."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from protocol.errors import RewardError
from rewards.pretrained import find_file, to_dtype

PINS = (
    "hpsv2==1.2.0",
    "open_clip_torch==3.3.0",
    "transformers==4.57.6",
    "huggingface-hub==0.36.2",
    "timm==1.0.31",
)
ENVIRONMENT = "0.2 GB"
DOWNLOADS = "2 GB: xswu/HPSv2 HPS_v2.1_compressed.pt (for version v2.0: HPS_v2_compressed.pt)"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


class Hpsv2:
    """Cosine of image and prompt in a CLIP-H that was tuned on people's choices, about 0.2 to 0.35.

    Not times 100, as the package's `score` returns it; papers often print it times 100, which a weight does. That one
    reads its checkpoint again in each call, takes an image a forward, and rounds its scores to fp16 on a GPU; here it
    is read once, a group is one forward, and features and cosine are fp32 after a network of `dtype`.
    model: a folder with the version's file, the file, or the repository on the hub.
    """

    def __init__(
        self, version: str = "v2.1", model: str = "xswu/HPSv2", device: str = "cpu", dtype: str = "float32"
    ) -> None:
        if version not in FILES:
            raise RewardError(
                "reward hpsv2 does not know this version", value=version, expected=f"one of {list(FILES)}"
            )
        self.dtype = to_dtype("hpsv2", dtype)
        self.device = device
        weights = find_file("hpsv2", model, FILES[version], "2 GB")
        open_clip = import_package()
        self.network, _, self.preprocess = open_clip.create_model_and_transforms(
            "ViT-H-14", str(weights), precision=PRECISIONS[dtype], device=device, light_augmentation=True
        )
        self.network.eval()
        self.tokenize = open_clip.get_tokenizer("ViT-H-14")

    @torch.inference_mode()
    def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Returns N scores, fp32. An image that is not square is padded with black, as the package does it."""
        pixels = torch.stack([self.preprocess(Image.fromarray(image)) for image in images_NHW3])
        image_ND = self.network.encode_image(pixels.to(self.device, self.dtype)).float()
        distinct = list(dict.fromkeys(prompts))
        text_D = self.network.encode_text(self.tokenize(distinct).to(self.device)).float()
        text_ND = text_D[[distinct.index(prompt) for prompt in prompts]]
        scores_N: np.ndarray = torch.cosine_similarity(image_ND, text_ND).cpu().numpy()
        return scores_N


def import_package() -> Any:
    """Returns the package's own copy of open_clip, which does not import as it comes from PyPI.

    It imports `turtle`, and with it Tk, for a name that it never uses; and its wheel lacks the vocabulary, which
    open_clip_torch has.
    """
    sys.modules.setdefault("turtle", ModuleType("turtle")).__dict__.setdefault("forward", None)
    vocabulary = _folder("hpsv2") / "src" / "open_clip" / VOCABULARY
    if not vocabulary.exists():
        _copy(_folder("open_clip") / VOCABULARY, vocabulary)
    import hpsv2.src.open_clip as open_clip  # type: ignore[import-not-found]

    return open_clip


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise RewardError(f"reward hpsv2 needs the package {package}", do=f"install {', '.join(PINS)}")
    return Path(spec.origin).parent


def _copy(source: Path, target: Path) -> None:
    """Several actors may do this at once: the file appears whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            copy = Path(folder) / target.name
            copy.write_bytes(source.read_bytes())
            copy.replace(target)
    except OSError as error:
        raise RewardError(
            f"reward hpsv2 cannot put {target.name}, which its package lacks, beside it: {error}",
            do=f"copy {source} to {target}",
        ) from error
