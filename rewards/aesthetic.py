"""How pleasing an image looks, 1 to 10: LAION's aesthetic predictor v2 (Schuhmann et al., arXiv 2210.08402)."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor, nn

from protocol.errors import RewardError
from rewards.pretrained import Clip, even_half, find_file, read_tensors

DOWNLOADS = "1.7 GB: openai/clip-vit-large-patch14, and 4 MB: trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth"
WIDTHS = (768, 1024, 128, 64, 16, 1)
LAYERS = (0, 2, 4, 6, 7)
"""Numbers of the linear layers in the published file; dropout stood between them when they were trained."""


class AestheticHead(nn.Module):
    """The predictor on top of CLIP: five linear layers without activations, named as in the published file."""

    def __init__(self) -> None:
        super().__init__()
        shapes = zip(LAYERS, itertools.pairwise(WIDTHS), strict=True)
        self.layers = nn.ModuleDict({str(number): nn.Linear(*widths) for number, widths in shapes})

    def forward(self, features_ND: Tensor) -> Tensor:
        """Returns scores (N,) for CLIP embeddings (N, 768) of unit length."""
        for layer in self.layers.values():
            features_ND = layer(features_ND)
        return features_ND.squeeze(-1)


class Aesthetic:
    """Predicted mean rating of an image by people; the prompt does not matter. DDPO (arXiv 2305.13301) trains on it.

    head: `sac+logos+ava1-l14-linearMSE.pth` or its copy in .safetensors, a folder or a repository of the hub that holds
    `aesthetic-model.pth`, which is the same file. The head runs in fp32, whatever the dtype of CLIP.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.head = load_head(head).to(device)
        self.clip = Clip("aesthetic", model, model, "1.7 GB", device, dtype)

    @torch.inference_mode()
    def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Returns N scores, fp32. Images are cropped as by OpenAI's own code, which the predictor was made with."""
        scores_N: np.ndarray = self.head(self.clip.image_features(images_NHW3, even_half)).cpu().numpy()
        return scores_N


def load_head(source: str) -> AestheticHead:
    """Returns the trained head, ready to judge. Raises RewardError where the file is missing or of another model."""
    path = find_file("aesthetic", source, "aesthetic-model.pth", "4 MB")
    head = AestheticHead()
    try:
        head.load_state_dict(read_tensors("aesthetic", path))
    except RuntimeError as error:
        raise RewardError(
            f"the weights {path} of reward aesthetic are of another model: {str(error)[:300]}",
            expected="the tensors of sac+logos+ava1-l14-linearMSE.pth",
        ) from error
    return head.eval()
