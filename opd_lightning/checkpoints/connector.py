"""From which checkpoint a run goes on: the same on all processes, and whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning.checkpoints.matching import (
    author,
    check_optimizers,
    check_readable,
    differences,
)
from opd_lightning.checkpoints.places import recover
from opd_lightning.checkpoints.reading import DamagedError, Saved, check_sums, look, refusal
from opd_lightning.checkpoints.together import gather, processes, rank, tell
from opd_lightning.errors import CheckpointError, UserError, note, raised_by_all

LAST = "last"  # the newest whole checkpoint of the run


class CheckpointConnector(_CheckpointConnector):
    """Lightning's, with our own answers to which checkpoint is read and how.

    Processes know one another by the time Lightning reads, and not when it asks for a path. So
    `last` stays a word until then.
    """

    _saved: Saved | None = None
    _owned = False  # was found by the run itself, which may remove it in time

    def _parse_ckpt_path(
        self, state_fn: Any, ckpt_path: Any, model_provided: bool, model_connected: bool
    ) -> Any:
        # Lightning would go by modification times, and by what a SLURM job left in the folder.
        if ckpt_path == LAST or (ckpt_path is None and model_provided):
            return ckpt_path
        return super()._parse_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)

    def dump_checkpoint(self, weights_only: bool | None = None) -> dict[str, Any]:
        return {**super().dump_checkpoint(weights_only), "written_by": author(self.trainer)}

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        """Read a checkpoint's content; of sharded models, also put it in its place.

        Raises:
            UserError: There is none that this run can go on from.
            CheckpointError: The disk does not answer.
        """
        if weights_only is False:
            raise UserError("weights_only: got false, expected true: nothing else is unpickled")
        training = self.trainer.state.fn == TrainerFn.FITTING
        self._saved, self._owned = None, checkpoint_path == LAST
        if training:
            tell(self._mend)
        if checkpoint_path is not None:
            self._saved = self._newest() if self._owned else self._named(Path(checkpoint_path))
        saved = self._saved
        if saved is not None:
            tell(lambda: check_readable(saved, self.trainer, training=training))
            if training:
                if self.trainer.optimizers:
                    check_optimizers(saved, self.trainer.optimizers)
                for line in differences(saved, self.trainer):
                    _say(line)
        super().resume_start(saved.path if saved else None, weights_only=True)

    def restore_callbacks(self) -> None:
        super().restore_callbacks()
        if self._loaded_checkpoint:
            for keeper in self._keepers():
                if keeper.save_last:  # or a run would go on with a last-v1
                    name = keeper.CHECKPOINT_NAME_LAST + keeper.FILE_EXTENSION
                    keeper.last_model_path = keeper.last_model_path or str(
                        Path(keeper.dirpath or "", name)
                    )

    def restore_optimizers(self) -> None:
        if self._saved is not None:
            check_optimizers(self._saved, self.trainer.optimizers)
        super().restore_optimizers()

    def resume_end(self) -> None:
        super().resume_end()
        if self._owned:
            self._ckpt_path = None  # else ModelCheckpoint would never remove it
        self._saved = None

    def _keepers(self) -> Iterator[ModelCheckpoint]:
        return (c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))

    def _folders(self) -> list[Path]:
        folders = (Path(keeper.dirpath or ".") for keeper in self._keepers())
        return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]

    def _mend(self) -> None:
        try:
            for folder in self._folders():
                recover(folder)
        except OSError as error:
            raise _unreadable(error) from error

    def _named(self, path: Path) -> Saved:
        """The checkpoint that a user named."""
        try:
            return self._checked(tell(lambda: _look(path)))
        except DamagedError as error:
            raise raised_by_all(refusal(path, error)) from error

    def _newest(self) -> Saved | None:
        """The newest whole checkpoint: of the most steps, the latest of those."""
        candidates = tell(self._candidates)
        for saved in candidates:
            try:
                return self._checked(saved)
            except DamagedError as error:
                _say(f"{str(saved.path)!r} is passed over: {error}")
        _say("no whole checkpoint is there yet, so the run starts from the beginning")
        return None

    def _candidates(self) -> list[Saved]:
        """What may be a checkpoint, newest first; what cannot be one is named."""
        if not list(self._keepers()):
            raise UserError(
                "--ckpt_path: got 'last' in a run without a ModelCheckpoint, which has no folder "
                "to look in; name a file"
            )
        found: dict[Path, Saved] = {}
        for folder in self._folders():
            for path in sorted(folder.glob(f"*{ModelCheckpoint.FILE_EXTENSION}")):
                try:
                    found.setdefault(path.resolve(), _look(path))
                except DamagedError as error:
                    _say(f"{str(path)!r} is passed over: {error}")
        return sorted(found.values(), key=lambda s: (s.step, s.time), reverse=True)

    def _checked(self, saved: Saved) -> Saved:
        """The same, if every process finds its part of it whole."""
        damage = None
        try:
            check_sums(saved, rank(), processes())
        except (DamagedError, OSError) as error:
            damage = error
        for one in gather(damage):
            if isinstance(one, OSError):
                raise raised_by_all(_unreadable(one))
            if one is not None:
                raise one
        return saved


def _look(path: Path) -> Saved:
    try:
        return look(path)
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> CheckpointError:
    place = f"{error.filename!r}: " if error.filename else ""
    return CheckpointError(
        f"checkpoints: could not read {place}{error.strerror or error}; start again when the disk "
        "answers"
    )


def _say(message: str) -> None:
    if rank() == 0:
        note(message)
