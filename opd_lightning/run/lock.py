"""Locks: one job at a time writes to a run folder or to an output file."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from opd_lightning.errors import UserError, note
from opd_lightning.models.made_once import LOCK, UNSUPPORTED

FOLDER_SETTINGS = "--trainer.logger.init_args.save_dir (or --trainer.default_root_dir)"
PATIENCE = 120.0  # seconds that a requeued job waits for its previous process to end


def held(folder: Path, *, patience: float = PATIENCE) -> AbstractContextManager[None]:
    """Lock a run folder, created if missing; see `_held`."""
    elsewhere = f"name another folder with {FOLDER_SETTINGS}"
    return _held(folder / LOCK, f"run folder {str(folder)!r}", elsewhere, patience)


def held_file(file: Path) -> AbstractContextManager[None]:
    """Lock a file that a command writes to, its folder created if missing; see `_held`."""
    place = file.with_name(f".{file.name}{LOCK}")
    return _held(place, f"--out: {str(file)!r}", "name another file", PATIENCE)


@contextmanager
def _held(path: Path, what: str, elsewhere: str, patience: float) -> Iterator[None]:
    """Hold a lock, or raise UserError naming its holder before anything is written.

    The kernel releases the lock when the process ends, however it ends; child processes do not
    keep it. On a network file system the file server releases it, after a node failure as soon
    as it detects it. Where files cannot be locked, a note is printed and the run continues.

    Args:
        path: Lock file; contains its holder, and is not deleted.
        what: Description of the locked resource, as the beginning of a message.
        elsewhere: Alternative to waiting, as the end of a message.
        patience: Seconds to wait for another process of the same SLURM job: a requeued job may
            start while its previous process still ends.
    """
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _acquire(lock, path, what, elsewhere, patience)
        path.write_text(json.dumps(_this_process()), encoding="utf-8")
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            reason = error.strerror or error
            raise UserError(f"{what}: {reason}; name one that can be written to") from error
        note(
            f"{what}: files cannot be locked there ({error.strerror}), so take "
            "care that no other job uses it"
        )
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, path: Path, what: str, elsewhere: str, patience: float) -> None:
    try:
        lock.acquire(timeout=0)
        return
    except Timeout:
        holder = _read(path)
    mine = _this_process()["slurm_job"]
    if mine and holder.get("slurm_job") == mine:
        note(f"waiting up to {patience:g} s for {_described(holder)} to leave {what}")
        try:
            lock.acquire(timeout=patience)
            return
        except Timeout:
            pass
    raise UserError(
        f"{what} is in use by {_described(holder)}; wait for it or end it, or {elsewhere}"
    )


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    }


def _read(path: Path) -> dict[str, Any]:
    """Return the holder of the lock; an empty dict until it has been written."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _described(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    job = f", SLURM job {holder['slurm_job']}" if holder["slurm_job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}"
