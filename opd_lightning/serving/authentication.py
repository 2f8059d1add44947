"""Key authentication of a server: required on every route except GET /health."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from opd_lightning.errors import UserError
from opd_lightning.serving.connection import read_key

# The path, not the key itself: environments are inherited and printed.
KEY_FILE_VARIABLE = "OPD_SERVER_KEY_FILE"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class KeyMiddleware:
    """ASGI middleware for vLLM's `--middleware`, which takes its import path.

    vLLM's own `--api-key` leaves the development routes open, through which any client could
    replace the weights or call methods of the workers.
    """

    def __init__(self, app: Application) -> None:
        key = read_key(os.environ[KEY_FILE_VARIABLE])
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401 with an empty body."""
        kind = scope["type"]
        if kind == "lifespan" or _is_health(scope) or self._is_authorised(scope):
            await self._app(scope, receive, send)
        elif kind == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    def _is_authorised(self, scope: Message) -> bool:
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        # In constant time, so that the delay does not reveal how many characters matched.
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def _is_health(scope: Message) -> bool:
    return scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/health"


def make_key_file(path: Path) -> None:
    """Write a new key, readable by its owner only; an existing key is checked and kept.

    Several servers of a run may call this at the same time and get the same key.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as out:
                out.write(secrets.token_urlsafe(32) + "\n")
            with suppress(FileExistsError):  # another server was faster
                os.link(draft, path)  # atomic, with its content
        except OSError as error:
            raise UserError(f"key_file: cannot write {str(path)!r}: {error.strerror}") from error
        finally:
            draft.unlink(missing_ok=True)
    read_key(str(path))
