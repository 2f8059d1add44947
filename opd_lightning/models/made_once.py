"""Files that one process makes and all use, in the user's cache."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from opd_lightning.errors import UserError, note

LOCK = ".lock"
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def user_cache(name: str) -> Path:
    """Return a folder below `opd-lightning` in the user's cache folder; it may not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "opd-lightning", name)


def made_once(folder: Path, what: str, make: Callable[[Path], None]) -> None:
    """Make a folder unless it exists, in one process; others wait for it. It appears complete.

    Args:
        folder: The folder; its parent is created.
        what: Name of the result, for notes and errors.
        make: Fills an empty folder.

    Raises:
        UserError: The folder cannot be written.
    """
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with made_by_one(folder.with_name(f".{folder.name}{LOCK}"), what):
            if folder.exists():
                return
            unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
            try:
                make(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"{what}: {str(folder.parent)!r}: {error.strerror or error}; set XDG_CACHE_HOME to a "
            "folder that can be written"
        ) from error


@contextmanager
def made_by_one(path: Path, what: str) -> Iterator[None]:
    """Hold a lock while one process makes a file or folder; others wait without time limit.

    On file systems without locks, several processes may make it.

    Args:
        path: Lock file, which is not deleted.
        what: Name of the result, for the note of waiting processes.
    """
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            note(f"{what}: another process makes it; waiting")
            lock.acquire()
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    try:
        yield
    finally:
        lock.release()
