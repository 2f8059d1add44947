"""HTTP connections to one server, its state, and the translation of its errors."""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from opd_lightning.errors import UserError
from opd_lightning.serving.keys import KEY_VARIABLE

BUSY = (429, 503)  # the server is reachable, but overloaded
IN_FLIGHT = 256  # concurrent requests per server; vLLM's default max_num_seqs
FIRST_PAUSE = 0.25  # seconds before a lost server is tried again
CONNECT_SECONDS = 10.0
ANSWER_BYTES = 2**30  # limit of one answer, decompressed
KEPT_SECONDS = 2.0  # keep-alive of idle connections; servers close theirs after 5


class LostError(Exception):
    """Failure of a server that may succeed at a later attempt.

    Args:
        reason: In a few words.
        reached: Whether the request reached the server, and so may be the cause.
    """

    def __init__(self, reason: str, *, reached: bool) -> None:
        super().__init__(reason)
        self.reached = reached


@cache
def _ssl_context() -> ssl.SSLContext:
    """Return the trusted certificates, which all connections share: reading them takes 20 ms."""
    return httpx.create_ssl_context(trust_env=False)


class Connection:
    """Connections to one server. The key is kept only in the requests' headers."""

    def __init__(self, url: str, key: str | None, timeout: float) -> None:
        self.url = url
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._seconds = timeout
        # Only for connecting: httpx restarts its other timeouts at every byte that arrives.
        self._timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        self._idle: list[httpx.AsyncClient] = []

    async def request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Return the decoded answer; {} if it is empty. Raise `LostError` or `UserError`."""
        # One client per request in flight: the connection pool of a shared client spends
        # milliseconds on every request when it holds hundreds.
        client = self._idle.pop() if self._idle else self._new_client()
        try:
            return await self._request(client, method, path, body)
        finally:
            if not client.is_closed:
                self._idle.append(client)

    async def close(self) -> None:
        for client in self._idle:
            await client.aclose()

    def _new_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            headers=self._headers,
            timeout=self._timeout,
            limits=httpx.Limits(max_connections=1, keepalive_expiry=KEPT_SECONDS),
            verify=_ssl_context(),
            trust_env=False,  # no proxies: they must not see the key
        )

    async def _request(
        self, client: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None
    ) -> Any:
        try:
            async with asyncio.timeout(self._seconds):
                status, content = await _exchange(client, method, self.url + path, body)
        except httpx.ConnectError as error:
            raise LostError("could not be reached", reached=False) from error
        except (httpx.TimeoutException, TimeoutError) as error:
            reached = not isinstance(error, httpx.ConnectTimeout)
            raise LostError("took too long to answer", reached=reached) from error
        except httpx.DecodingError as error:
            raise LostError("sent a body that cannot be decompressed", reached=True) from error
        except httpx.TransportError as error:
            raise LostError("broke the connection", reached=True) from error
        if status >= 500 or status in BUSY:
            raise LostError(
                f"answered {status}: {_error_message(content)}", reached=status not in BUSY
            )
        if status >= 300:
            raise UserError(await self._describe_refusal(client, status, content, path, body or {}))
        try:
            return _decoded(content) if content else {}
        except ValueError as error:
            raise UserError(f"{self.url}{path}: answered no JSON; is it a vLLM server?") from error

    async def _describe_refusal(
        self,
        client: httpx.AsyncClient,
        status: int,
        content: bytes,
        path: str,
        body: dict[str, Any],
    ) -> str:
        if status == 401:
            return (
                f"{self.url}: answered 401, so the key is missing or wrong; give the server's "
                f"in key_file or {KEY_VARIABLE}"
            )
        if status == 404 and "model" in body and (served := await _served(client, self.url)):
            return f"{self.url}: got model {body['model']!r} to ask, but it serves {served}"
        return f"{self.url}{path}: answered {status}: {_error_message(content)}"


@dataclass(eq=False)
class Server:
    """Connections to a server and its state.

    Args:
        connection: Connections to its last known address.
        file: Its address file, if any: its address may change when it is restarted.
    """

    connection: Connection
    file: Path | None
    in_flight: int = 0
    lost_since: float | None = None  # monotonic clock, seconds; None while it answers
    retry_at: float = 0.0
    pause: float = FIRST_PAUSE
    is_probed: bool = False  # a lost server gets one request at a time

    def is_available(self, now: float) -> bool:
        if self.lost_since is not None:
            return not self.is_probed and now >= self.retry_at
        return self.in_flight < IN_FLIGHT


async def _exchange(
    client: httpx.AsyncClient, method: str, url: str, body: dict[str, Any] | None
) -> tuple[int, bytes]:
    """Send a request; return the status and the body of the answer.

    If it is cancelled, by its caller or because its time is up, the client is closed: it may take
    its only connection to be in use from then on.
    """
    content = bytearray()
    try:
        async with client.stream(method, url, json=body) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > ANSWER_BYTES:
                    raise UserError(
                        f"{url}: its answer has more than {ANSWER_BYTES} bytes; is it a vLLM "
                        "server?"
                    )
    except asyncio.CancelledError:
        await client.aclose()
        raise
    return response.status_code, bytes(content)


async def _served(client: httpx.AsyncClient, url: str) -> str:
    """Return the names of the server's models; empty if they cannot be read."""
    try:
        _, content = await _exchange(client, "GET", f"{url}/v1/models", None)
        return " and ".join(repr(model["id"]) for model in _decoded(content)["data"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return ""


def _decoded(content: bytes) -> Any:
    """Decode JSON; raise ValueError for anything else, and for what is too deep to decode."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _error_message(content: bytes) -> str:
    """Return the server's error message in one line."""
    try:
        message = _decoded(content)
        for name in ("error", "detail", "message"):
            message = message.get(name, message) if isinstance(message, dict) else message
    except ValueError:
        message = content.decode(errors="replace")
    return " ".join(str(message).split())[:300] or "no reason given"
