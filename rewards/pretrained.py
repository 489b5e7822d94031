"""Pretrained models for rewards: files from a folder or the Hugging Face hub, and CLIP as a measure of likeness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from protocol.errors import RewardError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLIP_FILES = "config.json model.safetensors"
TOKENIZER_FILES = "vocab.json merges.txt tokenizer.json tokenizer_config.json"
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def find_file(reward: str, source: str, name: str, size: str) -> Path:
    """Returns where a model's file is: `source` itself, `name` in the folder `source`, or `name` of that repository
    of the hub, fetched once into the cache that `hf download` fills. Raises RewardError where it is nowhere."""
    path = Path(source).expanduser()
    if path.is_dir():
        path /= name
    if path.is_file():
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name))
    except (OSError, ValueError) as error:
        raise not_found(reward, source, name, size, error) from error


def not_found(reward: str, source: str, names: str, size: str, error: Exception) -> RewardError:
    """Returns the error that says which files are missing, how large they are and how to fetch them."""
    said = next(iter(str(error).strip().splitlines()), "")[:200]
    fetch = (
        f"run `hf download {source} {names}` ({size}) on every node, or on one with HF_HOME on a shared disk; "
        "or give a folder with these files as a keyword argument of the reward"
    )
    is_path = source.startswith((".", "/", "~")) or Path(source).exists()
    return RewardError(
        f"reward {reward} finds no {names} of {source}, neither on this machine nor on the hub "
        f"({type(error).__name__}: {said})",
        value=source,
        expected=f"a folder that holds {names}, or a repository of the Hugging Face hub",
        do=f"put {names} there ({size})" if is_path else fetch,
    )


def read_tensors(reward: str, path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a .safetensors file or of a torch file, on the CPU. Code in a torch file is not run.

    Raises RewardError for a file that holds anything but named tensors.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors and torch's unpickler raise types of their own
        raise RewardError(
            f"reward {reward} cannot read the weights {path}: {type(error).__name__}: {str(error)[:200]}",
            do="fetch the file again",
        ) from error
    if not (isinstance(tensors, dict) and all(isinstance(value, Tensor) for value in tensors.values())):
        raise RewardError(f"reward {reward} finds no tensors by name in {path}", value=type(tensors).__name__)
    return tensors


def to_dtype(reward: str, dtype: str) -> torch.dtype:
    """Returns the type of a model's weights and activations by name. Raises RewardError on any other name."""
    if dtype not in DTYPES:
        raise RewardError(f"reward {reward} does not know this dtype", value=dtype, expected=f"one of {list(DTYPES)}")
    return DTYPES[dtype]


def lower_half(excess: int) -> int:
    """Returns where transformers begins a centre crop: half of what is too much, rounded down."""
    return excess // 2


def even_half(excess: int) -> int:
    """Returns where torchvision, and so OpenAI's CLIP, begins a centre crop: half, rounded to the nearest, or even."""
    return round(excess / 2)


def clip_pixels(images_NHW3: np.ndarray, size: int, crop_start: Callable[[int], int] = lower_half) -> Tensor:
    """Returns uint8 images (N, H, W, 3) as CLIP wants them, fp32 (N, 3, size, size): the shorter edge resized to `size`
    by Pillow's bicubic filter, the centre cut out, and standardised (Radford et al., arXiv 2103.00020).

    The same numbers as transformers' CLIPImageProcessorPil with its defaults. Written out here since transformers
    chooses another filter where torchvision is installed, and a score must not depend on that.
    """
    height, width = images_NHW3.shape[1:3]
    short = min(height, width)
    resized = (int(size * width / short), int(size * height / short))
    left, top = (crop_start(edge - size) for edge in resized)
    pixels_NHW3 = np.stack(
        [
            np.asarray(Image.fromarray(image).resize(resized, Image.Resampling.BICUBIC))[
                top : top + size, left : left + size
            ]
            for image in images_NHW3
        ]
    )
    unit_NHW3 = (pixels_NHW3 * (1 / 255)).astype(np.float32)
    standard_NHW3 = (unit_NHW3 - CLIP_MEAN) / CLIP_STD
    return torch.from_numpy(standard_NHW3).permute(0, 3, 1, 2).contiguous()


class Clip:
    """A CLIP model in transformers' layout, loaded once.

    model, tokenizer: folders, or repositories of the hub. size: of the model's files, for whoever must fetch them.
    """

    def __init__(self, reward: str, model: str, tokenizer: str, size: str, device: str, dtype: str) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self.dtype = to_dtype(reward, dtype)
        self.device = device
        try:
            loaded, report = CLIPModel.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise not_found(reward, model, CLIP_FILES, size, error) from error
        if report["missing_keys"]:
            raise RewardError(
                f"reward {reward} finds no CLIP model in {model}: it lacks {len(report['missing_keys'])} tensors",
                value=sorted(report["missing_keys"])[0],
                expected="the weights of transformers' CLIPModel",
            )
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer)
            # transformers makes an empty tokenizer where it finds no vocabulary.
            if (size_of := len(self.tokenizer)) != (expected := loaded.config.text_config.vocab_size):
                raise ValueError(f"a tokenizer of {size_of} words for a model of {expected}")
        except (OSError, ValueError) as error:
            raise not_found(reward, tokenizer, TOKENIZER_FILES, "3 MB", error) from error
        self.image_size = int(loaded.config.vision_config.image_size)
        self.max_tokens = int(loaded.config.text_config.max_position_embeddings)
        self.logit_scale = float(loaded.logit_scale.detach().exp())
        self.model = loaded.eval().to(device, self.dtype)

    @torch.inference_mode()
    def image_features(self, images_NHW3: np.ndarray, crop_start: Callable[[int], int] = lower_half) -> Tensor:
        """Returns embeddings of unit length, fp32 (N, D), of uint8 images (N, H, W, 3). One forward for all."""
        pixels = clip_pixels(images_NHW3, self.image_size, crop_start).to(self.device, self.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.inference_mode()
    def text_features(self, prompt: str) -> Tensor:
        """Returns the embedding of unit length, fp32 (D,), of a prompt, cut where the model's positions end."""
        tokens = self.tokenizer(prompt, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        return _unit(self.model.get_text_features(**tokens.to(self.device)).pooler_output)[0]

    @torch.inference_mode()
    def cosines(self, images_NHW3: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Returns the cosine, fp32 (N,), between each image and its prompt. Equal prompts are read once."""
        text_D = {prompt: self.text_features(prompt) for prompt in dict.fromkeys(prompts)}
        text_ND = torch.stack([text_D[prompt] for prompt in prompts])
        cosines_N: np.ndarray = (self.image_features(images_NHW3) * text_ND).sum(dim=-1).cpu().numpy()
        return cosines_N


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
