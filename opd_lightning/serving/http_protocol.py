"""HTTP connections of a server that clients without a key cannot exhaust.

A connection without a request costs a file descriptor, and any client can open one. The server
keeps a limited number of these, each for a limited time, and drops the oldest first. The headers of
a trainer's request arrive with its connection. `KeyMiddleware` ends connections whose request has
no key, so connections that are kept for further requests belong to trainers.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 10.0  # from the beginning of a connection, or from the previous response
HEADER_BYTES = 2**16  # limit of the headers of one request
MOST_NEW = 512  # connections that have not sent the headers of a request yet
BACKLOG = 128  # connections that the kernel holds, and that are accepted at once
FILES = 2**16  # requested limit of open files: one for each connection


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with bounds on connections without a request."""

    new: ClassVar[dict[BoundedProtocol, None]] = {}  # without a request so far, oldest first

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._received = 0  # bytes of incomplete headers
        self._timer: asyncio.TimerHandle | None = None  # None while a request is in progress

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_headers()
        self.new[self] = None
        if len(self.new) > most_new():
            oldest = next(iter(self.new))
            del self.new[oldest]  # `connection_lost` is called later
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_headers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request; drop the connection if its headers are too long."""
        self._received += len(data)
        super().data_received(data)
        if self._timer is not None and self._received > HEADER_BYTES:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._end_headers()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        is_last = not self.pipeline  # else the next request is in progress
        super().on_response_complete()
        if is_last and not self.transport.is_closing():
            self._expect_headers()

    def _expect_headers(self) -> None:
        self._end_headers()
        self._received = 0
        self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _end_headers(self) -> None:
        self.new.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def most_new() -> int:
    """Return the bound on connections without a request: a quarter of the open files at most."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_NEW if files == resource.RLIM_INFINITY else min(MOST_NEW, files // 4)


def raise_file_limit() -> None:
    """Raise the limit of open files, as far as the administrator allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# Options of uvicorn's server; a request for a WebSocket is one like any other.
UVICORN_OPTIONS: dict[str, Any] = {"http": BoundedProtocol, "backlog": BACKLOG, "ws": "none"}
