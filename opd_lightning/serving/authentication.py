"""Key authentication of a server: required on every route except GET /health."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from opd_lightning.serving.keys import read_key

# The path, not the key itself: environments are inherited and printed.
KEY_FILE_VARIABLE = "OPD_SERVER_KEY_FILE"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


BODY_BYTES = 2**27  # limit of one request; vLLM holds several copies of a body while it parses it


class KeyMiddleware:
    """ASGI middleware that asks every request for the key.

    vLLM's own `--api-key` leaves the development routes open, through which any client could
    replace the weights or call methods of the workers. A request without the key ends its
    connection, GET /health included, and its body is not read.
    """

    def __init__(self, app: Application) -> None:
        key = read_key(os.environ[KEY_FILE_VARIABLE])
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401, 411 or 413."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._app(scope, receive, send)
        elif _is_health(scope):
            await self._app(scope, receive, _ending(send))
        elif not self._is_authorised(scope):
            if kind == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await refuse(send, 401)
        elif kind == "http" and b"transfer-encoding" in (names := _named(scope)):
            await refuse(send, 411, "give the body's Content-Length")
        elif kind == "http" and int(names.get(b"content-length", b"0")) > BODY_BYTES:
            await refuse(send, 413, f"the body is larger than {BODY_BYTES} bytes")
        else:
            await self._app(scope, receive, send)

    def _is_authorised(self, scope: Message) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        # In constant time, so that the delay does not reveal how many characters matched.
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def _named(scope: Message) -> dict[bytes, bytes]:
    """Return the headers of a request by lower-case name."""
    return {name.lower(): value for name, value in scope["headers"]}


def _ending(send: Send) -> Send:
    """Return `send` with a header that makes the server end the connection after the response."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"connection", b"close")]
            message = {**message, "headers": headers}
        await send(message)

    return wrapped


async def refuse(send: Send, status: int, reason: str = "") -> None:
    """Answer a request with a status and a reason in one line, and end the connection."""
    body = json.dumps({"error": reason}).encode() if reason else b""
    headers = [(b"connection", b"close"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _is_health(scope: Message) -> bool:
    return scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/health"
