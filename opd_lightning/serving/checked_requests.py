"""ASGI middleware that forwards trainers' requests and refuses all others."""

from __future__ import annotations

import asyncio

from opd_lightning.serving.accepted import LIMITS, RefusedError, check
from opd_lightning.serving.authentication import (
    Application,
    KeyMiddleware,
    Message,
    Receive,
    Send,
    refuse,
)


class TrainerRequests(KeyMiddleware):
    """Middleware for vLLM's `--middleware`, which takes its import path: the key, then the checks.

    Args:
        app: vLLM's application.
    """

    def __init__(self, app: Application) -> None:
        super().__init__(CheckedRequests(app))


class CheckedRequests:
    """ASGI application that checks requests before another sees them.

    Args:
        app: Receives the requests that pass, with their whole bodies.
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 400, 404 or 405."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = await _body(receive)
        if body is None:
            return
        try:
            query = scope["query_string"].decode("latin-1")
            told = check(scope["method"], scope["path"], query, body)
            if LIMITS.check_push and told and told.get("method") == "load_pushed":
                # In a thread: the disk may be slow, and the other requests must continue.
                await asyncio.to_thread(LIMITS.check_push, told["args"][0])
        except RefusedError as error:
            await refuse(send, error.status, str(error))
            return
        await self._app(scope, _again(body, receive), send)


async def _body(receive: Receive) -> bytes | None:
    """Return the whole body; None if the client leaves before its end."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that begins with the body."""
    sent = False

    async def received() -> Message:
        nonlocal sent
        if sent:
            return await receive()  # reports that the client has left
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return received
