"""How people would rate an image for its prompt: PickScore (Kirstain et al., Pick-a-Pic, arXiv 2305.01569)."""

from __future__ import annotations

import numpy as np

from rewards.pretrained import Clip

DOWNLOADS = "3.9 GB: yuvalkirstain/PickScore_v1 and the tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore:
    """exp(logit scale) * cosine of image and prompt in a CLIP-H that was tuned on people's choices.

    As in the released code before its softmax, and not divided by anything: about 17 to 25. Others divide by 26 or 100;
    a weight in the recipe does that. Images are resized by Pillow, as by the processor that the model came out with.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.clip = Clip("pick_score", model, tokenizer, "3.9 GB", device, dtype)

    def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Returns N scores, fp32."""
        return self.clip.logit_scale * self.clip.cosines(images_NHW3, prompts)
