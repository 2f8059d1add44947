"""Clients without a key cannot exhaust a server's connections; with uvicorn, without vLLM."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from opd_lightning.serving.authentication import BODY_BYTES, KEY_FILE_VARIABLE
from opd_lightning.serving.keys import make_key_file
from tests import hostile_clients

SERVER = """
import socket, sys, uvicorn
from opd_lightning.serving import http_protocol
from opd_lightning.serving.authentication import KeyMiddleware

async def app(scope, receive, send):
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    body = b"%d" % size
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})

http_protocol.HEADER_SECONDS = 3.0
sock = socket.socket()
sock.bind(("127.0.0.1", 0))
sock.listen()  # who connects before uvicorn runs waits for it
print(sock.getsockname()[1], flush=True)
config = uvicorn.Config(
    KeyMiddleware(app), lifespan="off", log_level="error", **http_protocol.UVICORN_OPTIONS
)
uvicorn.Server(config).run(sockets=[sock])
"""


class Stand:
    def __init__(self, key_file: Path) -> None:
        self.key = key_file.read_text().strip()
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (1024, 1024))

    def ask(self, body: bytes = b"{}", key: str | None = None, **headers: str) -> httpx.Response:
        headers["Authorization"] = f"Bearer {self.key if key is None else key}"
        return httpx.post(self.url, content=body, headers=headers, timeout=30)

    def trainer(self) -> None:
        assert self.ask().text == "2"


pytest.importorskip("uvicorn", reason="comes with vLLM")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    key_file = tmp_path_factory.mktemp("stand") / "key"
    make_key_file(key_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_FILE_VARIABLE, str(key_file))
        stand = Stand(key_file)
    yield stand
    stand.process.kill()
    stand.process.wait()


def test_half_open_connections_make_nobody_wait(server: Stand) -> None:
    server.trainer()
    with hostile_clients.half_open(server.url, 1500) as sockets:
        assert hostile_clients.slowest(server.trainer) < 3, "HEADER_SECONDS"
        assert hostile_clients.are_open(sockets) <= 256, "a quarter of the files that it may open"
        late = sockets[-1]
        late.setblocking(True)
        late.settimeout(30)
        assert late.recv(1) == b"", "it ends a connection that says nothing"
    server.trainer()


@pytest.mark.parametrize(
    "message", hostile_clients.MALFORMED, ids=range(len(hostile_clients.MALFORMED))
)
def test_malformed_requests_end_their_connection(server: Stand, message: bytes) -> None:
    assert hostile_clients.send(server.url, message)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 401")
    server.trainer()


@pytest.mark.parametrize("path", ["/", "/health"])
def test_a_connection_without_the_key_has_one_request(server: Stand, path: str) -> None:
    """A health check needs no key, and must not buy a connection that lasts."""
    one = f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    status = b"200" if path == "/health" else b"401"
    assert hostile_clients.send(server.url, one * 2).count(b"HTTP/1.1 " + status) == 1


def test_a_request_for_a_socket_is_one_like_any_other(server: Stand) -> None:
    lines = ("Connection: upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "", "")
    begun = f"GET / HTTP/1.1\r\nAuthorization: Bearer {server.key}\r\nHost: a\r\n"
    answer = hostile_clients.send(server.url, (begun + "\r\n".join(lines)).encode(), most=12)
    assert answer[:12] == b"HTTP/1.1 200"


def test_headers_may_not_trickle_in_after_a_response(server: Stand) -> None:
    one = f"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {server.key}\r\n\r\n"
    began = time.monotonic()
    assert hostile_clients.send(server.url, f"{one}{one}GET".encode()).count(b"HTTP/1.1 200") == 2
    assert time.monotonic() - began > 2, "or it has not waited for the headers"


def test_bodies_are_bounded_and_unread_without_a_key(server: Stand) -> None:
    large = b"x" * 2**22
    assert server.ask(large).text == str(len(large))
    begun = f"POST / HTTP/1.1\r\nAuthorization: Bearer {server.key}\r\n"
    length = begun + f"Content-Length: {BODY_BYTES + 1}\r\n\r\n"
    assert hostile_clients.send(server.url, length.encode()).startswith(b"HTTP/1.1 413")
    chunked = begun + "Transfer-Encoding: chunked\r\n\r\n"
    assert hostile_clients.send(server.url, chunked.encode()).startswith(b"HTTP/1.1 411")
    wrong = length.replace(server.key, "wrong").encode()
    assert hostile_clients.send(server.url, wrong).startswith(b"HTTP/1.1 401")


def test_a_trainers_connection_is_kept(server: Stand) -> None:
    headers = {"Authorization": f"Bearer {server.key}"}
    with httpx.Client(headers=headers) as client:
        streams: set[Any] = set()
        for _ in range(5):
            answer = client.post(server.url, content=json.dumps({}))
            assert answer.text == "2"
            streams.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
        assert len(streams) == 1
