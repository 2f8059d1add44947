"""Whether a checkpoint is whole, and what it says of itself."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from opd_lightning.checkpoints.plain import load, metadata_of
from opd_lightning.checkpoints.writing import MANIFEST, META, sum_of, wait_for
from opd_lightning.errors import UserError

Shape = tuple[int, ...]


class DamagedError(Exception):
    """A file or folder is no checkpoint, is not whole, or holds more than plain data."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint, known without having read its tensors."""

    path: Path
    step: int  # optimiser steps made
    time: float  # modification, seconds since 1970
    sizes: dict[str, int]  # bytes of its files, relative to the path; "" is itself
    shapes: dict[str, Shape]  # of the module's tensors
    resumable: bool  # has the optimiser's state, too
    written_by: dict[str, Any]  # processes, method, optimizers; empty in older ones

    @property
    def is_folder(self) -> bool:
        return "" not in self.sizes


def look(path: Path) -> Saved:
    """What the checkpoint says of itself. Costs little: tensors and checksums are not read.

    Raises:
        DamagedError: It cannot be one.
        OSError: The disk did not answer.
    """
    try:
        return _look_at_folder(path) if path.is_dir() else _look_at_file(path)
    except pickle.UnpicklingError as error:
        raise DamagedError(str(error)) from error
    except OSError as error:
        # A missing part is damage; a disk that does not answer says nothing about the checkpoint.
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DamagedError(f"{Path(error.filename or path).name!r} is missing") from error
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(" ".join(str(error).split())[:150] or type(error).__name__) from error


def check_sums(saved: Saved, part: int = 0, parts: int = 1) -> None:
    """Compare contents with the checksums; of a folder, every `parts`-th file from `part` on.

    Raises:
        DamagedError: They differ.
        OSError: The disk did not answer, or another node's files do not show up on this one.
    """
    if not saved.is_folder:
        wait_for(saved.path, saved.sizes)
        if part == 0:
            _check_zip(saved.path)
        return
    wait_for(saved.path, saved.sizes)
    for name, expected in sorted(_manifest(saved.path).items())[part::parts]:
        if sum_of(saved.path / name) != expected:
            raise DamagedError(f"{name!r} has other bytes than were written")


def whole(path: str | Path) -> Saved:
    """A checkpoint that someone named, checked in this process.

    Raises:
        UserError: It is damaged.
    """
    try:
        saved = look(Path(path))
        check_sums(saved)
    except DamagedError as error:
        raise refusal(path, error) from error
    return saved


def refusal(path: str | Path, error: DamagedError) -> UserError:
    return UserError(
        f"--ckpt_path: {str(path)!r} is damaged or no checkpoint: {error}; name another of a "
        "run's, or continue a run from its newest whole one with `opd fit --ckpt_path last`"
    )


def _look_at_file(path: Path) -> Saved:
    if not zipfile.is_zipfile(path):
        raise DamagedError("it is cut short, or was not written by `opd fit`")
    content = load(path, mmap=True)
    stat = path.stat()
    return Saved(
        path=path,
        step=int(content["global_step"]),
        time=stat.st_mtime,
        sizes={"": stat.st_size},
        shapes={name: tuple(tensor.shape) for name, tensor in content["state_dict"].items()},
        resumable="optimizer_states" in content,
        written_by=content.get("written_by", {}),
    )


def _look_at_folder(path: Path) -> Saved:
    files = _manifest(path)
    sizes = {name: size for name, (size, _) in files.items()}
    for name, size in sizes.items():
        if (found := (path / name).stat().st_size) != size:
            raise DamagedError(f"{name!r} has {found} of {size} bytes")
    content = load(path / META, mmap=True)
    held = metadata_of(path).state_dict_metadata
    return Saved(
        path=path,
        step=int(content["global_step"]),
        time=(path / MANIFEST).stat().st_mtime,
        sizes=sizes,
        shapes={
            name.removeprefix("state_dict."): tuple(entry.size)
            for name, entry in held.items()
            if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
        },
        resumable=any(name.startswith("optimizer_0.") for name in held),
        written_by=content.get("written_by", {}),
    )


def _manifest(folder: Path) -> dict[str, list[int]]:
    files: dict[str, list[int]] = json.loads((folder / MANIFEST).read_text())["files"]
    return files


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except zipfile.BadZipFile as error:
        raise DamagedError(str(error)) from error
    if bad is not None:
        raise DamagedError(f"{bad!r} in it has other bytes than were written")
