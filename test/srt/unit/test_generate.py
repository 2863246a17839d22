"""The request that empties a server's cache, against a server that answers as SGLang does."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.error import HTTPError

import pytest

from helpers.generate import flush_cache


@contextmanager
def answering(status: int, asked: list[str]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"Cache flushed.\nPlease check backend logs.\n")

        def log_message(self, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_answer_is_plain_text_and_the_server_waits_for_its_last_request() -> None:
    asked: list[str] = []
    with answering(200, asked) as url:
        flush_cache(url)
    assert asked == ["/flush_cache?timeout=30"]


def test_a_busy_server_is_an_error() -> None:
    with answering(400, []) as url, pytest.raises(HTTPError):
        flush_cache(url)
