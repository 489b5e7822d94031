"""How people would rate an image for its prompt: ImageReward (Xu et al., arXiv 2304.05977)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from protocol.errors import RewardError
from rewards.pretrained import find_file, not_found, read_tensors, to_dtype

PINS = (
    "image-reward==1.5",
    "transformers==4.40.2",
    "timm==0.6.13",
    "fairscale==0.4.13",
    "huggingface-hub==0.25.2",
    "datasets==2.21.0",
    "accelerate==0.34.2",
    "diffusers==0.27.2",
    "peft==0.11.1",
    "clip-anytorch==2.6.0",
    "setuptools<81",
)
ENVIRONMENT = "0.2 GB"
DOWNLOADS = "1.8 GB: THUDM/ImageReward ImageReward.pt med_config.json, and 1 MB: the tokenizer of bert-base-uncased"
MAX_TOKENS = 35
UNUSED = ("blip.vision_proj.", "blip.text_proj.")
"""Layers of BLIP's that the score does not pass through."""


class ImageReward:
    """BLIP's reading of image and prompt, then five linear layers; standardised as the package does it, about -2 to 2.

    model: a folder with ImageReward.pt and med_config.json, or their repository on the hub. The package itself asks the
    hub's cache for the tokenizer of bert-base-uncased. Of the package we use the network and its transform, and score a
    group in one forward; its own `score` takes an image at a time. With a smaller dtype the last layers stay in fp32.
    """

    def __init__(self, model: str = "THUDM/ImageReward", device: str = "cpu", dtype: str = "float32") -> None:
        self.dtype = to_dtype("image_reward", dtype)
        self.device = device
        self.network = load_network(model, device)
        self.network.blip.to(self.dtype)

    @torch.inference_mode()
    def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Returns N scores, fp32."""
        blip = self.network.blip
        tokens = blip.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        pixels = torch.stack([self.network.preprocess(Image.fromarray(image)) for image in images_NHW3])
        seen = blip.visual_encoder(pixels.to(self.device, self.dtype))
        read = blip.text_encoder(
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=self.device),
            return_dict=True,
        )
        rewards = self.network.mlp(read.last_hidden_state[:, 0].float()).squeeze(-1)
        scores_N: np.ndarray = ((rewards - self.network.mean) / self.network.std).cpu().numpy()
        return scores_N


def load_network(model: str, device: str) -> Any:
    """Returns the package's network with its weights, ready to judge. Raises RewardError where a part is missing."""
    weights = find_file("image_reward", model, "ImageReward.pt", "1.8 GB")
    config = find_file("image_reward", model, "med_config.json", "1 kB")
    network = _make_network(config, device)
    missing = network.load_state_dict(read_tensors("image_reward", weights), strict=False).missing_keys
    needed = {name for name, _ in network.named_parameters() if not name.startswith(UNUSED)}
    if lacking := sorted(needed.intersection(missing)):
        raise RewardError(
            f"the weights {weights} of reward image_reward lack {len(lacking)} tensors of the network",
            value=lacking[0],
            expected="the tensors of THUDM/ImageReward's ImageReward.pt",
        )
    return network.eval().to(device)


def _make_network(config: Path, device: str) -> Any:
    from ImageReward.ImageReward import ImageReward as Network  # type: ignore[import-not-found]

    try:
        return Network(med_config=str(config), device=device)
    except (OSError, ValueError) as error:
        files = "vocab.txt tokenizer.json tokenizer_config.json config.json"
        raise not_found("image_reward", "bert-base-uncased", files, "1 MB", error) from error
