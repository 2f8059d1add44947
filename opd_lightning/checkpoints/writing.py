"""Atomic writing of checkpoints.

A checkpoint is written under a hidden name, flushed to the disk, read back and renamed. A process
that is killed at any moment leaves the previous checkpoints, or those and the new one.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from opd_lightning.checkpoints.plain import load
from opd_lightning.checkpoints.seal import seal
from opd_lightning.checkpoints.staging import commit, remove, staging_path, sync
from opd_lightning.errors import CheckpointError, UserError, raised_by_all, reason_of
from opd_lightning.processes import gather, rank

MANIFEST = "manifest.json"  # in a folder of shards: {"files": {name: [bytes, CRC-32]}}
INDEX = ".metadata"  # in a folder of shards: maps tensors to shards
META = "meta.pt"  # in a folder of shards: everything but weights and optimiser
PATIENCE = 60.0  # seconds that one node's files may take to appear on another


def save_last(trainer: Trainer) -> Path:
    """Save the state as `last.ckpt`, beside the other checkpoints; return its path.

    All processes must call this between two steps, or before the optimiser updates in one. An
    existing `last.ckpt` is replaced; a link's destination is not overwritten.

    Raises:
        CheckpointError: If it could not be written; previous checkpoints are unchanged.
    """
    saver = trainer.checkpoint_callback
    if not isinstance(saver, ModelCheckpoint):
        raise UserError(
            "trainer.callbacks: got no ModelCheckpoint, so there is no folder to save in; leave "
            "trainer.enable_checkpointing on"
        )
    path = Path(saver.dirpath or ".", saver.CHECKPOINT_NAME_LAST + saver.FILE_EXTENSION)
    saver.last_model_path = str(path)  # else the resumed run would write last-v1
    trainer.save_checkpoint(path, weights_only=False)
    return path


def write(trainer: Trainer, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write the return value of `dump_checkpoint` to a file, or to a folder of shards.

    All processes must call this; either all return or all raise.

    Raises:
        CheckpointError: If it could not be written on any process.
    """
    check_place(str(path))
    target = Path(os.path.abspath(trainer.strategy.broadcast(str(path))))
    attempt = _Attempt(trainer.global_step, target)
    new = staging_path(target)
    attempt(lambda: _clear(target) if rank() == 0 else None)
    if not _sharded(trainer):
        attempt(lambda: _write_file(checkpoint, new) if rank() == 0 else None)
    else:
        attempt(lambda: new.mkdir(exist_ok=True))
        attempt(lambda: trainer.strategy.save_checkpoint(checkpoint, new))
        sums = attempt(lambda: _sums(new))
        attempt(lambda: _finish_folder(new, sums) if rank() == 0 else None)
    attempt(lambda: commit(target) if rank() == 0 else None)


def check_place(path: str) -> None:
    """Raise UserError for a place that is not on a file system of this machine."""
    if "://" in path:
        raise UserError(f"checkpoints: got {path!r}, expected a folder of this machine's")


class _Attempt:
    """Runner of parts of the work on all processes; if one fails, all raise.

    Args:
        step: Optimiser steps made.
        target: Path of the checkpoint.
    """

    def __init__(self, step: int, target: Path) -> None:
        self.step = step
        self.target = target

    def __call__(self, act: Callable[[], Any]) -> list[Any]:
        """Run `act` and return every process's result, by rank."""
        result = failure = None
        try:
            result = act()
        except (Exception, CheckpointException) as error:  # torch's is a BaseException
            failure = _cause(error, rank())
        outcomes = gather((result, failure))
        for _, failed in outcomes:
            if failed is not None:
                self._fail(*failed, alone=len(outcomes) == 1)
        return [result for result, _ in outcomes]

    def _fail(self, number: int, reason: str, *, alone: bool) -> None:
        free = ""
        if rank() == 0:
            with suppress(OSError):
                remove(staging_path(self.target))
            with suppress(OSError):
                free = f", {shutil.disk_usage(_existing(self.target)).free} bytes are free there"
        error = CheckpointError(
            f"step {self.step}: could not write {str(self.target)!r}"
            + ("" if alone else f" (rank {number})")
            + f": {reason}{free}; the checkpoints before it are untouched: fix the cause and "
            "resume with --ckpt_path last"
        )
        raise raised_by_all(error)


def _sharded(trainer: Trainer) -> bool:
    strategy = trainer.strategy
    return isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint


def _clear(target: Path) -> None:
    """Create the parent folder, and remove what a killed process left at the staging path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove(staging_path(target))


def _write_file(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("w+b") as file:
        torch.save(checkpoint, file)
        file.flush()
        seal(file)
        file.flush()
        os.fsync(file.fileno())
    load(path, mmap=True)  # entries of callbacks must be loadable; tensors are not read here


def _sums(folder: Path) -> dict[str, list[int]]:
    """Return sizes and checksums of the shards that this process wrote."""
    return {file.name: sum_of(file) for file in sorted(folder.glob(f"__{rank()}_*"))}


def _finish_folder(folder: Path, sums: list[dict[str, list[int]]]) -> None:
    """Write the manifest; it is written last, and completes the folder."""
    load(folder / META, mmap=True)  # entries of callbacks must be loadable
    sync(folder / META)
    files = {name: value for part in sums for name, value in part.items()}
    for name in (META, INDEX):
        files[name] = sum_of(folder / name)
    wait_for(folder, {name: size for name, (size, _) in files.items()})
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": files}), encoding="utf-8")
    sync(manifest)
    sync(folder)


def sum_of(file: Path) -> list[int]:
    """Return [bytes, CRC-32] of a file."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            crc = zlib.crc32(block, crc)
        return [stream.tell(), crc]


def wait_for(folder: Path, sizes: dict[str, int]) -> None:
    """Wait until files that another node wrote have appeared with their full sizes.

    Raises:
        FileNotFoundError: If they do not appear in time.
    """
    end = monotonic() + PATIENCE
    while missing := [name for name, size in sizes.items() if _size(folder / name) != size]:
        if monotonic() > end:
            raise FileNotFoundError(
                f"{missing[0]!r} of another process did not show up within {PATIENCE:.0f} s; all "
                "nodes must share the folder"
            )
        sleep(0.2)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _existing(path: Path) -> Path:
    return next(place for place in path.parents if place.exists())


def _cause(error: BaseException, number: int) -> tuple[int, str]:
    """Return (rank, one-line cause); the operating system's message if there is one."""
    if isinstance(error, CheckpointException):  # every process gets the failures of all
        number = min(error.failures)
        error = error.failures[number][0]
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return number, seen.strerror
        seen = seen.__cause__ or seen.__context__
    return number, reason_of(error, 300)
