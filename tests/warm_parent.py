"""Process that has imported the libraries, and forks a child for every request.

`python -m tests.warm_parent FD` serves the clients of a listening socket; see `tests/processes.py`,
which has the side of the clients.
"""

from __future__ import annotations

import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from opd_lightning.terminal.imports import without_collections
from tests import entry_points

ROOT = Path(__file__).parents[1]
# Everything that an `opd fit` has imported by its end.
PRELOADED = (
    "opd_lightning.cli",
    "opd_lightning.commands.lightning_cli",
    "opd_lightning.lab.cli",
    "opd_lightning.methods",
    "opd_lightning.rollouts",
    "opd_lightning.run.datamodule",
    "opd_lightning.teachers",
    "opd_lightning.verifiers",
    "callbacks",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.generation",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "lightning.pytorch.strategies",
    "matplotlib.figure",
    "datasets",
    "peft",
    "pytest",
)
MAX_MESSAGE = 1 << 20
END = struct.Struct("<qd")  # exit code and CPU seconds
PEER = struct.Struct("3i")  # process, user and group


def serve(*clients: socket.socket, listener: socket.socket | None = None) -> dict[str, Any] | None:
    """Fork a child for every request, and report its end; in a child, return its request.

    Args:
        clients: Connections that requests come by.
        listener: Socket that further clients connect to.

    Returns:
        None once the last client has closed its connection.
    """
    gc.collect()
    gc.freeze()  # a child's collections do not copy what it shares
    if len(threads := sorted(_threads())) > 1:
        raise RuntimeError(f"cannot fork: threads {threads}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    controls = [*clients]
    while True:
        watched: list[Any] = [read, *controls, *([listener] if listener else [])]
        ready = select.select(watched, [], [])[0]
        if read in ready:
            os.read(read, 4096)
            _report(children)
        if listener in ready and listener is not None:
            controls += _accepted(listener)
        if not (asking := [one for one in controls if one in ready]):
            continue
        control = asking[0]  # the others are still ready in the next round
        message, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE, 4)
        if not message:
            control.close()
            controls.remove(control)
            if not controls:
                return None
            continue
        status = socket.socket(fileno=fds[0])
        if pid := os.fork():
            children[pid] = status
            for fd in fds[1:]:
                os.close(fd)
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for file in (*controls, *children.values(), *([listener] if listener else [])):
            file.close()
        os.close(read)
        os.close(write)
        request: dict[str, Any] = json.loads(message)
        _become(request, fds[1:])
        with status:
            status.send(os.getpid().to_bytes(8, "little", signed=True))
        return request


def serve_stdin() -> None:
    """Serve the client whose connection is the standard input; return in its children alone."""
    with socket.socket(fileno=os.dup(0)) as control:
        request = serve(control)
    if request is None:
        os._exit(0)


def _accepted(listener: socket.socket) -> list[socket.socket]:
    """Return the next connection, unless it is another user's: names of sockets are for all."""
    client = listener.accept()[0]
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size)
    if PEER.unpack(credentials)[1] == os.getuid():
        return [client]
    client.close()
    return []


def _read_signatures() -> None:
    """Parse a configuration, so that no child has to read the same signatures from the sources."""
    from opd_lightning.commands.known_keys import check_keys
    from opd_lightning.commands.lightning_cli import OPDCLI

    class ParsedError(Exception):
        pass

    class Parser(OPDCLI):
        def instantiate_classes(self) -> None:
            raise ParsedError

    words = ["--config", str(ROOT / "configs" / "lab" / "opd.yaml"), "--seed_everything=false"]
    check_keys("fit", words)
    with suppress(ParsedError):
        Parser(["fit", *words])


def _threads() -> Iterator[str]:
    """Names of the threads that a forked child would lack."""
    for task in Path("/proc/self/task").iterdir():
        name = (task / "comm").read_text().strip()
        if name != "jemalloc_bg_thd":  # Arrow's allocator starts it again in a child
            yield name


def _report(children: dict[int, socket.socket]) -> None:
    """Send the exit code of every child that has ended."""
    while children:
        pid, status, used = os.wait4(-1, os.WNOHANG)
        if not pid:
            return
        with children.pop(pid) as connection:
            code = os.waitstatus_to_exitcode(status)
            try:
                connection.send(END.pack(code, used.ru_utime + used.ru_stime))
            except OSError:
                continue  # nobody waits for it any more


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Make a forked child what `python -m` would have made of it."""
    import numpy as np

    if request["session"]:
        os.setsid()
    for target, fd in enumerate(streams):
        os.dup2(fd, target)
    for fd in streams:
        os.close(fd)
    for stream in (sys.stdout, sys.__stdout__):
        stream.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[0] = request["cwd"]
    sys.argv[1:] = request["arguments"]
    random.seed()
    np.random.seed()


def import_all(names: Iterable[str]) -> None:
    """Import modules without garbage collections, and leave what they made out of later ones."""
    with without_collections(freeze=True):
        for name in names:
            import_module(name)


def _main() -> None:
    entry_points.read_once()
    import_all(PRELOADED)
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        _read_signatures()
        request = serve(listener=listener)
    if request is not None:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
