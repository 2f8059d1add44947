"""TensorBoard's server as a process."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import create_connection, socket


@contextmanager
def tensorboard(run: Path, *, fast: bool = False) -> Iterator[str]:
    """Start a server and yield its address; `fast` uses its default loader, a separate program."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["--logdir", str(run), "--port", str(port), "--load_fast", str(fast).lower()]
    process = subprocess.Popen([sys.executable, "-m", "tensorboard.main", *command])
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                create_connection(("127.0.0.1", port)).close()
                break
            except OSError:  # not up
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
