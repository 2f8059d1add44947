"""Resolution of a checkpoint: the one that a user named, or the newest complete one of a run.

All processes of a run must call these functions, and get the same result.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from opd_lightning.checkpoints.reading import DamagedError, Saved, check_sums, describe, refusal
from opd_lightning.errors import CheckpointError, UserError, raised_by_all
from opd_lightning.processes import broadcast, gather, rank, rank_zero_note, world_size

# Errors of a path rather than of the disk.
_MISTAKES = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM}
LAST = "last"  # value of --ckpt_path for the newest complete checkpoint of the run


def model_checkpoints(trainer: Trainer) -> Iterator[ModelCheckpoint]:
    """Return the callbacks that write a run's checkpoints."""
    return (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))


def settle_folders(trainer: Trainer) -> None:
    """Fix the callbacks' folders, which would otherwise depend on the logger."""
    for saver in model_checkpoints(trainer):
        saver.dirpath = saver.dirpath or str(Path(trainer.log_dir or ".", "checkpoints"))


def check_found_again(run: Path, former: Path | None = None, kept: Sequence[Path] = ()) -> None:
    """Raise UserError if a restart looks in another folder than the run wrote to.

    Args:
        run: The run folder. A logger that numbers its versions gives every start another one.
        former: Folder that it would have without `trainer.default_root_dir`.
        kept: Folders in which the restart looks for checkpoints.
    """
    if any(_has_checkpoints(folder) for folder in kept):
        return
    if former is not None and former != run and _has_checkpoints(former / "checkpoints"):
        raise UserError(
            f"--ckpt_path: got {LAST!r}, but trainer.default_root_dir makes {str(run)!r} the run "
            f"folder, and the checkpoints are in {str(former)!r}; leave it out, or name a file"
        )
    number = re.fullmatch(r"version_(\d+)", run.name)
    if number is None or run.exists():
        return
    earlier = run.with_name(f"version_{int(number[1]) - 1}")
    if _has_checkpoints(earlier / "checkpoints"):
        raise UserError(
            f"--ckpt_path: got {LAST!r}, but the logger names a new folder at every start "
            f"({str(run)!r} now), and the checkpoints are in {str(earlier)!r}; set the logger's "
            "name and version to '', or trainer.default_root_dir, or name a file"
        )


def _has_checkpoints(folder: Path) -> bool:
    return any(folder.glob(f"*{ModelCheckpoint.FILE_EXTENSION}"))


def folders(trainer: Trainer) -> list[Path]:
    """Return the existing folders of the run's checkpoints, after `settle_folders`."""
    places = (Path(saver.dirpath or ".") for saver in model_checkpoints(trainer))
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def named(path: Path) -> Saved:
    """Read and verify the checkpoint that a user named.

    Raises:
        UserError: If it is damaged or not a checkpoint.
        CheckpointError: If the disk cannot be read.
    """
    try:
        return _checked(broadcast(lambda: _named(path)))
    except DamagedError as error:
        raise raised_by_all(refusal(path, error)) from error


def newest(trainer: Trainer, *, resumes: bool = False, job: str | None = None) -> Saved | None:
    """Return the newest complete checkpoint: most steps first, then latest; None if none.

    Args:
        trainer: The trainer of the run.
        resumes: Whether the run resumes from it. Weights alone then come after all others.
        job: SLURM job that must have written it; None for any.

    Raises:
        UserError: If the run has no checkpoint folder.
        CheckpointError: If the disk cannot be read.
    """
    found = broadcast(lambda: _candidates(trainer))
    if resumes:  # sorting keeps the order otherwise
        found.sort(key=lambda saved: not saved.resumable)
    for saved in found:
        if job is not None and saved.written_by.get("job") != job:
            continue
        try:
            return _checked(saved)
        except DamagedError as error:
            rank_zero_note(f"{str(saved.path)!r} is passed over: {error}")
    return None


def needed(trainer: Trainer) -> Saved:
    """Return `newest`, which must exist.

    Raises:
        UserError: If there is none, or no folder for one.
        CheckpointError: If the disk cannot be read.
    """
    saved = newest(trainer)
    if saved is None:
        places = ", ".join(repr(str(saver.dirpath)) for saver in model_checkpoints(trainer))
        raise raised_by_all(
            UserError(
                f"--ckpt_path: got {LAST!r}, but no whole checkpoint is in {places}; give the "
                "config.yaml of a run that has saved one, or name a file"
            )
        )
    return saved


def unreadable(error: OSError) -> CheckpointError:
    place = f"{error.filename!r}: " if error.filename else ""
    return CheckpointError(
        f"checkpoints: could not read {place}{error.strerror or error}; start again when the disk "
        "answers"
    )


def _candidates(trainer: Trainer) -> list[Saved]:
    """List possible checkpoints, newest first; print a note for each damaged one."""
    if not list(model_checkpoints(trainer)):
        raise UserError(
            f"--ckpt_path: got {LAST!r} in a run without a ModelCheckpoint, which has no folder "
            "to look in; name a file"
        )
    found: dict[Path, Saved] = {}
    for folder in folders(trainer):
        for path in sorted(folder.glob(f"*{ModelCheckpoint.FILE_EXTENSION}")):
            try:
                # Unlike `Path.resolve`, this accepts a circle of links, whose reading fails below.
                found.setdefault(Path(os.path.realpath(path)), _describe(path))
            except DamagedError as error:
                rank_zero_note(f"{str(path)!r} is passed over: {error}")
    return sorted(found.values(), key=lambda s: (s.step, s.time), reverse=True)


def _checked(saved: Saved) -> Saved:
    """Return `saved` if every process finds its part undamaged; else raise on all."""
    damage = None
    try:
        check_sums(saved, rank(), world_size())
    except (DamagedError, OSError) as error:
        damage = error
    for one in gather(damage):
        if isinstance(one, OSError):
            raise raised_by_all(unreadable(one))
        if one is not None:
            raise one
    return saved


def _named(path: Path) -> Saved:
    try:
        return describe(path)
    except OSError as error:
        if error.errno not in _MISTAKES:
            raise unreadable(error) from error
        raise UserError(
            f"ckpt_path: cannot read {str(path)!r}: {error.strerror}; name a checkpoint, or "
            f"{LAST} for the newest of the run"
        ) from error


def _describe(path: Path) -> Saved:
    try:
        return describe(path)
    except OSError as error:
        raise unreadable(error) from error
