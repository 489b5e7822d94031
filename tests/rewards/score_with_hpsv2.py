"""Run by the python of hpsv2's own environment: small random weights, our scores and the package's, as JSON.

    python score_with_hpsv2.py FOLDER < {"base": a folder, "images": .npy path, "prompts": [...]}

FOLDER, the repository's folder in the cache of HF_HOME, gets the two versions' checkpoints, and `base` the one that the
package loads before them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

# torchvision's wheels need a CUDA build of torch to import; on a CPU build these two operators are missing.
_library = torch.library.Library("torchvision", "DEF")
if not torch.cuda.is_available():
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from PIL import Image  # noqa: E402

from rewards.hpsv2 import FILES, Hpsv2, import_package  # noqa: E402

SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""Takes the place of ViT-H-14, which has a billion parameters."""


def write_random_weights(open_clip: Any, base: Path, folder: Path) -> None:
    """Each file has other weights, so that it shows which one was read."""
    with tempfile.TemporaryDirectory() as configurations:
        (Path(configurations) / "ViT-H-14.json").write_text(json.dumps(SMALL))
        open_clip.add_model_config(configurations)
    for seed, path in enumerate((base / "open_clip_pytorch_model.bin", *(folder / name for name in FILES.values()))):
        torch.manual_seed(seed)
        state = open_clip.create_model("ViT-H-14").state_dict()
        torch.save({"epoch": 1, "state_dict": state} if seed else state, path)


def main() -> None:
    """Prints {"theirs": {version: [...]}, "ours": {version: [...]}, "bfloat16": [...]}."""
    folder, told = Path(sys.argv[1]), json.load(sys.stdin)
    images, prompts = np.load(told["images"]), told["prompts"]
    write_random_weights(import_package(), Path(told["base"]), folder)
    import hpsv2 as package

    def their_scores(version: str) -> list[float]:
        pairs = zip(prompts, images, strict=True)
        return [float(package.score(Image.fromarray(image), text, version)[0]) for text, image in pairs]

    scores = {
        "theirs": {version: their_scores(version) for version in FILES},
        "ours": {version: Hpsv2(version)(images, prompts).tolist() for version in FILES},
        "bfloat16": Hpsv2(model=str(folder), dtype="bfloat16")(images, prompts).tolist(),
    }
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
