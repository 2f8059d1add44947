"""The key in front of a server, without a server."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.errors import UserError
from opd_lightning.serving.authentication import KEY_FILE_VARIABLE, KeyMiddleware
from opd_lightning.serving.keys import make_key_file


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "reached"})


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    make_key_file(tmp_path / "key")
    monkeypatch.setenv(KEY_FILE_VARIABLE, str(tmp_path / "key"))
    return (tmp_path / "key").read_text().strip()


def ask(method: str, path: str, *keys: str, kind: str = "http") -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"Authorization", f"Bearer {key}".encode()) for key in keys]
    scope = {"type": kind, "method": method, "path": path, "headers": headers}
    asyncio.run(KeyMiddleware(_app)(scope, None, send))  # type: ignore[arg-type]
    return sent


REACHED = [{"type": "reached"}]


def test_the_key_opens(key: str) -> None:
    assert ask("POST", "/update_weights", key) == REACHED


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/update_weights", "/health/", "//health", "/health/../x"])
def test_without_it_nothing_does(key: str, method: str, path: str) -> None:
    for keys in ((), ("",), (key[:-1],), (key + "x",), (key, key), ("ä",)):
        start, body = ask(method, path, *keys)
        assert (start["status"], body["body"]) == (401, b"")
        assert (b"connection", b"close") in start["headers"]


def test_health_is_open_to_get_alone(key: str) -> None:
    assert ask("GET", "/health") == REACHED
    assert ask("POST", "/health") != REACHED


def test_sockets_are_closed_too(key: str) -> None:
    assert ask("GET", "/health", kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_servers_of_a_run_share_a_key(tmp_path: Path) -> None:
    path = tmp_path / "run" / "key"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(make_key_file, [path] * 8))
    key = path.read_text()
    make_key_file(path)
    assert path.read_text() == key
    assert len(key.strip()) >= 43  # 256 bits
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["key"]


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    make_key_file(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(UserError, match="others may read"):
        make_key_file(tmp_path / "key")


def test_each_run_has_another(tmp_path: Path) -> None:
    make_key_file(tmp_path / "one")
    make_key_file(tmp_path / "two")
    assert (tmp_path / "one").read_text() != (tmp_path / "two").read_text()
