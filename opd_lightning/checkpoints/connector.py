"""From which checkpoint a run goes on: the same on all processes, and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning.checkpoints.matching import (
    author,
    check_optimizers,
    check_readable,
    differences,
)
from opd_lightning.checkpoints.newest import (
    LAST,
    folders,
    keepers,
    named,
    needed,
    newest,
    say,
    unreadable,
)
from opd_lightning.checkpoints.places import recover
from opd_lightning.checkpoints.reading import Saved
from opd_lightning.checkpoints.savers import drop_foreign_paths
from opd_lightning.errors import UserError
from opd_lightning.processes import broadcast


class CheckpointConnector(_CheckpointConnector):
    """Lightning's, with our own answers to which checkpoint is read and how.

    Processes know one another by the time Lightning reads, and not when it asks for a path. So
    `last` stays a word until then.
    """

    saved: Saved | None = None  # what was read last
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
        self.saved, self._owned = None, checkpoint_path == LAST
        if training:
            broadcast(self._mend)
        if checkpoint_path is not None:
            self.saved = self._last(training) if self._owned else named(Path(checkpoint_path))
        saved = self.saved
        if saved is not None:
            broadcast(lambda: check_readable(saved, self.trainer, training=training))
            if training:
                if self.trainer.optimizers:
                    check_optimizers(saved, self.trainer.optimizers)
                for line in differences(saved, self.trainer):
                    say(line)
        super().resume_start(saved.path if saved else None, weights_only=True)

    def restore_callbacks(self) -> None:
        super().restore_callbacks()
        if self._loaded_checkpoint:
            for keeper in keepers(self.trainer):
                if foreign := drop_foreign_paths(keeper):
                    say(
                        f"the checkpoint names {foreign[0]!r} as a file of this run, but it is "
                        f"outside of {str(keeper.dirpath)!r}; left alone, and no longer counted"
                    )
                if keeper.save_last:  # or a run would go on with a last-v1
                    name = keeper.CHECKPOINT_NAME_LAST + keeper.FILE_EXTENSION
                    keeper.last_model_path = keeper.last_model_path or str(
                        Path(keeper.dirpath or "", name)
                    )

    def restore_optimizers(self) -> None:
        if self.saved is not None:
            check_optimizers(self.saved, self.trainer.optimizers)
        super().restore_optimizers()

    def resume_end(self) -> None:
        super().resume_end()
        if self._owned:
            self._ckpt_path = None  # else ModelCheckpoint would never remove it

    def _last(self, training: bool) -> Saved | None:
        """Only a run that trains may start without one."""
        saved = newest(self.trainer) if training else needed(self.trainer)
        if saved is None:
            say("no whole checkpoint is there yet, so the run starts from the beginning")
        return saved

    def _mend(self) -> None:
        try:
            for folder in folders(self.trainer):
                recover(folder)
        except OSError as error:
            raise unreadable(error) from error
