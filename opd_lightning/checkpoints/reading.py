"""Verification of checkpoints, and their description without reading tensors."""

from __future__ import annotations

import errno
import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from opd_lightning.checkpoints.plain import load, metadata_of
from opd_lightning.checkpoints.seal import is_sealed
from opd_lightning.checkpoints.writing import INDEX, MANIFEST, META, sum_of, wait_for
from opd_lightning.errors import RunStoppedError, UserError, reason_of

Shape = tuple[int, ...]
PICKLE = "data.pkl"  # in a file: everything but tensor data
CHANGED = "bytes of it are missing or were changed"
FOREIGN = "it holds something else than the state of a run"


class DamagedError(Exception):
    """A file or folder is not a checkpoint, is incomplete, or holds more than plain data."""


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Description of a checkpoint whose tensors have not been read."""

    path: Path
    step: int  # optimiser steps made
    time: float  # modification, seconds since 1970
    sizes: dict[str, int]  # bytes of its files by relative path; "" is the path itself
    shapes: dict[str, Shape]  # shapes of the module's tensors
    resumable: bool  # whether it has the state of the optimiser and of the loops
    written_by: dict[str, Any]  # processes, method, optimizers; empty in older checkpoints
    is_sealed: bool  # False if an earlier version wrote it, or another program changed it

    @property
    def is_folder(self) -> bool:
        return "" not in self.sizes


def describe(path: Path) -> Saved:
    """Describe a checkpoint. This is cheap: tensors and checksums are not read.

    Raises:
        DamagedError: If it cannot be a checkpoint.
        OSError: If the disk cannot be read.
    """
    with _as_damaged_error(path):
        if not path.is_dir():
            _check_file(path)
        return _describe_folder(path) if path.is_dir() else _describe_file(path)


def check_sums(saved: Saved, part: int = 0, parts: int = 1) -> None:
    """Verify checksums; of a folder, those of every `parts`-th file from `part` on.

    Raises:
        DamagedError: If contents differ.
        OSError: If the disk cannot be read, or files of another node do not appear on this one.
    """
    wait_for(saved.path, saved.sizes)
    if saved.is_folder:
        for name, expected in sorted(_manifest(saved.path).items())[part::parts]:
            _check_sum(saved.path / name, expected)
    elif part == 0:
        with _as_damaged_error(saved.path), zipfile.ZipFile(saved.path) as archive:
            if (bad := archive.testzip()) is not None:
                raise _checksum_error(bad)


def whole(path: str | Path) -> Saved:
    """Describe and verify a checkpoint that a user named, in this process.

    Raises:
        UserError: If it is damaged.
    """
    try:
        saved = describe(Path(path))
        check_sums(saved)
    except DamagedError as error:
        raise refusal(path, error) from error
    return saved


def state_of(saved: Saved) -> dict[str, Any]:
    """Load the plain data of a checkpoint; tensors of a file are read on access."""
    return _load_state(saved.path / META if saved.is_folder else saved.path)


@contextmanager
def restoring(what: str) -> Iterator[None]:
    """Convert every error that a state of a checkpoint causes where it is restored to UserError.

    Args:
        what: Whose state it is, in words.
    """
    try:
        yield
    except (UserError, RunStoppedError, OSError):
        raise
    except Exception as error:  # of any type: a file that was changed may hold anything
        raise UserError(
            f"--ckpt_path: {what} in the checkpoint cannot be restored ({type(error).__name__}: "
            f"{reason_of(error, 120)}), so it was changed after it was written; name another"
        ) from error


def refusal(path: str | Path, error: DamagedError) -> UserError:
    return UserError(
        f"--ckpt_path: {str(path)!r} is damaged or no checkpoint: {error}; name another of "
        "the run's, or give 'last', its newest whole one"
    )


@contextmanager
def _as_damaged_error(path: Path) -> Iterator[None]:
    """Convert every error that damaged bytes cause in a reader to DamagedError."""
    try:
        yield
    except DamagedError:
        raise
    except pickle.UnpicklingError as error:
        raise DamagedError(str(error)) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{Path(error.filename or path).name!r} is missing") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # from seeking to before the file's beginning
            raise  # an unreadable disk does not mean a damaged checkpoint
        raise DamagedError(CHANGED) from error
    except Exception as error:  # torch, pickle and zipfile raise too many types to list
        raise DamagedError(CHANGED) from error


def _describe_file(path: Path) -> Saved:
    stat = path.stat()
    if not zipfile.is_zipfile(path):
        raise DamagedError("it is cut short, or was not written by `opd fit`")
    with zipfile.ZipFile(path) as archive:
        sealed = is_sealed(archive)
        pickles = [name for name in archive.namelist() if Path(name).name == PICKLE]
        if not pickles:
            raise DamagedError(f"{PICKLE!r} in it is missing")
        try:
            archive.read(pickles[0])
        except zipfile.BadZipFile as error:
            raise _checksum_error(pickles[0]) from error
    content = _load_state(path)
    weights = content.get("state_dict")
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise DamagedError(FOREIGN)
    return Saved(
        path=path,
        step=content["global_step"],
        time=stat.st_mtime,
        sizes={"": stat.st_size},
        shapes={name: tuple(tensor.shape) for name, tensor in weights.items()},
        resumable=bool(content.get("optimizer_states")) and "loops" in content,
        written_by=_written_by(content),
        is_sealed=sealed,
    )


def _load_state(file: Path) -> dict[str, Any]:
    """Load a run's state; raise DamagedError if it is something else."""
    content = load(file, mmap=True)
    step = content.get("global_step") if isinstance(content, dict) else None
    if type(step) is not int or step < 0:
        raise DamagedError(FOREIGN)
    return content


def _written_by(content: dict[str, Any]) -> dict[str, Any]:
    """Return the description of the run that wrote a checkpoint; empty in older ones."""
    found = content.get("written_by", {})
    kinds = {"processes": int, "method": str, "optimizers": list}
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name, kind()), kind) for name, kind in kinds.items()
    ):
        raise DamagedError(FOREIGN)
    return found


def _describe_folder(path: Path) -> Saved:
    files = _manifest(path)
    sizes = {name: size for name, (size, _) in files.items()}
    for name, size in sizes.items():
        if (found := (path / name).stat().st_size) != size:
            raise DamagedError(f"{name!r} has {found} of {size} bytes")
    for name in (META, INDEX):  # before they are unpickled
        _check_sum(path / name, files[name])
    content = _load_state(path / META)
    stored = metadata_of(path).state_dict_metadata
    return Saved(
        path=path,
        step=content["global_step"],
        time=(path / MANIFEST).stat().st_mtime,
        sizes=sizes,
        shapes={
            name.removeprefix("state_dict."): tuple(entry.size)
            for name, entry in stored.items()
            if name.startswith("state_dict.") and isinstance(entry, TensorStorageMetadata)
        },
        resumable="loops" in content and any(name.startswith("optimizer_0.") for name in stored),
        written_by=_written_by(content),
        is_sealed=True,  # its manifest has been checked
    )


def _check_file(path: Path) -> None:
    """Raise DamagedError for a pipe or a device, whose end a reader might never come to."""
    if path.exists() and not path.is_file():
        raise DamagedError(f"{path.name!r} is a pipe or a device")


def _manifest(folder: Path) -> dict[str, list[int]]:
    _check_file(folder / MANIFEST)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files: dict[str, list[int]] = manifest["files"]
    return files


def _check_sum(file: Path, expected: list[int]) -> None:
    if sum_of(file) != expected:
        raise _checksum_error(file.name)


def _checksum_error(name: str) -> DamagedError:
    return DamagedError(f"{name!r} in it has other bytes than were written")
