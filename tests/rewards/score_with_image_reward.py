"""Run by the python of image_reward's own environment: random weights, our scores and the package's, as JSON.

    python score_with_image_reward.py FOLDER < {"images": .npy path, "prompts": [...]}

FOLDER, the repository's folder in the cache of HF_HOME, has med_config.json and gets ImageReward.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

# torchvision's wheels need a CUDA build of torch to import; on a CPU build these two operators are missing.
_library = torch.library.Library("torchvision", "DEF")
if not torch.cuda.is_available():
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import ImageReward as package  # noqa: E402, N813
from ImageReward.ImageReward import ImageReward as Network  # noqa: E402
from PIL import Image  # noqa: E402

from rewards.image_reward import ImageReward  # noqa: E402


def write_random_weights(folder: Path) -> None:
    """The last layers are drawn larger than the package does, which would make all scores equal to six digits."""
    torch.manual_seed(0)
    network = Network(med_config=str(folder / "med_config.json"))
    for layer in network.mlp.layers:
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    torch.save(network.state_dict(), folder / "ImageReward.pt")


def main() -> None:
    """Prints {"ours": [...], "theirs": [...], "bfloat16": [...]}."""
    folder, told = Path(sys.argv[1]), json.load(sys.stdin)
    images, prompts = np.load(told["images"]), told["prompts"]
    write_random_weights(folder)
    theirs = package.load(str(folder / "ImageReward.pt"), device="cpu", med_config=str(folder / "med_config.json"))
    pairs = zip(prompts, images, strict=True)
    scores = {
        "theirs": [theirs.score(prompt, Image.fromarray(image)) for prompt, image in pairs],
        "ours": ImageReward()(images, prompts).tolist(),
        "bfloat16": ImageReward(model=str(folder), dtype="bfloat16")(images, prompts).tolist(),
    }
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
