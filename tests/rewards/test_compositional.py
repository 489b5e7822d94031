"""A share of yes: questions come from a file or from the judge, and every image is asked every one of its prompt's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.errors import RewardError
from rewards.compositional import Checklist, Compositional, read_checklists
from rewards.loading import build
from tests.rewards.judge_server import JudgeServer, Reply, chat, image_of, text_of

PROMPT = "a red and green square"
COLOURS = ("red", "green", "blue")
BLACK, RED, YELLOW, WHITE = (
    np.full((4, 4, 3), colour, np.uint8) for colour in ((0, 0, 0), (255, 0, 0), (255, 255, 0), (255, 255, 255))
)
IMAGES = np.stack([BLACK, YELLOW, RED, WHITE])
MADE = ["Is it red?", "Is it green?"]


def look(request: dict[str, Any]) -> Reply:
    """Sees whether a channel is bright, and makes questions of the colours that a prompt names."""
    text = text_of(request)
    if "Write at most" in text:
        return chat(json.dumps({"questions": [f"Is it {colour}?" for colour in COLOURS if f" {colour} " in text]}))
    channel = [f"Is it {colour}?" in text for colour in COLOURS].index(True)
    return chat(json.dumps({"answer": "yes" if image_of(request)[..., channel].mean() > 127 else "no"}))


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(look) as running:
        yield running


def checker(server: JudgeServer, **kwargs: Any) -> Compositional:
    made = build("compositional", {"base_url": server.base_url, "model": "eye", **kwargs})
    assert isinstance(made, Compositional)
    return made


def score(reward: Compositional, images: np.ndarray = IMAGES, prompt: str = PROMPT) -> list[float]:
    return asyncio.run(reward(images, [prompt] * len(images)))


def write(folder: Path, *lines: Any) -> str:
    file = folder / "questions.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(file)


def test_a_score_is_the_share_of_questions_that_are_answered_with_yes(server: JudgeServer) -> None:
    assert score(checker(server)) == [0, 1, 0.5, 1]
    assert Compositional.is_pure is False


def test_weights_count(server: JudgeServer, tmp_path: Path) -> None:
    file = write(tmp_path, {"prompt": PROMPT, "questions": MADE, "weights": [3, 1]}, "")
    assert score(checker(server, questions=file)) == [0, 1, 0.75, 1]
    assert not any("Write at most" in text_of(request) for request in server.requests)


def test_every_image_is_asked_every_question_of_its_own_prompt(server: JudgeServer, tmp_path: Path) -> None:
    lines = [{"prompt": "a", "questions": ["Is it red?", "Is it blue?", "Is it green?"]}]
    file = write(tmp_path, *lines, {"prompt": "b", "questions": ["Is it blue?"]})
    reward = checker(server, questions=file)
    assert asyncio.run(reward(IMAGES, ["a", "b", "b", "a"])) == [0, 0, 0, 1]
    assert len(server.requests) == 3 + 1 + 1 + 3
    assert score(reward, IMAGES[1:2], "a") == pytest.approx([2 / 3])


def test_a_prompts_questions_are_made_once(server: JudgeServer) -> None:
    reward = checker(server)
    assert score(reward) == score(reward)
    score(reward, prompt="a blue one")
    asked = [text_of(request) for request in server.requests if "Write at most 5" in text_of(request)]
    assert [PROMPT in text for text in asked] == [True, False]
    assert len(server.requests) == 2 + 2 * 4 * 2 + 4


def test_no_more_questions_are_kept_than_were_asked_for(server: JudgeServer) -> None:
    assert score(checker(server, num_questions=1)) == [0, 1, 1, 1]
    assert any("Write at most 1 " in text_of(request) for request in server.requests)


@pytest.mark.parametrize("made", [[], "Is it red?", [1], [""], None], ids=repr)
def test_a_judge_that_makes_no_questions_is_named_with_the_prompt(server: JudgeServer, made: Any) -> None:
    server.reply = lambda request: chat(json.dumps({"questions": made}))
    with pytest.raises(RewardError, match=f"questions for the prompt '{PROMPT}', gave no list of questions"):
        score(checker(server))


@pytest.mark.parametrize("answer", ["perhaps", "yes and no", None, 1, True, ["yes"]], ids=repr)
def test_an_answer_that_is_neither_yes_nor_no_is_named_with_prompt_image_and_question(
    server: JudgeServer, tmp_path: Path, answer: Any
) -> None:
    server.reply = lambda request: chat(json.dumps({"answer": answer}))
    reward = checker(server, questions=write(tmp_path, {"prompt": PROMPT, "questions": MADE[:1]}))
    with pytest.raises(RewardError, match=rf"'{PROMPT}', image 0, 'Is it red\?', answered neither yes nor no"):
        score(reward, IMAGES[:1])


@pytest.mark.parametrize(("answer", "share"), [("Yes.", 1), (" YES ", 1), ("No", 0)])
def test_capitals_spaces_and_a_full_stop_do_not_matter(
    server: JudgeServer, tmp_path: Path, answer: str, share: float
) -> None:
    server.reply = lambda request: chat(json.dumps({"answer": answer}))
    reward = checker(server, questions=write(tmp_path, {"prompt": PROMPT, "questions": MADE}))
    assert score(reward, IMAGES[:1]) == [share]


def test_a_prompt_without_questions_in_the_file_is_named_and_not_made_up(server: JudgeServer, tmp_path: Path) -> None:
    reward = checker(server, questions=write(tmp_path, {"prompt": "another", "questions": MADE}))
    with pytest.raises(RewardError, match=rf"no questions for a prompt in .*questions\.jsonl.*{PROMPT}"):
        score(reward)
    assert not server.requests


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '"text"',
        {"prompt": PROMPT},
        {"prompt": PROMPT, "questions": []},
        {"prompt": PROMPT, "questions": "Is it red?"},
        {"prompt": PROMPT, "questions": [" "]},
        {"prompt": 3, "questions": MADE},
        {"prompt": PROMPT, "questions": MADE, "weights": [1]},
        {"prompt": PROMPT, "questions": MADE, "weights": [1, 0]},
        {"prompt": PROMPT, "questions": MADE, "weights": [1, "x"]},
        {"prompt": PROMPT, "questions": MADE, "weights": [1, float("inf")]},
        {"prompt": PROMPT, "questions": MADE, "weight": [1, 1]},
    ],
    ids=str,
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: Any) -> None:
    file = write(tmp_path, {"prompt": "right", "questions": MADE}, line)
    with pytest.raises(RewardError, match=r"questions\.jsonl, line 2: no questions of a prompt"):
        read_checklists(Path(file))


def test_a_prompt_has_questions_once(tmp_path: Path) -> None:
    line = {"prompt": PROMPT, "questions": MADE}
    assert read_checklists(Path(write(tmp_path, line))) == {PROMPT: Checklist(tuple(MADE), (1.0, 1.0))}
    with pytest.raises(RewardError, match=f"line 3: a prompt has questions already.*{PROMPT}"):
        read_checklists(Path(write(tmp_path, line, "", line)))


def test_a_file_that_is_not_there_is_named(server: JudgeServer) -> None:
    with pytest.raises(RewardError, match=r"cannot read its questions.*nowhere\.jsonl"):
        checker(server, questions="nowhere.jsonl")
    with pytest.raises(RewardError, match="asks at least one question"):
        checker(server, num_questions=0)
