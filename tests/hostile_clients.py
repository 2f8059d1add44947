"""Hostile clients of a server, on loopback."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

CONNECTIONS = 5000
HALF_A_REQUEST = b"POST /inference/v1/generate HTTP/1.1\r\nHost: a\r\n"
MALFORMED = (
    b"\x00\xff\x00\xff\r\n\r\n",
    b"GET /" + b"a" * 200_000,  # a line without an end
    b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 100_000,  # headers without an end
    b"POST / HTTP/1.1\r\nContent-Length: nine\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 9\r\nContent-Length: 8\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
)


def place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port


@contextmanager
def half_open(url: str, count: int = CONNECTIONS) -> Iterator[list[socket.socket]]:
    """Open connections with incomplete requests, as many as the server accepts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            sockets.append(socket.create_connection(place(url), timeout=30))
            with suppress(OSError):  # dropped at once
                sockets[-1].sendall(HALF_A_REQUEST)
        yield sockets
    finally:
        for one in sockets:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def are_open(sockets: list[socket.socket]) -> int:
    """Return the number of connections that the server has not closed."""
    count = 0
    for one in sockets:
        one.setblocking(False)
        try:
            count += one.recv(1) != b""
        except BlockingIOError:
            count += 1
        except OSError:
            pass
    return count


def send(url: str, message: bytes, *, most: int = 2**16) -> bytes:
    """Send bytes; return the answer until the server closes the connection, within 15 s."""
    with socket.create_connection(place(url), timeout=15) as one:
        received = b""
        with suppress(ConnectionError):
            one.sendall(message)
        with suppress(ConnectionError):
            while len(received) < most and (part := one.recv(most)):
                received += part
    return received


def slowest(ask: Callable[[], None], times: int = 20) -> float:
    """Return the seconds of the slowest of several calls."""
    seconds = []
    for _ in range(times):
        began = time.monotonic()
        ask()
        seconds.append(time.monotonic() - began)
    return max(seconds)
