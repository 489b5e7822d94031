"""Reward for the embedded base model: how sure a digit classifier is of what the prompt says.

The score of one image is the sum of three log-probabilities, log p(digit) + log p(colour) + log p(ground), each
clamped below. The clamp keeps one hopeless image from dominating the mean and spread of its group.
`assets/make_classifier.py` trains the classifier on real handwritten digits; `assets/README.md` gives its accuracy.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from protocol.errors import RewardError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white")
IMAGE_SIZE = 32
CLASSIFIER_PATH = Path(__file__).resolve().parent.parent / "assets" / "digit-classifier.safetensors"

_GRAMMAR = re.compile(
    rf"an? (?P<colour>{'|'.join(COLOURS)}) (?P<digit>{'|'.join(DIGITS)})"
    rf" on an? (?P<ground>{'|'.join(COLOURS)}) ground"
)


class Said(NamedTuple):
    """What a prompt says, as class numbers: `a red seven on a blue ground` is `Said(7, 0, 4)`."""

    digit: int
    colour: int
    ground: int


def parse_prompt(prompt: str) -> Said:
    """The digit, its colour and the colour of the ground. Raises RewardError naming a prompt outside the grammar."""
    match = _GRAMMAR.fullmatch(" ".join(prompt.lower().split()).rstrip("."))
    if match is None:
        raise RewardError(
            "digit_alignment cannot read a prompt",
            value=prompt,
            expected="'a COLOUR DIGIT on a COLOUR ground', such as 'a red seven on a blue ground', with colours "
            f"{', '.join(COLOURS)} and digits {', '.join(DIGITS)}",
            do="use prompts of that form, such as those in assets/prompts_train.txt, or another reward",
        )
    return Said(DIGITS.index(match["digit"]), COLOURS.index(match["colour"]), COLOURS.index(match["ground"]))


class DigitClassifier(nn.Module):
    """A small convolutional network with three heads: digit, colour of the digit, colour of the ground."""

    def __init__(self, width: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_block(3, width, stride=1),
            *_block(width, 2 * width, stride=2),
            *_block(2 * width, 3 * width, stride=2),
            *_block(3 * width, 4 * width, stride=2),
            nn.Flatten(),
            nn.Dropout(dropout),
        )
        self.heads = nn.Linear(4 * width * (IMAGE_SIZE // 8) ** 2, len(DIGITS) + 2 * len(COLOURS))

    def forward(self, images_N3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, 10), (N, 9), (N, 9) for images of 32 by 32 pixels with values from -1 to 1."""
        logits = self.heads(self.trunk(images_N3HW))
        digit, colour, ground = logits.split([len(DIGITS), len(COLOURS), len(COLOURS)], dim=1)
        return digit, colour, ground


def _block(channels_in: int, channels_out: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]


def to_classifier_input(images_NHW3: np.ndarray) -> Tensor:
    """uint8 images (N, 32, 32, 3) as float32 (N, 3, 32, 32) from -1 to 1. Raises RewardError on another size."""
    if images_NHW3.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise RewardError(
            "digit_alignment cannot judge images of this size",
            value=images_NHW3.shape,
            expected=f"(N, {IMAGE_SIZE}, {IMAGE_SIZE}, 3), as assets/digits-base makes them",
            do="use the base model assets/digits-base, or another reward",
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images_NHW3)).float()
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1.0


class DigitAlignment:
    """Sum of the three log-probabilities of what the prompt says, each at least `floor`. Best value 0, worst 3 `floor`.

    classifier: path of the weights; empty for those in `assets/`.
    """

    def __init__(self, floor: float = -6.0, classifier: str = "") -> None:
        if not floor < 0:
            raise RewardError(
                "digit_alignment needs a negative floor", value=floor, expected="such as -6, a log-probability"
            )
        self.floor = floor
        self.classifier = load_classifier(Path(classifier) if classifier else CLASSIFIER_PATH)

    def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Scores (N,) float32."""
        log_probs_N3 = self.log_probs(images_NHW3, prompts)
        clamped_N3: np.ndarray = np.maximum(log_probs_N3, self.floor)
        return np.asarray(clamped_N3.sum(axis=1))

    def log_probs(self, images_NHW3: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Log-probability (N, 3) float32 of the digit, its colour and the ground that each prompt says, not clamped."""
        said_N3 = torch.tensor([parse_prompt(prompt) for prompt in prompts])
        chosen = [
            torch.log_softmax(logits, dim=1).gather(1, said_N3[:, k : k + 1])
            for k, logits in enumerate(self._logits(images_NHW3))
        ]
        return torch.cat(chosen, dim=1).numpy()

    def is_right(self, images_NHW3: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Whether (N, 3) bool the likeliest digit, colour and ground are the ones that each prompt says."""
        said_N3 = np.array([parse_prompt(prompt) for prompt in prompts])
        return np.asarray(self.likeliest(images_NHW3) == said_N3)

    def likeliest(self, images_NHW3: np.ndarray) -> np.ndarray:
        """Class numbers (N, 3) int64 of the likeliest digit, its colour and the ground."""
        return np.stack([logits.argmax(dim=1).numpy() for logits in self._logits(images_NHW3)], axis=1)

    @torch.inference_mode()
    def _logits(self, images_NHW3: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        logits: tuple[Tensor, Tensor, Tensor] = self.classifier(to_classifier_input(images_NHW3))
        return logits


def load_classifier(path: Path) -> DigitClassifier:
    """The trained classifier, ready to judge. Raises RewardError where the file is missing or torn."""
    if not path.is_file():
        raise RewardError(
            "digit_alignment finds no classifier weights",
            value=str(path),
            do="make them with `python -m assets.make_classifier`, or check the path",
        )
    classifier = DigitClassifier()
    try:
        classifier.load_state_dict(load_file(path))
    except Exception as error:  # safetensors raises its own type from Rust, torch a RuntimeError
        raise RewardError(
            f"the classifier weights {path} of digit_alignment cannot be read: {error}",
            expected="a file made by `python -m assets.make_classifier`",
        ) from error
    return classifier.eval()
