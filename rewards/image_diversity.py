"""How far an image is from its siblings in a frozen embedding: the mean of 1 - cosine to each of them.

The mean over a group is its mean pairwise distance, the diversity that collapses when a reward is hacked. Cosine and
not L2: what CLIP was trained by, between 0 and 2 in every embedding, and blind to an embedding's length, which tells
contrast and confidence rather than content.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from protocol.errors import RewardError
from rewards.digit_alignment import CLASSIFIER_PATH, IMAGE_SIZE, load_classifier, to_classifier_input
from rewards.pretrained import Clip

CLIP_SIZE = "0.6 GB for ViT-B/32, 1.7 GB for ViT-L/14"

Embed = Callable[[np.ndarray], Tensor]
"""uint8 images (N, H, W, 3) -> (N, E)."""


class ImageDiversity:
    """Mean distance to the siblings, from 0 (all the same) to 2.

    embedding: `digits`, what the digit classifier sees, for the embedded base model; or a CLIP model, as a folder or a
    repository of the hub such as `openai/clip-vit-base-patch32` (0.6 GB), of type dtype.
    """

    group_wise = True

    def __init__(self, embedding: str = "digits", device: str = "cpu", dtype: str = "float32") -> None:
        if embedding == "digits":
            self._embed = digits_embedding(device)
        else:
            self._embed = clip_embedding(embedding, device, dtype)

    @torch.inference_mode()
    def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Returns (N,) float64; each depends on all images."""
        if len(images_NHW3) < 2:
            raise RewardError(
                "image_diversity compares siblings, and an image has none",
                value=f"a group of {len(images_NHW3)}, on the prompts {prompts}",
                expected="group_size of at least 2",
            )
        return mean_distance(self._embed(images_NHW3).double().cpu()).numpy()


def mean_distance(embedding_NE: Tensor) -> Tensor:
    """Returns (N,): 1 - cosine, averaged over the other rows. Raises RewardError where a row is zero or not finite."""
    length_N1 = embedding_NE.norm(dim=1, keepdim=True)
    if not (torch.isfinite(length_N1).all() and (length_N1 > 0).all()):
        raise RewardError("an embedding is zero or not finite, so it has no direction", value=length_N1[:, 0].tolist())
    unit_NE = embedding_NE / length_N1
    distance_NN = (1.0 - unit_NE @ unit_NE.T).clamp(min=0.0)
    distance_N: Tensor = distance_NN.fill_diagonal_(0.0).sum(dim=1) / (len(unit_NE) - 1)
    return distance_N


def digits_embedding(device: str) -> Embed:
    """Returns the trunk of the digit classifier, E = 1024, for images of 32 by 32 pixels."""
    trunk: nn.Sequential = load_classifier(CLASSIFIER_PATH).to(device).trunk

    def embed(images_NHW3: np.ndarray) -> Tensor:
        if images_NHW3.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise RewardError(
                "image_diversity's embedding `digits` cannot see images of this size",
                value=images_NHW3.shape,
                expected=f"(N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3), as assets/digits-base makes them",
                do="give a CLIP model as `embedding`, or images of the embedded base model",
            )
        features: Tensor = trunk(to_classifier_input(images_NHW3).to(device))
        return features

    return embed


def clip_embedding(name: str, device: str, dtype: str) -> Embed:
    """Returns CLIP's image embedding (Radford et al., arXiv 2103.00020)."""
    return Clip("image_diversity", name, name, CLIP_SIZE, device, dtype).image_features
