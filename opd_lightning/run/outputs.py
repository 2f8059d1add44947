"""Files and folders that a command writes: checked before its work, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from opd_lightning.errors import RunStoppedError, UserError, reason_of


def check_file(option: str, path: Path) -> None:
    """Raise UserError unless the file can be written; nothing is created or changed.

    Args:
        option: Name of the option, for messages.
        path: An existing file to replace, or a new one in an existing folder. It may be a pipe or
            a device.
    """
    with _in_one_line(option, path):
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(
                f"{option}: got {str(path)!r}, expected a file to write, in a folder that is there"
            )
        exists = path.exists()
        may_write = os.access(path, os.W_OK) if exists else _may_create_in(path.parent)
    if not may_write:
        raise _not_writable(option, path)


def check_folder(option: str, path: Path) -> None:
    """Raise UserError unless the folder exists or can be created, and is writable."""
    with _in_one_line(option, path):
        places = [path] if path.is_dir() else [path, *path.absolute().parents]
        place = next(place for place in places if os.path.lexists(place))
        is_folder, may_write = place.is_dir(), _may_create_in(place)
    if not is_folder:
        raise UserError(
            f"{option}: got {str(path)!r}, but {str(place)!r} is no folder; name another"
        )
    if not may_write:
        raise _not_writable(option, path)


def check_run_files(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError if a run folder has something else where a run writes its files.

    A pipe would block, a device would discard the data, and a link may point to another run's file.

    Args:
        folder: The run folder, which need not be there.
        names: Files that a run writes into it, which may be missing.
    """
    with _in_one_line("run folder", folder):
        for path in (folder / name for name in names):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise UserError(
                    f"run folder: got a folder, link, pipe or device at {str(path)!r}, expected a "
                    "file of the run, or nothing; remove it, or name another folder"
                )


def write_text(option: str, path: Path, text: str) -> None:
    """Write a file; replace an existing one atomically.

    Raises:
        RunStoppedError: If it could not be written; an existing file is unchanged.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe or a device
            path.write_text(text, encoding="utf-8")
            return
        target = Path(os.path.realpath(path))  # replaces the target of a link, not the link
        draft = target.with_name(f".{target.name}.writing")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise _lost(option, path, error) from error


@contextmanager
def writing_folder(option: str, folder: Path) -> Iterator[None]:
    """Fill a new or empty folder; after an exception, remove the written files.

    Raises:
        RunStoppedError: If writing fails.
    """
    is_new = not folder.exists()
    try:
        yield
    except BaseException as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if isinstance(error, OSError | SafetensorError):
            raise _lost(option, folder, error) from error
        raise


def _may_create_in(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _not_writable(option: str, path: Path) -> UserError:
    return UserError(
        f"{option}: got {str(path)!r}, which cannot be written (read-only, or not yours); name "
        "another"
    )


def _lost(option: str, path: Path, error: Exception) -> RunStoppedError:
    reason = getattr(error, "strerror", None) or reason_of(error)
    return RunStoppedError(f"{option}: could not write {str(path)!r}: {reason}; name another place")


@contextmanager
def _in_one_line(option: str, path: Path) -> Iterator[None]:
    """Turn an OSError about a path into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option}: got {str(path)[:80]!r}: {error.strerror or error}; name another"
        ) from error
