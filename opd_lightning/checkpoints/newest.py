"""Which checkpoint is meant: one that a user named, or the newest whole one of a run.

All processes of a run must ask, and get the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from opd_lightning.checkpoints.reading import DamagedError, Saved, check_sums, look, refusal
from opd_lightning.errors import CheckpointError, UserError, note, raised_by_all
from opd_lightning.processes import broadcast, gather, rank, world_size

LAST = "last"  # the newest whole checkpoint of the run


def keepers(trainer: Trainer) -> Iterator[ModelCheckpoint]:
    """The callbacks that write a run's checkpoints."""
    return (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))


def settle_folders(trainer: Trainer) -> None:
    """Have the callbacks look where the run writes, also when its logger is gone later."""
    for keeper in keepers(trainer):
        keeper.dirpath = keeper.dirpath or str(Path(trainer.log_dir or ".", "checkpoints"))


def folders(trainer: Trainer) -> list[Path]:
    """Where checkpoints of the run are, once that is settled."""
    places = (Path(keeper.dirpath or ".") for keeper in keepers(trainer))
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def named(path: Path) -> Saved:
    """The checkpoint that a user named.

    Raises:
        UserError: It is damaged, or none.
        CheckpointError: The disk does not answer.
    """
    try:
        return _checked(broadcast(lambda: _look(path)))
    except DamagedError as error:
        raise raised_by_all(refusal(path, error)) from error


def newest(trainer: Trainer) -> Saved | None:
    """The newest whole checkpoint: of the most steps, the latest of those.

    Raises:
        UserError: The run has no folder for them.
        CheckpointError: The disk does not answer.
    """
    for saved in broadcast(lambda: _candidates(trainer)):
        try:
            return _checked(saved)
        except DamagedError as error:
            say(f"{str(saved.path)!r} is passed over: {error}")
    return None


def needed(trainer: Trainer) -> Saved:
    """`newest`, for whoever cannot do without.

    Raises:
        UserError: There is none, or no folder for one.
        CheckpointError: The disk does not answer.
    """
    saved = newest(trainer)
    if saved is None:
        places = ", ".join(repr(str(keeper.dirpath)) for keeper in keepers(trainer))
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


def say(message: str) -> None:
    if rank() == 0:
        note(message)


def _candidates(trainer: Trainer) -> list[Saved]:
    """What may be a checkpoint, newest first; what cannot be one is named."""
    if not list(keepers(trainer)):
        raise UserError(
            f"--ckpt_path: got {LAST!r} in a run without a ModelCheckpoint, which has no folder "
            "to look in; name a file"
        )
    found: dict[Path, Saved] = {}
    for folder in folders(trainer):
        for path in sorted(folder.glob(f"*{ModelCheckpoint.FILE_EXTENSION}")):
            try:
                found.setdefault(path.resolve(), _look(path))
            except DamagedError as error:
                say(f"{str(path)!r} is passed over: {error}")
    return sorted(found.values(), key=lambda s: (s.step, s.time), reverse=True)


def _checked(saved: Saved) -> Saved:
    """The same, if every process finds its part of it whole."""
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


def _look(path: Path) -> Saved:
    try:
        return look(path)
    except OSError as error:
        raise unreadable(error) from error
