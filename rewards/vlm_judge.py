"""A mark by a vision-language model through an OpenAI-compatible endpoint (vLLM, SGLang, Ollama, OpenAI, ...).

In the manner of Diffusion-Sharpening's grader (arXiv 2502.12146), which asks GPT-4o for marks from 0 to 10. Its longer
template, with marks for five aspects and an overall one, can be given as `question`, if it asks for a "score".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from protocol.errors import RewardError
from rewards.judge_client import Endpoint, Judge, Question, png_data_url

QUESTION = """\
This image was made by a text-to-image model from the prompt: {prompt}

How good is it? Look at whether everything that the prompt asks for is there, with the right number, colour and place,
and at how well it is drawn. Give a mark from {low} (nothing is right) to {high} (nothing is to be improved); use the
whole scale, and fractions. Answer with nothing but a JSON object: a short "reason", then the "score".
"""
SCHEMAS = {"reason": {"type": "string"}, "score": {"type": "number"}}


class VlmJudge:
    """The judge's mark of each image, on the scale as it is.

    question: what is asked about an image; {prompt}, {low} and {high} are filled in. The answer must be a JSON object
    with a number called "score". scale: least and greatest mark. endpoint: see judge_client.Endpoint.
    """

    is_pure = False

    def __init__(self, question: str = QUESTION, scale: Sequence[float] = (0, 10), **endpoint: Any) -> None:
        if "{prompt}" not in question:
            raise RewardError("vlm_judge's question does not say {prompt}", value=question)
        if len(scale) != 2 or not -math.inf < scale[0] < scale[1] < math.inf:
            raise RewardError("vlm_judge needs a scale", value=scale, expected="two finite numbers, the lower first")
        self._question, (self._low, self._high) = question, scale
        self._judge = Judge(Endpoint(**endpoint))

    async def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> list[float]:
        """Returns N marks; the images are asked about concurrently."""
        questions = [self._ask_about(*pair) for pair in enumerate(zip(images_NHW3, prompts, strict=True))]
        answers = await self._judge.ask(questions)
        return [self._mark(question, answer) for question, answer in zip(questions, answers, strict=True)]

    def _ask_about(self, number: int, pair: tuple[np.ndarray, str]) -> Question:
        image_HW3, prompt = pair
        # Not str.format: a question may show a JSON object. The prompt last, so that nothing in it is filled in.
        text = self._question.replace("{low}", f"{self._low:g}").replace("{high}", f"{self._high:g}")
        about = f"the prompt {prompt!r}, image {number}"
        return Question(about, text.replace("{prompt}", prompt), "score", SCHEMAS, png_data_url(image_HW3))

    def _mark(self, question: Question, score: Any) -> float:
        if isinstance(score, bool) or not isinstance(score, int | float) or not self._low <= score <= self._high:
            raise self._judge.error(
                question, f"gave a score that is no number from {self._low:g} to {self._high:g}", got=repr(score)
            )
        return float(score)
