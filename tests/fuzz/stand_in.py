"""A server that sends prepared bytes: what is asked does not matter, what is answered does."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reply:
    """An answer as bytes.

    Attributes:
        content: Head and body.
        pause: Seconds before the first byte.
        trickle: Seconds between bytes, of which each is sent alone; 0 sends all at once.
        keep: Whether the connection stays open afterwards.
    """

    content: bytes
    pause: float = 0.0
    trickle: float = 0.0
    keep: bool = True


def reply(body: Any, status: int = 200, **more: Any) -> Reply:
    """Return a whole answer; `body` is JSON unless it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"HTTP/1.1 {status} Fine\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    )
    return Reply(f"{head}\r\n\r\n".encode() + data, **more)


class StandIn:
    """Answers by path, from `replies`; 404 for any other."""

    def __init__(self) -> None:
        self.replies: dict[str, Reply] = {}
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.place = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError), connection.makefile("rb") as lines:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while first := lines.readline():
                length = 0
                while (line := lines.readline()) not in (b"\r\n", b""):
                    name, _, value = line.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                lines.read(length)
                path = first.split()[1].decode().partition("?")[0]
                answer = self.replies.get(path) or reply({"error": "no such route"}, 404)
                time.sleep(answer.pause)
                if answer.trickle:
                    for i in range(len(answer.content)):
                        connection.sendall(answer.content[i : i + 1])
                        time.sleep(answer.trickle)
                connection.sendall(b"" if answer.trickle else answer.content)
                if not answer.keep:
                    return
