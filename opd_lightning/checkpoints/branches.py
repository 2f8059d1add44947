"""Resuming from an earlier checkpoint: the run leaves the steps that it made after it.

`last` means the most steps. So that it does not return to the branch that was left, checkpoints of
that branch are moved to another folder when the run begins, and a requeued job, which gets the same
command again, resumes from what it has saved since.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from opd_lightning.checkpoints.newest import folders, newest, unreadable
from opd_lightning.checkpoints.reading import DamagedError, Saved, describe
from opd_lightning.processes import broadcast, rank_zero_note

LEFT = "left"  # prefix of folders with the checkpoints of a branch that was left


def saved_since(trainer: Trainer, named: Saved) -> Saved | None:
    """Return the newest complete checkpoint of this SLURM job, if it was requeued. Collective.

    Args:
        trainer: The trainer of the run.
        named: Checkpoint that the job's command names.

    Raises:
        CheckpointError: If the disk cannot be read.
    """
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
        return None
    saved = newest(trainer, resumes=True, job=os.environ.get("SLURM_JOB_ID"))
    if saved is not None:
        rank_zero_note(
            f"--ckpt_path: this job began with {str(named.path)!r}, was requeued, and resumes "
            f"from what it has saved since: {str(saved.path)!r}"
        )
    return saved


def leave_branch(trainer: Trainer, named: Saved) -> None:
    """Move checkpoints that do not lead to the resumed run out of its folders. Collective.

    These are the ones of more steps than `named`, and all of them if it is in another folder.

    Raises:
        CheckpointError: If they cannot be read or moved.
    """
    broadcast(lambda: _move_later(trainer, named))


def _move_later(trainer: Trainer, named: Saved) -> None:
    places = folders(trainer)
    is_own = named.path.parent.resolve() in [place.resolve() for place in places]
    try:
        for place in places:
            paths = sorted(place.glob(f"*{ModelCheckpoint.FILE_EXTENSION}"))
            left = [path for path in paths if not is_own or _step(path) > named.step]
            if left:
                free = (place / f"{LEFT}-{n}" for n in count(1))
                _move(left, next(to for to in free if not to.exists()))
    except OSError as error:
        raise unreadable(error) from error


def _move(paths: list[Path], to: Path) -> None:
    to.mkdir()
    for path in paths:
        path.rename(to / path.name)
    rank_zero_note(
        f"--ckpt_path: the run resumes from another checkpoint than the newest, so {len(paths)} of "
        f"the branch that it leaves are moved to {str(to)!r}; to return to it, name one of them"
    )


def _step(path: Path) -> int:
    try:
        return describe(path).step
    except DamagedError:
        return -1  # never chosen, so it may stay
