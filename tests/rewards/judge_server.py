"""A real HTTP server that speaks the chat protocol and judges images by looking at their pixels."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Reply = tuple[int, dict[str, str], str]
"""HTTP status, headers, body."""


def chat(content: Any, **choice: Any) -> Reply:
    """An answer of the chat protocol with this content."""
    body = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop", **choice}]}
    return 200, {"Content-Type": "application/json"}, json.dumps(body)


def text_of(request: dict[str, Any]) -> str:
    """What a request says in words."""
    return "".join(part["text"] for part in request["messages"][0]["content"] if part["type"] == "text")


def image_of(request: dict[str, Any]) -> np.ndarray:
    """The image (H, W, 3) uint8 that a request shows."""
    (url,) = (part["image_url"]["url"] for part in request["messages"][0]["content"] if part["type"] == "image_url")
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


class Listener(ThreadingHTTPServer):
    """As many may knock at once as a group has siblings: a sixth would wait a second otherwise."""

    request_queue_size = 128


class JudgeServer:
    """Answers with `reply(request)`. Remembers requests and headers, and how many were open at once."""

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.open, self.most_open, self._lock = 0, 0, threading.Lock()
        self._server = Listener(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, headers: dict[str, str], request: dict[str, Any]) -> Reply:
        """Counts a request while it is answered."""
        if path != "/v1/chat/completions":
            return 404, {}, "no such page"
        with self._lock:
            self.requests.append(request)
            self.headers.append(headers)
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            return self.reply(request)
        finally:
            with self._lock:
                self.open -= 1

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            # Headers and body in one packet.
            wbufsize = -1

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                request = json.loads(self.rfile.read(length))
                status, headers, body = judge.answer(self.path, dict(self.headers), request)
                data = body.encode("utf-8", "surrogateescape")
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        return Handler
