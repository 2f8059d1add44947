"""Refusals of `opd serve` before loading, and discovery of servers."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.cli import main
from opd_lightning.errors import ServerAwayError, UserError
from opd_lightning.serving.addresses import (
    prepare_address_file,
    resolve_addresses,
    write_address,
)
from opd_lightning.serving.server import _until_healthy, bind
from tests.http_server import Server


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--host", "0.0.0.0"], "host: got '0.0.0.0', every interface"),
        *(
            (["--host", host], f"host: got {host!r}, every interface")
            for host in ("::", "0", "0x0", "00.0", "::ffff:0.0.0.0", "0:0:0:0:0:0:0:0", "", "*")
        ),
        (["--port", "1000000"], "port: got 1000000, expected 0"),
        (["--port=-1"], "port: got -1, expected 0"),
        (["--engine_args", '{"middleware": "mine.Guard"}'], "engine_args: middleware"),
        (["--engine_args", '{"api-key": "x"}'], "engine_args: api_key"),
        (["--model", "./nowhere"], "'./nowhere': "),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str], told: str, tiny_model_dir: Any, tmp_path: Path, capsys: Any
) -> None:
    given = ["--model", str(tiny_model_dir()), "--key_file", str(tmp_path / "key")]
    with pytest.raises(SystemExit) as ended:
        main(["serve", *given, *words])
    assert ended.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("opd: error:")]
    assert told in line
    assert not (tmp_path / "key").exists()


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on 127.0.0.1, port {port}: Address"):
            bind("127.0.0.1", port)
    with bind("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0


def test_an_address_file_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "one.address"
    threading.Timer(0.2, write_address, (file, "http://10.0.0.1:8000")).start()
    servers = ["http://127.0.0.1:1", str(file)]
    assert resolve_addresses(servers, patience=30) == ["http://127.0.0.1:1", "http://10.0.0.1:8000"]
    with pytest.raises(ServerAwayError, match=r"two\.address.*not there after 0 s"):
        resolve_addresses([str(tmp_path / "two.address")], patience=0)


def test_an_address_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "servers" / "one.address"
    prepare_address_file(file)
    write_address(file, "http://10.0.0.1:8000")
    prepare_address_file(file)  # of a server that was killed
    assert not list(file.parent.iterdir())
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "one.address", tmp_path):
        with pytest.raises(UserError, match=r"address_file: cannot write .*; name another file"):
            prepare_address_file(path)


def test_a_proxy_is_not_asked_whether_the_server_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `http_proxy` set, as on many clusters, it never seemed ready and had no address file."""
    server, proxy = Server(lambda _: (200, {})), Server(lambda _: (403, {}))
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.delenv("no_proxy", raising=False)
    try:
        asyncio.run(asyncio.wait_for(_until_healthy(server.url), 10))
        assert not proxy.asked
    finally:
        server.stop()
        proxy.stop()
