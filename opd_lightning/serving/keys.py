"""Keys of servers, in files that only their owner may read or in the environment."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from opd_lightning.errors import UserError

KEY_VARIABLE = "OPD_SERVER_KEY"


def read_key(key_file: str | None) -> str | None:
    """Return the key from a file, or from the environment; None if there is neither."""
    if key_file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (key.isascii() and key.isprintable()):  # no header could hold it
            raise UserError(f"{KEY_VARIABLE}: expected the key alone, in one line of ASCII")
        return key or None
    path = Path(os.path.expanduser(key_file))
    try:
        key = path.read_text(encoding="utf-8").strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"key_file: cannot read {key_file!r}; give a file with the key") from error
    if mode & 0o077:
        raise UserError(f"key_file: others may read {key_file!r}; chmod 600 it")
    if not key or len(key.split()) > 1 or not key.isascii():
        raise UserError(f"key_file: expected the key alone, in one line, in {key_file!r}")
    return key


def make_key_file(path: Path) -> None:
    """Write a new key, readable by its owner only; an existing key is checked and kept.

    Several servers of a run may call this at the same time and get the same key.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            with os.fdopen(
                os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8"
            ) as out:
                out.write(secrets.token_urlsafe(32) + "\n")
            with suppress(FileExistsError):  # another server was faster
                os.link(draft, path)  # atomic, with its content
        except OSError as error:
            raise UserError(f"key_file: cannot write {str(path)!r}: {error.strerror}") from error
        finally:
            draft.unlink(missing_ok=True)
    read_key(str(path))
