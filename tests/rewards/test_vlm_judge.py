"""A judge is asked over HTTP: by a real server here, which looks at the images, or fails in all the usual ways."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import RewardError
from rewards.contract import check_scores
from rewards.judge_client import LONGEST_BACKOFF_S, busy_wait_s, last_object
from rewards.loading import build
from rewards.vlm_judge import VlmJudge
from tests.rewards.judge_server import JudgeServer, Reply, chat, image_of, text_of

PROMPT = "a red seven"
GREYS = (0, 51, 255, 102, 204, 153)
IMAGES = np.stack([np.full((8, 8, 3), grey, np.uint8) for grey in GREYS])
MARKS = [grey / 25.5 for grey in GREYS]
HTML = "<html><body>502 Bad Gateway, says nginx</body></html>"


def brightness(request: dict[str, Any]) -> Reply:
    """Marks a white image with 10 and a black one with 0."""
    return chat(json.dumps({"reason": "light", "score": image_of(request).mean() / 25.5}))


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(brightness) as running:
        yield running


def judge(server: JudgeServer, **kwargs: Any) -> VlmJudge:
    """The reward as a recipe makes it."""
    made = build("vlm_judge", {"base_url": server.base_url, "model": "eye", **kwargs})
    assert isinstance(made, VlmJudge)
    return made


def score(reward: VlmJudge, images: np.ndarray = IMAGES) -> list[float]:
    return asyncio.run(reward(images, [PROMPT] * len(images)))


def test_each_image_gets_the_mark_that_the_judge_gave_to_it(server: JudgeServer) -> None:
    reward = judge(server)
    assert score(reward) == pytest.approx(MARKS)
    assert score(reward, IMAGES[::-1]) == pytest.approx(MARKS[::-1]), "in another event loop"
    assert check_scores("vlm_judge", score(reward), [PROMPT] * 6).shape == (6,)


def test_a_judge_is_impure_so_that_its_marks_are_logged() -> None:
    assert VlmJudge.is_pure is False
    assert asyncio.iscoroutinefunction(VlmJudge.__call__)


def test_a_request_says_all_that_matters_and_loses_nothing_of_the_image(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EYE_KEY", "sk-secret")
    image = np.random.Generator(np.random.Philox(1)).integers(0, 256, (1, 5, 7, 3), np.uint8)
    score(judge(server, api_key_env="EYE_KEY", seed=3, scale=(0, 10)), image)
    (request,) = server.requests
    assert np.array_equal(image_of(request), image[0])
    assert PROMPT in text_of(request)
    assert "from 0 (" in text_of(request)
    assert (request["model"], request["temperature"], request["seed"]) == ("eye", 0, 3)
    assert request["response_format"]["json_schema"]["schema"]["required"] == ["reason", "score"]
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"


def test_without_a_key_none_is_sent(server: JudgeServer) -> None:
    score(judge(server))
    assert not any("Authorization" in headers for headers in server.headers)


def test_fields_of_the_request_can_be_changed_and_taken_out(server: JudgeServer) -> None:
    score(judge(server, response_format="none", request={"max_tokens": None, "max_completion_tokens": 9}))
    assert all("max_tokens" not in request and request["max_completion_tokens"] == 9 for request in server.requests)
    assert not any("response_format" in request for request in server.requests)
    score(judge(server, response_format="json_object"))
    assert server.requests[-1]["response_format"] == {"type": "json_object"}


def test_a_question_of_ones_own_may_show_braces_and_prompts_are_not_read_as_templates(server: JudgeServer) -> None:
    reward = judge(server, question='{prompt}? From {low} to {high}, as {"score": 1}', scale=(0, 10.5))
    asyncio.run(reward(IMAGES[:1], ["a {low} {prompt} cat"]))
    assert text_of(server.requests[0]) == 'a {low} {prompt} cat? From 0 to 10.5, as {"score": 1}'


def test_siblings_are_asked_about_at_once_but_never_more_than_allowed(server: JudgeServer) -> None:
    three = threading.Barrier(3, timeout=20)

    def reply(request: dict[str, Any]) -> Reply:
        three.wait()
        return brightness(request)

    server.reply = reply
    assert score(judge(server, max_concurrency=3)) == pytest.approx(MARKS)
    assert server.most_open == 3


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((500, {}, "CUDA out of memory"), "answered HTTP 500.*CUDA out of memory"),
        ((502, {"Content-Type": "text/html"}, HTML), "answered HTTP 502.*says nginx"),
        ((200, {"Content-Type": "text/html"}, HTML), "not answer in the chat protocol.*says nginx"),
        ((200, {}, ""), "not answer in the chat protocol"),
        ((200, {}, "\udcff\udcfe"), "not answer in the chat protocol"),
        ((200, {}, "[" * 100_000), "not answer in the chat protocol"),
        ((200, {}, '{"choices": []}'), "not answer in the chat protocol"),
        ((200, {}, "[1, 2]"), "not answer in the chat protocol"),
        ((404, {}, "no such model"), "answered HTTP 404.*usually ends with /v1"),
        ((400, {}, "response_format is unknown"), "answered HTTP 400.*set it to json_object or none"),
        ((401, {}, "who are you?"), "answered HTTP 401.*api_key_env"),
        ((302, {"Location": "http://127.0.0.1:9/v1"}, ""), "answered HTTP 302"),
        (chat(None, refusal="I must not look"), "refused, or said nothing.*I must not look"),
        (chat("It is a fine image."), "no JSON object with 'score'.*a fine image"),
        (chat("8"), "no JSON object with 'score'"),
        (chat('{"mark": 8}'), "no JSON object with 'score'"),
        (chat('{"reason": "It is', finish_reason="length"), "cut off at max_tokens.*raise max_tokens"),
        (chat('{"score": "8"}'), "no number from 0 to 10.*'8'"),
        (chat('{"score": true}'), "no number from 0 to 10.*True"),
        (chat('{"score": NaN}'), "no number from 0 to 10.*nan"),
        (chat('{"score": 10.5}'), "no number from 0 to 10.*10.5"),
        (chat('{"score": -1}'), "no number from 0 to 10.*-1"),
        (chat('{"score": null}'), "no number from 0 to 10.*None"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_rubbish_is_an_error_that_names_endpoint_prompt_and_what_came(
    server: JudgeServer, reply: Reply, says: str
) -> None:
    server.reply = lambda request: reply
    with pytest.raises(RewardError, match=f"(?s){says}") as refused:
        score(judge(server), IMAGES[:1])
    assert f"eye at {server.base_url}/chat/completions" in str(refused.value)
    assert f"{PROMPT!r}, image 0" in str(refused.value)
    assert len(str(refused.value)) < 900


def test_one_rubbish_answer_fails_the_whole_group_and_no_mark_is_made_up(server: JudgeServer) -> None:
    server.reply = lambda request: brightness(request) if image_of(request).mean() != 102 else chat("no idea")
    with pytest.raises(RewardError, match="image 3, gave no JSON object"):
        score(judge(server))


def test_a_long_answer_is_shortened(server: JudgeServer) -> None:
    server.reply = lambda request: chat("x" * 5000)
    with pytest.raises(RewardError, match=r"x{300}\.\.\. \(5000 characters\)"):
        score(judge(server), IMAGES[:1])


def test_where_nobody_listens_the_endpoint_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(RewardError, match=f"{url}/chat.*'a red seven', image 0, cannot be talked to.*ConnectError"):
            score(VlmJudge(base_url=url, model="eye"), IMAGES[:1])


def test_a_judge_that_hangs_is_given_up_after_the_timeout(server: JudgeServer) -> None:
    released = threading.Event()

    def reply(request: dict[str, Any]) -> Reply:
        released.wait(20)
        return chat("too late")

    server.reply = reply
    with pytest.raises(RewardError, match=r"image 0, gave no answer within 0.3 s"):
        score(judge(server, timeout_s=0.3), IMAGES[:1])
    released.set()


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says_so(server: JudgeServer, status: int) -> None:
    replies = [(status, {"Retry-After": "0"}, "busy"), (status, {"Retry-After": "0.05"}, "busy")]
    server.reply = lambda request: replies.pop() if replies else brightness(request)
    assert score(judge(server), IMAGES[2:3]) == [10.0]
    assert len(server.requests) == 3


def test_a_server_that_is_busy_for_longer_than_the_timeout_fails_at_once(server: JudgeServer) -> None:
    server.reply = lambda request: (429, {"Retry-After": "3600"}, "your quota is used up")
    with pytest.raises(RewardError, match=r"answered HTTP 429.*quota is used up.*lower max_concurrency or raise"):
        score(judge(server, timeout_s=30), IMAGES[:1])
    assert len(server.requests) == 1


def test_any_other_failure_is_not_asked_again_here(server: JudgeServer) -> None:
    server.reply = lambda request: (500, {"Retry-After": "0"}, "broken")
    with pytest.raises(RewardError, match="HTTP 500"):
        score(judge(server), IMAGES[:1])
    assert len(server.requests) == 1


def test_waiting_is_as_long_as_the_server_says_or_doubles() -> None:
    assert busy_wait_s("7", 3) == 7
    assert busy_wait_s(" 0.5 ", 3) == 0.5
    assert [busy_wait_s(nothing, 2) for nothing in ("", "soon", "-3", "nan", "inf")] == [4] * 5
    assert [busy_wait_s("", attempt) for attempt in (0, 1, 5, 50)] == [1, 2, LONGEST_BACKOFF_S, LONGEST_BACKOFF_S]
    in_a_minute = format_datetime(datetime.now(UTC) + timedelta(minutes=1), usegmt=True)
    assert 55 < busy_wait_s(in_a_minute, 0) <= 60
    assert busy_wait_s(format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True), 0) == 0


def test_the_key_is_in_no_message_even_if_the_server_repeats_it(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EYE_KEY", "sk-secret")
    server.reply = lambda request: (401, {}, "wrong key sk-secret")
    with pytest.raises(RewardError, match="wrong key <the key>") as refused:
        score(judge(server, api_key_env="EYE_KEY"), IMAGES[:1])
    assert "sk-secret" not in str(refused.value)


def test_a_key_itself_is_refused_and_not_repeated(server: JudgeServer) -> None:
    with pytest.raises(RewardError, match=r"no name of an environment variable.*never belongs in a recipe") as refused:
        judge(server, api_key_env="sk-secret")
    assert "sk-secret" not in str(refused.value)
    with pytest.raises(RewardError, match="without user name or password") as refused:
        judge(server, base_url="https://me:sk-secret@judge.example/v1")
    assert "sk-secret" not in str(refused.value)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_variable_without_a_key_is_named(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("EYE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("EYE_KEY", value)
    with pytest.raises(RewardError, match=r"environment variable EYE_KEY.*is not set.*every node"):
        judge(server, api_key_env="EYE_KEY")


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"base_url": "judge:8000"}, "base_url cannot be used.*judge:8000"),
        ({"base_url": "ftp://judge/v1"}, "base_url cannot be used"),
        ({"base_url": ""}, "base_url cannot be used"),
        ({"timeout_s": 0}, "cannot work with these limits"),
        ({"max_concurrency": 0}, "cannot work with these limits"),
        ({"response_format": "xml"}, "unknown response_format.*'xml'"),
        ({"question": "Is it good?"}, r"does not say \{prompt\}"),
        ({"scale": (10, 0)}, "needs a scale"),
        ({"scale": (0, float("inf"))}, "needs a scale"),
        ({"scale": (1, 2, 3)}, "needs a scale"),
        ({"temprature": 1}, "unexpected keyword argument 'temprature'"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_when_the_reward_is_built(
    server: JudgeServer, kwargs: dict[str, Any], says: str
) -> None:
    with pytest.raises(RewardError, match=says):
        judge(server, **kwargs)


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 3}',
        '```json\n{"reason": "fine {but} pale", "score": 3}\n```',
        'I think of {"score": 9}, then again: {"score": 3}. {"done": true}',
        '<think>{ or {"score"?</think>\n{"nested": {"score": 4}, "score": 3}',
    ],
)
def test_the_last_object_with_the_key_is_the_answer(text: str) -> None:
    answer = last_object(text, "score")
    assert answer is not None
    assert answer["score"] == 3


@given(st.text(alphabet="{}[]:,score 0\\", max_size=40), st.integers(), st.text(alphabet="{}x ", max_size=10))
def test_an_object_is_found_after_whatever_was_said(before: str, number: int, after: str) -> None:
    assert last_object(f"{before}\n{json.dumps({'answer': number})}{after}", "answer") == {"answer": number}


def test_braces_without_end_are_no_object() -> None:
    assert last_object("{" * 1500, "score") is None
    assert last_object('{"score":' * 1500, "score") is None
    assert last_object("", "score") is None
