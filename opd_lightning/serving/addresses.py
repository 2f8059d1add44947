"""Server addresses, and address files that servers write once they answer requests."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from opd_lightning.errors import ServerAwayError, UserError, reason_of
from opd_lightning.serving.keys import KEY_VARIABLE

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # polling interval for an address file


def prepare_address_file(file: Path) -> None:
    """Make the folder of an address file and delete an old one: its server is not ready yet.

    Raises:
        UserError: The file could not be written later.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        draft = _draft(file)
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise UserError(
            f"address_file: cannot write {str(file)!r}: {reason_of(error)}; name another file"
        ) from error


def write_address(file: Path, url: str) -> None:
    """Write `url` to `file` atomically, so that no reader sees a partial address."""
    draft = _draft(file)
    draft.write_text(url + "\n", encoding="utf-8")
    draft.replace(file)


def _draft(file: Path) -> Path:
    return file.with_name(f".{file.name}.{os.getpid()}")


def is_every_interface(host: str) -> bool:
    """Return whether a socket that is bound to `host` listens on all interfaces.

    Resolves the name: "0", "0x0" and "::ffff:0.0.0.0" are spellings of such an address.
    """
    if host in ("", "*"):
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False  # binding or connecting raises the error
    addresses = [ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found]
    return any(
        (getattr(address, "ipv4_mapped", None) or address).is_unspecified for address in addresses
    )


def checked_address(server: str) -> str:
    """Return the address without a trailing slash, or the path of an address file."""
    if "://" not in server:
        if not server or re.fullmatch(r"[^/]*:\d+/?", server):
            raise UserError(
                f"servers: got {server!r}, expected an address like http://127.0.0.1:8000, or the "
                "path of an address file"
            )
        return server
    try:
        parts = urlsplit(server)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_address &= parts.port != 0  # ValueError if it is no number, or above 65535
    except ValueError:
        is_address = False
    if not is_address:
        raise UserError(f"servers: got {server!r}, expected an address like http://127.0.0.1:8000")
    if parts.username or parts.password or parts.query:  # would be logged
        raise UserError(
            f"servers: {parts.scheme}://{parts.hostname}: got a name, password or query in the "
            f"address; put the key into key_file or {KEY_VARIABLE}"
        )
    return server.rstrip("/")


def resolve_addresses(servers: Sequence[str], *, patience: float) -> list[str]:
    """Return the servers' addresses; wait for address files that do not exist yet.

    Args:
        servers: As returned by `checked_address`.
        patience: Seconds to wait for address files: their servers may still be loading.
    """
    until = time.monotonic() + patience
    files = [address_file(server) for server in servers]
    pairs = zip(servers, files, strict=True)
    return [s if file is None else _wait_for(file, until, patience) for s, file in pairs]


def address_file(server: str) -> Path | None:
    """Return the path of the address file; None if `server` is an address."""
    return None if "://" in server else Path(os.path.expanduser(server))


def read_address(file: Path) -> str | None:
    """Return the current address in `file`; None if there is no valid one."""
    try:
        return _address_in(file)
    except (OSError, ValueError):  # its server has ended, or another program writes there
        return None


def _wait_for(file: Path, until: float, patience: float) -> str:
    if not file.is_file():
        log.warning("address file '%s': waiting %g s for its server", file, patience)
    while not file.is_file():
        if time.monotonic() >= until:
            raise ServerAwayError(
                f"address file {str(file)!r}: not there after {patience:g} s; start its server "
                "(`opd serve --address_file`) and see its log"
            )
        time.sleep(POLL_SECONDS)
    try:
        return _address_in(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"address file {str(file)!r}: cannot be read ({reason_of(error)}); name the file that "
            "`opd serve --address_file` writes"
        ) from error


def _address_in(file: Path) -> str:
    """Return the address in a file; raise UserError for another path."""
    text = file.read_text(encoding="utf-8").strip()
    if "://" not in text:
        raise UserError(
            f"address file {str(file)!r}: got {text[:80]!r}, expected an address like "
            "http://127.0.0.1:8000"
        )
    return checked_address(text)
