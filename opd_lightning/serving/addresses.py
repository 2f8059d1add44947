"""Where servers listen: files that they write once they answer, and who reads them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from opd_lightning.errors import ServerAwayError

LOOK_SECONDS = 0.5  # between two looks for a file


def write_address(file: Path, url: str) -> None:
    """All of it at once, so that nobody reads half an address."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(url + "\n")
    draft.replace(file)


def addresses(servers: Sequence[str], *, patience: float) -> list[str]:
    """The servers' addresses.

    Args:
        servers: Addresses, such as http://127.0.0.1:8000, or paths of their address files.
        patience: Seconds that a file is waited for: its server may still be loading.
    """
    until = time.monotonic() + patience
    return [s if "://" in s else _read(Path(s).expanduser(), until, patience) for s in servers]


def _read(file: Path, until: float, patience: float) -> str:
    while not file.is_file():
        if time.monotonic() >= until:
            raise ServerAwayError(
                f"address file {str(file)!r}: not there after {patience:g} s; start its server "
                "(`opd serve --address_file`) and see its log"
            )
        time.sleep(LOOK_SECONDS)
    return file.read_text().strip()
