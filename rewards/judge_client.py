"""Asking a vision-language model through an OpenAI-compatible endpoint: what the rewards that judge share.

    reward --- questions of one group --> Judge --- at most max_concurrency at once --> .../chat/completions
           <-- answers, in their order --             <-- one JSON object a question ---

Nothing is guessed: an answer without the key asked for is an error that names endpoint and prompt. The grader that was
published with Diffusion-Sharpening (arXiv 2502.12146) takes the last number of any answer, and 7.0 where there is none.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import itertools
import json
import os
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx2
import numpy as np
from PIL import Image

from protocol.errors import RewardError

BUSY = (429, 503)
LONGEST_BACKOFF_S = 30.0
SHOWN_CHARACTERS = 300
ADVICE = {
    400: "if the server knows no such response_format, set it to json_object or none; `request` changes other fields",
    401: "check the key in the environment variable that api_key_env names",
    404: "check base_url, which usually ends with /v1, and model",
    429: "lower max_concurrency or raise timeout_s",
    503: "lower max_concurrency or raise timeout_s",
}


@dataclass(frozen=True)
class Endpoint:
    """Where and how a judge is asked: part of the reward's `kwargs` in a recipe.

    A worked example: Endpoint(base_url="http://10.0.0.5:8000/v1", model="Qwen/Qwen2.5-VL-7B-Instruct").
    """

    base_url: str
    """What comes before /chat/completions; usually ends with /v1."""
    model: str
    """Name of the model, as the server knows it."""
    api_key_env: str = ""
    """Name of the environment variable that holds the key, on every node that runs the reward; empty: no key."""
    timeout_s: float = 120.0
    """Longest time one question may take, waiting while the server is busy included."""
    max_concurrency: int = 8
    """Most questions that one actor has open at once."""
    max_tokens: int = 512
    """Longest answer."""
    seed: int = 0
    """Sent along; together with temperature 0 it makes answers steadier, but no server promises that they repeat."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """What the server can be told about the form of answers."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the request, or other values of ours; null takes a field out. Such as `{max_tokens: null,
    max_completion_tokens: 2000}`, or vLLM's `{chat_template_kwargs: {enable_thinking: false}}`."""

    def __post_init__(self) -> None:
        """Raises RewardError."""
        _check_url(self.base_url)
        _check_variable(self.api_key_env)
        if not (self.timeout_s > 0 and self.max_concurrency >= 1 and self.max_tokens >= 1):
            raise RewardError(
                "a judge cannot work with these limits",
                value=(self.timeout_s, self.max_concurrency, self.max_tokens),
                expected="timeout_s above 0, max_concurrency and max_tokens at least 1",
            )
        if self.response_format not in ("json_schema", "json_object", "none"):
            raise RewardError(
                "unknown response_format", value=self.response_format, expected="json_schema, json_object or none"
            )


@dataclass(frozen=True)
class Question:
    """What is asked once. A worked example: Question("the prompt 'a cat', image 2", "Is there a cat?", "answer",
    {"answer": {"type": "string"}}, "data:image/png;base64,iVBOR...").
    """

    about: str
    """What an error says that the question was about."""
    text: str
    """What the model reads, after the image: a server that caches prefixes then reads an image once."""
    key: str
    """What is wanted of the answer, a JSON object."""
    schemas: Mapping[str, Any]
    """JSON schemas of the values of all keys of the answer, in the order of answering."""
    image_url: str = ""
    """A data URL; empty: no image."""


class Judge:
    """Asks the questions of a group concurrently. It holds no connection between calls, so any event loop will do."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._url = f"{endpoint.base_url.rstrip('/')}/chat/completions"
        self._key = os.environ[endpoint.api_key_env].strip() if endpoint.api_key_env else ""

    async def ask(self, questions: Sequence[Question]) -> list[Any]:
        """Returns one JSON value a question: what its answer has under its key. Raises RewardError at a failure."""
        slots = asyncio.Semaphore(self._endpoint.max_concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        try:
            async with (
                httpx2.AsyncClient(verify=_certificates(), headers=headers, timeout=None) as client,
                asyncio.TaskGroup() as group,
            ):
                tasks = [group.create_task(self._ask_one(client, slots, question)) for question in questions]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    def error(self, question: Question, what: str, *, got: str, do: str = "") -> RewardError:
        """Returns what to raise about an answer: it names endpoint and prompt, shortens what came, hides the key."""
        shown = got.replace(self._key, "<the key>") if self._key else got
        if len(shown) > SHOWN_CHARACTERS:
            shown = f"{shown[:SHOWN_CHARACTERS]}... ({len(shown)} characters)"
        return RewardError(
            f"the judge {self._endpoint.model} at {self._url}, asked about {question.about}, {what}", value=shown, do=do
        )

    async def _ask_one(self, client: httpx2.AsyncClient, slots: asyncio.Semaphore, question: Question) -> Any:
        timeout_s = self._endpoint.timeout_s
        async with slots:
            try:
                async with asyncio.timeout(timeout_s):
                    response = await self._post(client, question)
            except TimeoutError:
                raise self.error(
                    question, f"gave no answer within {timeout_s:g} s", got="", do="raise timeout_s, or lower the load"
                ) from None
            except httpx2.HTTPError as error:
                raise self.error(
                    question, "cannot be talked to", got=f"{type(error).__name__}: {error}", do="check that it runs"
                ) from error
        return self._read(question, response)

    async def _post(self, client: httpx2.AsyncClient, question: Question) -> httpx2.Response:
        """Returns the answer; a busy server is asked again when it says so, as long as time is left."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._endpoint.timeout_s
        for attempt in itertools.count():
            response = await client.post(self._url, json=self._body(question))
            wait_s = busy_wait_s(response.headers.get("Retry-After", ""), attempt)
            if response.status_code not in BUSY or clock() + wait_s >= deadline:
                break
            await asyncio.sleep(wait_s)
        return response

    def _body(self, question: Question) -> dict[str, Any]:
        endpoint = self._endpoint
        image = [{"type": "image_url", "image_url": {"url": question.image_url}}] if question.image_url else []
        fields = {
            "model": endpoint.model,
            "messages": [{"role": "user", "content": [*image, {"type": "text", "text": question.text}]}],
            "temperature": 0,
            "seed": endpoint.seed,
            "max_tokens": endpoint.max_tokens,
            "response_format": _response_format(endpoint.response_format, question.schemas),
            **endpoint.request,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _read(self, question: Question, response: httpx2.Response) -> Any:
        if response.status_code != 200:
            what = f"answered HTTP {response.status_code}"
            raise self.error(question, what, got=response.text, do=ADVICE.get(response.status_code, ""))
        try:
            choice = response.json()["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise self.error(
                question, "did not answer in the chat protocol", got=response.text, do=ADVICE[404]
            ) from None
        if not isinstance(text, str):
            raise self.error(question, "refused, or said nothing", got=json.dumps(choice))
        answer = last_object(text, question.key)
        if answer is None:
            cut = choice.get("finish_reason") == "length"
            what = f"gave no JSON object with {question.key!r}" + (", cut off at max_tokens" if cut else "")
            raise self.error(question, what, got=text, do="raise max_tokens" if cut else "")
        return answer[question.key]


def png_data_url(image_HW3: np.ndarray) -> str:
    """Returns a uint8 image (H, W, 3) as the data URL of a PNG, which loses nothing."""
    buffer = io.BytesIO()
    Image.fromarray(image_HW3).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def last_object(text: str, key: str) -> dict[str, Any] | None:
    """Returns the last JSON object in a text that has the key: models think aloud first, and fence what they answer."""
    decoder, found, position = json.JSONDecoder(), None, text.find("{")
    while position >= 0:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end = position + 1
        else:
            found = value if key in value else found
        position = text.find("{", end)
    return found


def busy_wait_s(retry_after: str, attempt: int) -> float:
    """Returns how long a busy server wants us to wait: Retry-After in seconds or as a date, else 1, 2, 4, ... 30 s."""
    if re.fullmatch(r"\d+(\.\d+)?", retry_after.strip()):
        return float(retry_after)
    try:
        until = parsedate_to_datetime(retry_after)
    except (ValueError, TypeError):
        return min(2.0**attempt, LONGEST_BACKOFF_S)
    return max((until.astimezone(UTC) - datetime.now(UTC)).total_seconds(), 0.0)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The machine's certificates: reading them takes longer than asking a near server."""
    return httpx2.create_ssl_context()


def _response_format(form: str, schemas: Mapping[str, Any]) -> dict[str, Any] | None:
    if form == "none":
        return None
    if form == "json_object":
        return {"type": form}
    schema = {"type": "object", "properties": dict(schemas), "required": list(schemas), "additionalProperties": False}
    return {"type": form, "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def _check_url(base_url: str) -> None:
    try:
        url = httpx2.URL(base_url)
    except (httpx2.InvalidURL, TypeError):
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.userinfo:
        raise RewardError(
            "a judge's base_url cannot be used",
            value="<a URL with a password in it>" if url.userinfo else base_url,
            expected="an address such as http://10.0.0.5:8000/v1, without user name or password",
        )


def _check_variable(name: str) -> None:
    if name and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise RewardError(
            "api_key_env is no name of an environment variable",
            expected="a name such as JUDGE_API_KEY; a key itself never belongs in a recipe, which is kept with the run",
        )
    if name and not os.environ.get(name, "").strip():
        raise RewardError(
            f"the environment variable {name}, which holds the judge's key, is not set",
            do="set it on every node before Ray starts there, or leave out api_key_env where no key is needed",
        )
