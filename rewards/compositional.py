"""Share of yes/no questions about a prompt's parts that a vision-language model answers with yes.

Diffusion-Sharpening (arXiv 2502.12146) rewards composition, which it takes from IterComp's trained reward model
(arXiv 2410.07171). We ask a judge instead, as TIFA (arXiv 2303.11897) and Davidsonian Scene Graphs (arXiv 2310.18235)
do: one request a question and image, so that no answer leans on another; a group of G images with Q questions costs G Q
requests. Unlike the latter we let no question depend on another's answer.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protocol.errors import RewardError
from rewards.judge_client import Endpoint, Judge, Question, png_data_url

MAKE_QUESTIONS = """\
A text-to-image model was given the prompt: {prompt}

Write at most {num_questions} questions that together check whether an image shows what the prompt asks for: each thing,
its number, its colour and other attributes, its place and its relation to others. Each question is about one of these,
can be answered with yes or no from the image alone, and the answer is yes where the image is right. Leave out what the
prompt does not say. Answer with nothing but a JSON object: "questions", a list of strings.
"""
ANSWER_QUESTION = """\
Look at the image. {question}

Answer with nothing but a JSON object: "answer", which is "yes" or "no". Where you cannot tell, the answer is "no".
"""
LIST_SCHEMAS = {"questions": {"type": "array", "items": {"type": "string"}}}
ANSWER_SCHEMAS = {"answer": {"type": "string", "enum": ["yes", "no"]}}
LINE = '{"prompt": "two cats", "questions": ["Are there cats?", "Are there two?"], "weights": [1, 2]}, weights optional'


class Checklist(NamedTuple):
    """One prompt's questions and what each counts: `Checklist(("Are there cats?", "Are there two?"), (1.0, 2.0))`."""

    questions: tuple[str, ...]
    weights: tuple[float, ...]


class Compositional:
    """The weighted share of yes, from 0 to 1.

    questions: a JSON-lines file with every prompt's questions; empty: the model is asked for up to `num_questions` of a
    prompt when it first comes, and this actor keeps them as long as it lives. Other actors may get others, so scores of
    different groups compare better with a file. endpoint: see judge_client.Endpoint.
    """

    is_pure = False

    def __init__(self, questions: str = "", num_questions: int = 5, **endpoint: Any) -> None:
        if num_questions < 1:
            raise RewardError("compositional asks at least one question", value=num_questions)
        self._judge = Judge(Endpoint(**endpoint))
        self._file, self._num_questions = questions, num_questions
        self._checklists = read_checklists(Path(questions)) if questions else {}

    async def __call__(self, images_NHW3: np.ndarray, prompts: list[str]) -> list[float]:
        """Returns N shares; all questions about all images are asked concurrently."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._checklists:
                self._checklists[prompt] = await self._make_checklist(prompt)
        lists = [self._checklists[prompt] for prompt in prompts]
        asked = [
            question
            for number, (image_HW3, prompt, checklist) in enumerate(zip(images_NHW3, prompts, lists, strict=True))
            for question in _ask_about(number, png_data_url(image_HW3), prompt, checklist)
        ]
        answers = await self._judge.ask(asked)
        yes = iter([self._is_yes(question, answer) for question, answer in zip(asked, answers, strict=True)])
        return [sum(weight * next(yes) for weight in checklist.weights) / sum(checklist.weights) for checklist in lists]

    async def _make_checklist(self, prompt: str) -> Checklist:
        if self._file:
            raise RewardError(
                f"compositional finds no questions for a prompt in {self._file}",
                value=prompt,
                expected=f"a line {LINE}",
            )
        text = MAKE_QUESTIONS.replace("{num_questions}", str(self._num_questions)).replace("{prompt}", prompt)
        question = Question(f"questions for the prompt {prompt!r}", text, "questions", LIST_SCHEMAS)
        (made,) = await self._judge.ask([question])
        if not (isinstance(made, list) and made and all(isinstance(each, str) and each.strip() for each in made)):
            raise self._judge.error(question, "gave no list of questions", got=repr(made))
        kept = tuple(made[: self._num_questions])
        return Checklist(kept, (1.0,) * len(kept))

    def _is_yes(self, question: Question, answer: Any) -> bool:
        word = answer.strip().rstrip(".").lower() if isinstance(answer, str) else ""
        if word not in ("yes", "no"):
            raise self._judge.error(question, "answered neither yes nor no", got=repr(answer))
        return bool(word == "yes")


def read_checklists(file: Path) -> dict[str, Checklist]:
    """Returns the questions by prompt. Raises RewardError naming the file and the line."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RewardError(
            f"compositional cannot read its questions: {error}", value=str(file.expanduser().absolute())
        ) from error
    checklists: dict[str, Checklist] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            prompt, checklist = _read_line(line, f"{file}, line {number}")
            if prompt in checklists:
                raise RewardError(f"{file}, line {number}: a prompt has questions already", value=prompt)
            checklists[prompt] = checklist
    return checklists


def _read_line(line: str, place: str) -> tuple[str, Checklist]:
    try:
        entry = json.loads(line)
        questions = tuple(entry["questions"])
        weights = tuple(float(weight) for weight in entry.get("weights", (1,) * len(questions)))
        texts = (entry["prompt"], *questions)
        right = questions and all(isinstance(text, str) and text.strip() for text in texts)
        right = right and len(weights) == len(questions) and all(0 < weight < math.inf for weight in weights)
    except (ValueError, LookupError, TypeError, AttributeError):
        right = False
    if not right or isinstance(entry["questions"], str) or entry.keys() - {"prompt", "questions", "weights"}:
        raise RewardError(f"{place}: no questions of a prompt", value=line, expected=LINE)
    return entry["prompt"], Checklist(questions, weights)


def _ask_about(number: int, image_url: str, prompt: str, checklist: Checklist) -> list[Question]:
    return [
        Question(
            f"the prompt {prompt!r}, image {number}, {text!r}",
            ANSWER_QUESTION.replace("{question}", text),
            "answer",
            ANSWER_SCHEMAS,
            image_url,
        )
        for text in checklist.questions
    ]
