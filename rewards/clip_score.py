"""How well an image fits its prompt: CLIPScore (Hessel et al., arXiv 2104.08718)."""

from __future__ import annotations

import numpy as np

from rewards.pretrained import Clip

DOWNLOADS = "1.7 GB: openai/clip-vit-large-patch14"


class ClipScore:
    """2.5 * max(cosine of image and prompt, 0), the paper's equation of section 3; with `plain` the cosine itself.

    The paper uses CLIP's ViT-B/32 and puts "A photo depicts" before a caption; here the larger ViT-L/14 is the default,
    as reward papers use it, and the prompt is read as it is. `model` may name any CLIP; its tokenizer is taken from
    there, or from `tokenizer`.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        tokenizer: str = "",
        plain: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.clip = Clip("clip_score", model, tokenizer or model, "1.7 GB", device, dtype)
        self.plain = plain

    def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Returns N scores, fp32."""
        cosines_N = self.clip.cosines(images_NHW3, prompts)
        return cosines_N if self.plain else 2.5 * np.maximum(cosines_N, 0)
