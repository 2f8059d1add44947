"""Where servers listen: files that they write once they answer, and who reads them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from opd_lightning.errors import ServerAwayError
from opd_lightning.serving.wire import checked_url

LOOK_SECONDS = 0.5  # between two looks for a file
_HOST_AND_PORT = re.compile(r"[^/]+:\d+")  # an address without its beginning; no file is so called


def write_address(file: Path, url: str) -> None:
    """All of it at once, so that nobody reads half an address."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(url + "\n")
    draft.replace(file)


def check_places(places: Sequence[str]) -> None:
    """Raise UserError for what can be neither an address nor the path of an address file."""
    for place in places:
        if "://" in place or _HOST_AND_PORT.fullmatch(place):
            checked_url(place)


def addresses(places: Sequence[str], *, patience: float) -> list[str]:
    """The servers' addresses.

    Args:
        places: Addresses, such as http://127.0.0.1:8000, or paths of their address files.
        patience: Seconds that a file is waited for: its server may still be loading.
    """
    until = time.monotonic() + patience
    return [
        checked_url(p if "://" in p else _read(Path(p).expanduser(), until, patience))
        for p in places
    ]


def _read(file: Path, until: float, patience: float) -> str:
    while not file.is_file():
        if time.monotonic() >= until:
            raise ServerAwayError(
                f"address file {str(file)!r}: not there after {patience:g} s; start its server "
                "(`opd serve --address_file`) and see its log"
            )
        time.sleep(LOOK_SECONDS)
    return file.read_text().strip()
