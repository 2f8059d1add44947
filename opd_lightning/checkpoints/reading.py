"""Whether a checkpoint is whole, and what it says of itself."""

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
from opd_lightning.checkpoints.writing import INDEX, MANIFEST, META, sum_of, wait_for
from opd_lightning.errors import UserError

Shape = tuple[int, ...]
PICKLE = "data.pkl"  # of a file: all but the tensors' numbers
CHANGED = "bytes of it are missing or were changed"
FOREIGN = "it holds something else than the state of a run"


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
    with _damage_told(path):
        return _look_at_folder(path) if path.is_dir() else _look_at_file(path)


def check_sums(saved: Saved, part: int = 0, parts: int = 1) -> None:
    """Compare contents with the checksums; of a folder, every `parts`-th file from `part` on.

    Raises:
        DamagedError: They differ.
        OSError: The disk did not answer, or another node's files do not show up on this one.
    """
    if not saved.is_folder:
        wait_for(saved.path, saved.sizes)
        if part == 0:
            with _damage_told(saved.path), zipfile.ZipFile(saved.path) as archive:
                if (bad := archive.testzip()) is not None:
                    raise _other_bytes(bad)
        return
    wait_for(saved.path, saved.sizes)
    for name, expected in sorted(_manifest(saved.path).items())[part::parts]:
        _check_sum(saved.path / name, expected)


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
        f"--ckpt_path: {str(path)!r} is damaged or no checkpoint: {error}; name another of "
        "the run's, or give 'last', its newest whole one"
    )


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Every way in which broken bytes make a reader fail, in words that are not the reader's."""
    try:
        yield
    except DamagedError:
        raise
    except pickle.UnpicklingError as error:
        raise DamagedError(str(error)) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{Path(error.filename or path).name!r} is missing") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a place before the file's beginning
            raise  # a disk that does not answer says nothing about the checkpoint
        raise DamagedError(CHANGED) from error
    except Exception as error:  # no list of torch's, pickle's and zipfile's would be complete
        raise DamagedError(CHANGED) from error


def _look_at_file(path: Path) -> Saved:
    stat = path.stat()
    if not zipfile.is_zipfile(path):
        raise DamagedError("it is cut short, or was not written by `opd fit`")
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if Path(name).name == PICKLE]
        if not pickles:
            raise DamagedError(f"{PICKLE!r} in it is missing")
        try:
            archive.read(pickles[0])
        except zipfile.BadZipFile as error:
            raise _other_bytes(pickles[0]) from error
    content = _state_in(path)
    weights = content.get("state_dict")
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise DamagedError(FOREIGN)
    return Saved(
        path=path,
        step=content["global_step"],
        time=stat.st_mtime,
        sizes={"": stat.st_size},
        shapes={name: tuple(tensor.shape) for name, tensor in weights.items()},
        resumable="optimizer_states" in content,
        written_by=content.get("written_by", {}),
    )


def _state_in(file: Path) -> dict[str, Any]:
    """What a run saved of itself."""
    content = load(file, mmap=True)
    if not isinstance(content, dict) or not isinstance(content.get("global_step"), int):
        raise DamagedError(FOREIGN)
    return content


def _look_at_folder(path: Path) -> Saved:
    files = _manifest(path)
    sizes = {name: size for name, (size, _) in files.items()}
    for name, size in sizes.items():
        if (found := (path / name).stat().st_size) != size:
            raise DamagedError(f"{name!r} has {found} of {size} bytes")
    for name in (META, INDEX):  # before they are unpickled
        _check_sum(path / name, files[name])
    content = _state_in(path / META)
    held = metadata_of(path).state_dict_metadata
    return Saved(
        path=path,
        step=content["global_step"],
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


def _check_sum(file: Path, expected: list[int]) -> None:
    if sum_of(file) != expected:
        raise _other_bytes(file.name)


def _other_bytes(name: str) -> DamagedError:
    return DamagedError(f"{name!r} in it has other bytes than were written")
