"""vLLM's server in this process: start, announcement, supervision, shutdown."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.request import ProxyHandler, build_opener

from opd_lightning.errors import ServerAwayError, UserError, reason_of
from opd_lightning.serving.accepted import LIMITS
from opd_lightning.serving.addresses import (
    is_every_interface,
    prepare_address_file,
    write_address,
)

ENDINGS = (signal.SIGTERM, signal.SIGINT)
HEALTH_SECONDS = 0.5  # polling interval while the server starts


def check_address(host: str, port: int) -> None:
    """Raise UserError unless `host` is one address, which is not every interface, and a port."""
    if not 0 <= port <= 65535:
        raise UserError(f"port: got {port}, expected 0 (any free one) to 65535")
    if is_every_interface(host):
        raise UserError(
            f"host: got {host!r}, every interface of this machine; give the one address that the "
            "trainer reaches, such as 127.0.0.1"
        )


def bind(host: str, port: int) -> socket.socket:
    """Bind the server's socket before anything is loaded, which reserves its port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        # Without the protocol, asyncio leaves Nagle's algorithm on: 40 ms for every answer.
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise UserError(
            f"opd serve: cannot listen on {host}, port {port}: {error.strerror}; give an address "
            "of this machine and a free port (0 takes one)"
        ) from error
    return sock


def run(arguments: dict[str, Any], sock: socket.socket, address_file: Path | None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        arguments: By name, as on vLLM's command line.
        sock: Bound socket, with the host and port of `arguments`.
        address_file: File to write the server's address to once it answers.

    Raises:
        UserError: If vLLM does not accept the arguments.
        ServerAwayError: If the server ends by itself.
    """
    for number in ENDINGS:
        signal.signal(number, _abandon)  # until the server runs
    if address_file is not None:
        prepare_address_file(address_file)  # clients must not connect before the server is ready
    try:
        asyncio.run(_run(_parse(arguments), sock, address_file))
    except (UserError, ServerAwayError):
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"opd serve: vLLM says: {reason_of(error, 300)}") from error
    except RuntimeError as error:
        raise ServerAwayError(f"vLLM's server did not start: {reason_of(error, 300)}") from error
    finally:
        if address_file is not None:
            address_file.unlink(missing_ok=True)


def _parse(arguments: dict[str, Any]) -> Any:
    """Parse the arguments with vLLM's own parser."""
    try:  # vLLM 0.33
        from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    except ImportError:  # vLLM 0.32
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"opd serve: engine_args: vLLM says: {message}")

    words: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict | list) else value
            words.append(f"--{flag}={text}")
    parsed = make_arg_parser(Parser()).parse_args(words)
    validate_parsed_serve_args(parsed)
    return parsed


async def _run(arguments: Any, sock: socket.socket, address_file: Path | None) -> None:
    from vllm.entrypoints.launchers.api_server.entry import (
        build_and_serve,
        build_async_engine_client,
    )

    host, port = sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    asked = asyncio.Event()
    from opd_lightning.serving.http_protocol import UVICORN_OPTIONS, raise_file_limit

    raise_file_limit()
    async with build_async_engine_client(arguments) as engine:
        # Without a tokenizer vLLM does not look at token ids, and ends at its embedding.
        LIMITS.vocabulary = engine.model_config.get_vocab_size()
        server = asyncio.ensure_future(
            build_and_serve(engine, url, sock, arguments, **UVICORN_OPTIONS)
        )
        healthy = asyncio.ensure_future(_until_healthy(url))
        await asyncio.wait([server, healthy], return_when=asyncio.FIRST_COMPLETED)
        healthy.cancel()
        if not server.done():
            # Replaces vLLM's handlers, with which a stopped server looks like one that
            # crashed.
            for number in ENDINGS:
                asyncio.get_running_loop().add_signal_handler(number, asked.set)
            if address_file is not None:
                write_address(address_file, url)
            print(f"opd serve: {arguments.served_model_name[0]} at {url}", file=sys.stderr)
            ended = asyncio.ensure_future(asked.wait())
            await asyncio.wait([server, ended], return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
        server.cancel()
        closing = await server  # cancelled, it returns a coroutine that shuts it down
    await closing
    if not asked.is_set():
        raise ServerAwayError(f"the vLLM server at {url} died; its log says why")


async def _until_healthy(url: str) -> None:
    # Without http_proxy and the like, as trainers ask: a proxy may not reach this machine.
    direct = build_opener(ProxyHandler({})).open

    def answers() -> bool:
        with suppress(OSError), direct(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
        return False

    while not await asyncio.to_thread(answers):
        await asyncio.sleep(HEALTH_SECONDS)


def _abandon(number: int, frame: Any) -> None:
    """Exit at once while vLLM loads: it waits for its engine process and ignores exceptions."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + number)
