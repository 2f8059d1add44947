"""A run's log across restarts, without missing or duplicate steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor

from opd_lightning.checkpoints import restoring
from opd_lightning.errors import note
from opd_lightning.metrics.log import write_validation
from opd_lightning.metrics.media import run_folder_of
from opd_lightning.run.csv_log import put_back
from opd_lightning.run.dashboard import write_dashboard
from opd_lightning.run.settings import differences
from opd_lightning.run.starts import note_start
from opd_lightning.run.trackers import log_settings, tracked_runs
from opd_lightning.training.callback import RunCallback

if TYPE_CHECKING:
    from opd_lightning.evaluation.module import EvaluatedModule
    from opd_lightning.training.base import DistillationModule


class RunLog(RunCallback):
    """Callback that keeps loggers and checkpoints consistent.

    Everything logged for steps before n is on disk before the checkpoint of step n is. If an
    earlier process ended after step n, a run resumed from n marks its entries for n and later as
    void, with the event that TensorBoard defines for this; a CSV file loses them. Scores and tables
    of a validation at n are not computed again, since the checkpoint contains them.

    The checkpoint also keeps the monitored values (`trainer.callback_metrics`). If a validation
    of the last step was interrupted, starting the finished run again runs it.

    The checkpoint keeps the run's settings, and a resumed run reports those that differ.

    Every start is recorded in the run folder. The first one, and any that begins at step 0 again,
    writes the TensorBoard dashboard; resumed runs find it there.
    """

    def __init__(self) -> None:
        self.settings: Mapping[str, float | str] = {}  # flat settings of the run
        self._resumed: dict[str, Any] = {}
        self._began = False

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed = checkpoint.get("log", {})
        before = self._resumed.get("settings", {})
        reports = trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero
        if reports and before and self.settings:
            for line in differences(before, self.settings):
                note(line)

    def on_train_start(  # type: ignore[override]
        self, trainer: Trainer, pl_module: DistillationModule
    ) -> None:
        self._began = True
        self._resume(trainer, pl_module)
        folder = run_folder_of(trainer)
        if folder is not None and trainer.is_global_zero:
            self._note_start(trainer, pl_module, folder)

    def _note_start(self, trainer: Trainer, module: DistillationModule, run: Path) -> None:
        seeds = {
            "seed_everything": int(os.environ.get("PL_GLOBAL_SEED", 0)),
            "data": trainer.datamodule.seed,  # type: ignore[attr-defined]
        }
        first = note_start(
            run,
            step=trainer.global_step,
            checkpoint=None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            seeds=seeds,
            processes=trainer.world_size,
            trackers=tracked_runs(trainer),
        )
        if first or trainer.global_step == 0:
            write_dashboard(trainer, module, self.settings)
            log_settings(trainer, self.settings)

    def _resume(self, trainer: Trainer, pl_module: EvaluatedModule) -> None:
        if trainer.is_global_zero:
            _void_from(trainer, trainer.global_step)
            put_back(trainer, trainer.global_step)
        with restoring("the log"):
            monitored = self._resumed.get("monitored", {})
            device = trainer.strategy.root_device
            trainer.callback_metrics.update(
                {name: Tensor([value]).squeeze().to(device) for name, value in monitored.items()}
            )
            pl_module.scores = self._resumed.get("validation", {})
            pl_module.tables = self._resumed.get("tables", {})
            pl_module.validation_is_over = bool(pl_module.scores)
            write_validation(trainer, pl_module.scores, pl_module.tables)
        self._resumed = {}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["log"] = {
            "monitored": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "validation": pl_module.scores if pl_module.validation_is_over else {},
            "tables": pl_module.tables if pl_module.validation_is_over else {},
            "settings": dict(self.settings),
        }
        for logger in trainer.loggers:
            logger.save()

    def on_fit_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: EvaluatedModule
    ) -> None:
        """Run an interrupted last validation; Lightning skips its loop if all steps are made."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        if self._began or trainer.state.fn != TrainerFn.FITTING:
            return
        loop.update_restart_stage()
        if loop.restarted_mid_evaluation:
            self._resume(trainer, pl_module)
            trainer.validating = True
            loop.run()
            trainer.training = True


def _void_from(trainer: Trainer, step: int) -> None:
    """Mark what earlier processes logged for `step` and later as void in TensorBoard.

    Done only if such files exist: TensorBoard orders files by the timestamps in their names, so
    after a clock change a new file may come first. The event is written twice, because
    TensorBoard does not treat the first START as a restart.
    """
    start = Event(session_log=SessionLog(status=SessionLog.START))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            writer = logger.experiment.file_writer  # its event file exists by now
            if len(list(Path(logger.log_dir).glob("events.out.tfevents.*"))) > 1:
                writer.add_event(start, step)
                writer.add_event(start, step)
