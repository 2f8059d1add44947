"""Where a checkpoint lies while it is written, and how it gets its name.

The names meanwhile begin with a dot and do not end in `.ckpt`, so that nothing takes what lies
there for a checkpoint.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

WRITING = ".writing"  # not finished, or about to get its name
REPLACED = ".replaced"  # about to be removed: the new one has the name, or is about to get it


def place_of(target: Path) -> Path:
    """Where the checkpoint that will be `target` is written."""
    return _hidden(target, WRITING)


def put(target: Path) -> None:
    """Give what was written for `target` its name; what had the name is removed.

    A link is replaced and what it names is left alone. Where a folder is replaced, or replaces,
    there is a moment without the name; `recover` makes up for a kill in it.
    """
    new, old = place_of(target), _hidden(target, REPLACED)
    if _is_folder(target) or (_is_folder(new) and os.path.lexists(target)):
        remove(old)
        target.rename(old)
    new.replace(target)
    sync(target.parent)
    remove(old)


def recover(folder: Path) -> None:
    """Finish what kills interrupted in `folder`, and remove what they left half written."""
    for old in folder.glob(f".*{REPLACED}"):
        target = _named(old, REPLACED)
        if not os.path.lexists(target):  # only what is whole gets as far as `put`
            new = place_of(target)
            (new if os.path.lexists(new) else old).rename(target)
        remove(old)
    for new in folder.glob(f".*{WRITING}"):
        remove(new)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one."""
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # not every filesystem can sync a list of names
            raise
    finally:
        os.close(handle)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _hidden(target: Path, mark: str) -> Path:
    return target.with_name(f".{target.name}{mark}")


def _named(hidden: Path, mark: str) -> Path:
    return hidden.with_name(hidden.name.removeprefix(".").removesuffix(mark))
