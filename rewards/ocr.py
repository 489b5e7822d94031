"""How well the text that the prompt quotes can be read in the image (Flow-GRPO, Liu et al., arXiv 2505.05470).

Read by RapidOCR's PP-OCRv6 models, which its wheel carries: nothing is downloaded at run time. Flow-GRPO reads with
PaddleOCR, so numbers are not comparable to its; the formula is. A prompt quotes text in double quotes:
`a shop sign that says "Open late"`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from protocol.errors import RewardError

PINS = ("rapidocr==3.10.0", "onnxruntime==1.32.0", "opencv-python-headless==5.0.0.93")
ENVIRONMENT = "0.3 GB"
EXAMPLE_PROMPT = 'a shop sign that says "Open late"'

QUOTED = re.compile(r'"([^"]+)"|“([^“”]+)”')


class Ocr:
    """max(0, 1 - edit distance / length of the quoted text): 1 where all of it can be read, 0 where nothing can.

    num_threads: CPU threads that read; part of the numerics, and `replicas` scale better. min_confidence: lines that
    the model is less sure of are not read; Flow-GRPO takes all.
    """

    def __init__(self, num_threads: int = 1, min_confidence: float = 0.0) -> None:
        from rapidocr import RapidOCR  # type: ignore[import-not-found]

        self._read = RapidOCR(
            params={
                "Global.log_level": "error",
                # As Flow-GRPO: no third model that turns lines which stand on their head.
                "Global.use_cls": False,
                "Global.text_score": min_confidence,
                "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> list[float]:
        """Returns N scores. Raises RewardError for a prompt without quoted text."""
        wanted = [quoted_text(prompt) for prompt in prompts]
        return [accuracy(self.lines(image), text) for image, text in zip(images_NHW3, wanted, strict=True)]

    def lines(self, image_HW3: np.ndarray) -> tuple[str, ...]:
        """Returns the lines of text in an image, from top to bottom and from left to right."""
        # OpenCV's channels run from blue to red.
        return tuple(self._read(np.ascontiguousarray(image_HW3[..., ::-1])).txts or ())


def quoted_text(prompt: str) -> str:
    """Returns what stands in double quotes, put together where it is more than one (Flow-GRPO takes the first only)."""
    found = "".join(straight or curly for straight, curly in QUOTED.findall(prompt))
    if not plain(found):
        raise RewardError(
            "ocr finds no text in double quotes in a prompt", value=prompt, expected='such as: a sign that says "Open"'
        )
    return found


def accuracy(lines: Sequence[str], wanted: str) -> float:
    """Returns 1 - edit distance / length, at least 0; 1 wherever the text stands whole among others (as Flow-GRPO)."""
    read, text = plain("".join(lines)), plain(wanted)
    if text in read:
        return 1.0
    return max(0.0, 1.0 - edit_distance(read, text) / len(text))


def plain(text: str) -> str:
    """Returns text in small letters without spaces. Wide forms count as plain ones: the model mixes them up."""
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def edit_distance(a: str, b: str) -> int:
    """Returns the fewest insertions, deletions and replacements of characters between two texts (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
