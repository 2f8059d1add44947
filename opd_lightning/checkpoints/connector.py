"""Choice of the checkpoint that a run resumes from: verified, the same on all processes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning.checkpoints.branches import leave_branch, saved_since
from opd_lightning.checkpoints.matching import (
    check_kinds,
    check_readable,
    check_shapes,
    check_types,
    differences,
    provenance,
)
from opd_lightning.checkpoints.newest import (
    LAST,
    folders,
    model_checkpoints,
    named,
    needed,
    newest,
    unreadable,
)
from opd_lightning.checkpoints.reading import Saved, restoring
from opd_lightning.checkpoints.savers import drop_foreign_paths, drop_models, missing_models
from opd_lightning.checkpoints.staging import recover
from opd_lightning.errors import UserError, reason_of
from opd_lightning.processes import broadcast, rank_zero_note

# Settings of torch's optimisers that choose an implementation; they may not fit this device.
IMPLEMENTATION_OPTIONS = {"capturable", "differentiable", "foreach", "fused"}


class CheckpointConnector(_CheckpointConnector):
    """Lightning's checkpoint connector with a different choice and reading of the checkpoint.

    When Lightning resolves the path, processes are not connected yet; when it reads the checkpoint,
    they are. So `last` is resolved only then.
    """

    saved: Saved | None = None  # checkpoint read last
    _owned = False  # whether it was resolved from `last`, so that the run may remove it

    def _parse_ckpt_path(
        self, state_fn: Any, ckpt_path: Any, model_provided: bool, model_connected: bool
    ) -> Any:
        # Lightning would compare modification times and prefer SLURM's files in the folder.
        if ckpt_path == LAST or (ckpt_path is None and model_provided):
            return ckpt_path
        try:
            return super()._parse_ckpt_path(state_fn, ckpt_path, model_provided, model_connected)
        except ValueError as error:  # raised for "best", "hpc" and an empty path
            raise UserError(
                f"--ckpt_path: got {str(ckpt_path)!r}: {reason_of(error)}; name a file, or give "
                "'last'"
            ) from error

    def dump_checkpoint(self, weights_only: bool | None = None) -> dict[str, Any]:
        return {**super().dump_checkpoint(weights_only), "written_by": provenance(self.trainer)}

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        """Read a checkpoint's content; for sharded models, also load it into them.

        Raises:
            UserError: If there is no checkpoint that this run can resume from.
            CheckpointError: If the disk cannot be read.
        """
        if weights_only is False:
            raise UserError("weights_only: got false, expected true: nothing else is unpickled")
        training = self.trainer.state.fn == TrainerFn.FITTING
        self.saved, self._owned = None, checkpoint_path == LAST
        if training:
            broadcast(self._recover)
        if checkpoint_path is not None:
            self.saved = self._last(training) if self._owned else self._named(checkpoint_path)
        saved = self.saved
        if saved is not None:
            broadcast(lambda: check_readable(saved, self.trainer, training=training))
            if training:
                if self.trainer.optimizers:
                    check_types(saved, self.trainer)
                for line in differences(saved, self.trainer):
                    rank_zero_note(line)
        with restoring("what is"):
            super().resume_start(saved.path if saved else None, weights_only=True)

    def restore_model(self) -> None:
        with restoring("the model"):
            super().restore_model()

    def restore_datamodule(self) -> None:
        with restoring("the place in the data"):
            super().restore_datamodule()

    def restore_training_state(self) -> None:
        with restoring("the state of the loops, the optimiser or the scheduler"):
            if self._loaded_checkpoint:
                fresh = {"fit_loop": self.trainer.fit_loop.state_dict()}
                check_kinds("loops", self._loaded_checkpoint["loops"], fresh)
            super().restore_training_state()
        if self.saved is not None and self.trainer.state.fn == TrainerFn.FITTING:
            if not self._owned:
                leave_branch(self.trainer, self.saved)
            with restoring("the state of a callback"):
                self._drop_missing_files()

    def restore_callbacks(self) -> None:
        with restoring("the state of a callback"):
            states = (self._loaded_checkpoint or {}).get("callbacks", {})
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if (state := states.get(callback.state_key)) is not None:
                    check_kinds(callback.state_key, state, callback.state_dict(), optional=True)
            super().restore_callbacks()
            self._keep_to_own_files()

    def _keep_to_own_files(self) -> None:
        """Drop paths outside of the run from what each ModelCheckpoint may remove."""
        if self._loaded_checkpoint:
            for saver in model_checkpoints(self.trainer):
                if foreign := drop_foreign_paths(saver):
                    rank_zero_note(
                        f"the checkpoint names {foreign[0]!r} as a file of this run, but it is "
                        f"outside of {str(saver.dirpath)!r}; left alone, and no longer counted"
                    )
                if saver.save_last:  # else a resumed run would write last-v1
                    name = saver.CHECKPOINT_NAME_LAST + saver.FILE_EXTENSION
                    saver.last_model_path = saver.last_model_path or str(
                        Path(saver.dirpath or "", name)
                    )

    def _drop_missing_files(self) -> None:
        """Drop files that are gone from those that each ModelCheckpoint counts among the best.

        Going back to an earlier checkpoint loses files: later steps had replaced them.
        """
        for saver in model_checkpoints(self.trainer):
            if missing := broadcast(partial(missing_models, saver)):
                drop_models(saver, missing)
                several = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                rank_zero_note(
                    f"the checkpoint counts {missing[0]!r}{several} among the best of the run, but "
                    "that is gone: its score no longer counts"
                )

    def restore_optimizers(self) -> None:
        if self.saved is not None:
            check_types(self.saved, self.trainer)
        states = (self._loaded_checkpoint or {}).get("optimizer_states", ())
        for state, optimizer in zip(states, self.trainer.optimizers, strict=False):
            groups = optimizer.state_dict()["param_groups"]
            for group, own in zip(state["param_groups"], groups, strict=False):
                group |= {
                    name: own[name] for name in IMPLEMENTATION_OPTIONS & group.keys() & own.keys()
                }
            check_kinds("optimizer", state["param_groups"], groups)
            check_shapes(state["state"], optimizer)
        super().restore_optimizers()

    def restore_lr_schedulers(self) -> None:
        states = (self._loaded_checkpoint or {}).get("lr_schedulers", ())
        for state, config in zip(states, self.trainer.lr_scheduler_configs, strict=False):
            check_kinds("lr_scheduler", state, config.scheduler.state_dict())
        super().restore_lr_schedulers()

    def resume_end(self) -> None:
        super().resume_end()
        if self._owned:
            self._ckpt_path = None  # else ModelCheckpoint would never remove it

    def _named(self, path: str | Path) -> Saved:
        """Return the named checkpoint, or what a requeued job has saved since it began there."""
        saved = named(Path(path))
        begins = self.trainer.state.fn == TrainerFn.FITTING and self.trainer.global_step == 0
        if begins and (since := saved_since(self.trainer, saved)) is not None:
            self._owned = True
            return since
        return saved

    def _last(self, training: bool) -> Saved | None:
        """Return the newest checkpoint; None only in a run that trains."""
        saved = newest(self.trainer, resumes=True) if training else needed(self.trainer)
        if saved is None:
            rank_zero_note("no whole checkpoint is there yet, so the run starts from the beginning")
        return saved

    def _recover(self) -> None:
        try:
            for folder in folders(self.trainer):
                recover(folder)
        except OSError as error:
            raise unreadable(error) from error
