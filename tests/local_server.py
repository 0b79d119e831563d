"""A server on this machine whose answers are slow, cut off, wrong, moved or absent, as a test wants them."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

# What a handler does with a request: `h` is the handler, `start` the first byte that is asked for.
Answer = Callable[[Any, int], None]


class Server:
    def __init__(self) -> None:
        self.routes: dict[str, Answer] = {}
        self.requests: list[tuple[str, str | None]] = []  # path, Range
        self.heads: list[str] = []  # paths that were asked for without their content
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers["Range"]
                outer.requests.append((self.path, wanted))
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
                with contextlib.suppress(ConnectionError):
                    outer.routes.get(self.path, status(404))(self, start)

            def do_HEAD(self) -> None:
                outer.heads.append(self.path)
                connection, self.wfile = self.wfile, io.BytesIO()
                outer.routes.get(self.path, status(404))(self, 0)
                connection.write(self.wfile.getvalue().partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
                self.wfile = connection

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = False
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def forget_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the user's settings of mirrors, folders and proxies."""
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "CIFARLAB_DATA", "ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def send_head(h: Any, length: int, start: int, *, announced: bool = True) -> None:
    """The head of an answer with the bytes from `start` on of a file of `length` bytes."""
    h.send_response(206 if start else 200)
    if start:
        h.send_header("Content-Range", f"bytes {start}-{length - 1}/{length}")
    if announced:
        h.send_header("Content-Length", str(length - start))
    h.end_headers()


def whole(data: bytes, *, ranges: bool = True, announced: bool = True) -> Answer:
    def answer(h: Any, start: int) -> None:
        first = start if ranges else 0
        send_head(h, len(data), first, announced=announced)
        h.wfile.write(data[first:])

    return answer


def status(code: int, **headers: str) -> Answer:
    def answer(h: Any, start: int) -> None:
        h.send_response(code)
        for name, value in headers.items():
            h.send_header(name.replace("_", "-"), value)
        h.send_header("Content-Length", "0")
        h.end_headers()

    return answer


def slow(data: bytes, speed: float) -> Answer:
    """`speed` bytes a second at most, in fifty portions a second."""

    def answer(h: Any, start: int) -> None:
        send_head(h, len(data), start)
        portion = int(speed / 50)
        for at in range(start, len(data), portion):
            h.wfile.write(data[at : at + portion])
            time.sleep(1 / 50)

    return answer


def cut(data: bytes, after: int) -> Answer:
    """Announces all and closes the connection after `after` bytes."""

    def answer(h: Any, start: int) -> None:
        send_head(h, len(data), start)
        h.wfile.write(data[start : start + after])

    return answer


def in_turn(*answers: Answer) -> Answer:
    """One answer after the other, the last for ever."""
    left = list(answers)

    def answer(h: Any, start: int) -> None:
        (left.pop(0) if len(left) > 1 else left[0])(h, start)

    return answer
