"""Staging of checkpoints: a hidden path while they are written, then a rename.

Hidden names begin with a dot and do not end in `.ckpt`, so that they are not taken for
checkpoints.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

WRITING = ".writing"  # incomplete, or about to be renamed to the target
REPLACED = ".replaced"  # about to be removed: the new one has, or is about to get, the name


def staging_path(target: Path) -> Path:
    """Return the path at which the checkpoint `target` is written."""
    return _hidden(target, WRITING)


def commit(target: Path) -> None:
    """Rename the staged checkpoint to `target` and remove the previous one.

    A link is replaced, its destination is not. Where a folder is replaced, or replaces, there is
    a moment without `target`; `recover` repairs a kill at that moment.
    """
    new, old = staging_path(target), _hidden(target, REPLACED)
    if _is_folder(target) or (_is_folder(new) and os.path.lexists(target)):
        remove(old)
        target.rename(old)
    new.replace(target)
    sync(target.parent)
    remove(old)


def recover(folder: Path) -> None:
    """Finish interrupted commits in `folder`, and remove incomplete checkpoints."""
    for old in folder.glob(f".*{REPLACED}"):
        target = _named(old, REPLACED)
        if not os.path.lexists(target):  # only complete checkpoints get as far as `commit`
            new = staging_path(target)
            (new if os.path.lexists(new) else old).rename(target)
        remove(old)
    for new in folder.glob(f".*{WRITING}"):
        remove(new)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it exists."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # not every filesystem can sync a folder
            raise
    finally:
        os.close(handle)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _hidden(target: Path, mark: str) -> Path:
    return target.with_name(f".{target.name}{mark}")


def _named(hidden: Path, mark: str) -> Path:
    return hidden.with_name(hidden.name.removeprefix(".").removesuffix(mark))
