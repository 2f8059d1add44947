"""Lightning's Trainer with run logs, checkpoints on interruption and evaluation reports."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console

from opd_lightning.checkpoints import LAST, CheckpointConnector, settle_folders, write
from opd_lightning.checkpoints.newest import check_found_again, model_checkpoints
from opd_lightning.checkpoints.savers import RememberSavers
from opd_lightning.checkpoints.states import CheckStates
from opd_lightning.checkpoints.writing import check_place
from opd_lightning.commands.trainer_commands import Commands
from opd_lightning.data.prompt_files import PromptFiles
from opd_lightning.errors import UserError
from opd_lightning.evaluation import report
from opd_lightning.models.sharding import check_strategy
from opd_lightning.models.strict_json import dumps
from opd_lightning.run import outputs, signals
from opd_lightning.run.csv_log import set_aside, take_back
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.run.interruption import SaveOnInterruption, TermAsInterrupt
from opd_lightning.run.lock import FOLDER_SETTINGS, held
from opd_lightning.run.log import RunLog
from opd_lightning.run.monitors import WarnOfDeferredSaves, absent_monitors_explained
from opd_lightning.run.step_progress import FirstLine, StepProgressBar
from opd_lightning.run.trackers import continue_tracked_run
from opd_lightning.terminal.quiet import only_warnings
from opd_lightning.training.base import DistillationModule
from opd_lightning.training.callback import RunCallback, run_callbacks

# Files that a run writes to its folder, in addition to TensorBoard's.
RUN_FILES = (
    *("config.yaml", ".prompts.json", "starts.jsonl", "rollouts.jsonl"),
    *("hparams.yaml", "metrics.csv"),  # written by Lightning's loggers
)


class Trainer(Commands):
    """Lightning's Trainer; see its documentation for the arguments.

    Adds commands, a progress bar in optimiser steps, a continuous log of resumed runs, scores as a
    table or JSON, and a checkpoint when a run is interrupted. The run folder is `default_root_dir`
    where that is given, whatever the loggers are; else the folder of the first logger.
    """

    run_folder: Path | None = None  # during `fit`; None if the run keeps no files
    saving: str | None = None  # the checkpoint that is, or was last, written
    continues = False  # whether `fit` continues the run of its folder, that is, with last

    def __init__(
        self,
        *args: Any,
        # Whole numbers first: the parser takes 1, which is one batch, for 1.0, which is all, with
        # Lightning's own types, whose order depends on what is imported before.
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs["limit_train_batches"] = limit_train_batches
        kwargs["limit_val_batches"] = limit_val_batches
        kwargs["limit_test_batches"] = limit_test_batches
        for name in ("val_check_interval", "max_time"):
            _check_time(name, kwargs.get(name))
        given = kwargs.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        ours: list[Callback] = [RememberSavers(), CheckStates(), WarnOfDeferredSaves()]
        ours.append(SaveOnInterruption())
        has_bar = any(isinstance(callback, ProgressBar) for callback in given)
        if kwargs.get("enable_progress_bar") is not False and not has_bar:
            ours += [FirstLine(), StepProgressBar()]
        # `sorted` is stable: callbacks keep their order otherwise.
        given = sorted(given, key=lambda c: isinstance(c, RunCallback) and c.runs_last)
        self.run_log = RunLog()  # first, before other callbacks log
        kwargs["callbacks"] = [self.run_log, *given, *ours]
        super().__init__(*args, **kwargs)  # exactly this call: jsonargparse reads it
        self._folder_is_given = kwargs.get("default_root_dir") is not None
        self._checkpoint_connector = CheckpointConnector(self)
        check_strategy(self.strategy, self.num_devices, self.num_nodes)
        self._signal_connector = TermAsInterrupt(self)
        if not any(callback.handles_signals for callback in run_callbacks(self)):
            signals.restore()

    @property
    def log_dir(self) -> str | None:
        """The run folder. Collective."""
        return self.default_root_dir if self._folder_is_given else self._folder_of_logger()

    def _folder_of_logger(self) -> str:
        """Return the first logger's folder; a tracker elsewhere may have none. Collective."""
        return super().log_dir or self.default_root_dir

    @property
    def keeps_files(self) -> bool:
        """Return whether the run has a folder: one is given, or there is a logger."""
        return self._folder_is_given or self.logger is not None

    def save_checkpoint(
        self,
        filepath: str | Path,
        weights_only: bool | None = None,
        storage_options: Any | None = None,
    ) -> None:
        """Write a checkpoint atomically. Collective."""
        if storage_options is not None:
            raise UserError("save_checkpoint: got storage_options, expected none; disks take none")
        if self.model is None:
            super().save_checkpoint(filepath, weights_only)  # raises Lightning's error
        profiled = self.profiler.profile("save_checkpoint")  # type: ignore[attr-defined]
        self.saving = str(filepath)
        with signals.finishing(), profiled:
            write(self, self._checkpoint_connector.dump_checkpoint(weights_only), filepath)

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Train in a locked run folder, on the prompts that the run began with.

        Args:
            model: The method, with the student.
            train_dataloaders: Not needed; the datamodule has them.
            val_dataloaders: Not needed; the datamodule has them.
            datamodule: Data module with the prompts and the engine.
            ckpt_path: Checkpoint to resume from: a path, or last, the newest whole checkpoint of
                the run folder; if there is none, last starts from the beginning.
            weights_only: Not needed; only tensors and plain data are ever read.
        """
        folder = self.run_folder = Path(str(self.log_dir)) if self.keeps_files else None
        self.continues = ckpt_path == LAST
        self._check_folders(folder)
        if isinstance(datamodule, RolloutDataModule):
            datamodule.prompt_files = PromptFiles(folder, resumes=bool(ckpt_path))
        with held(folder) if folder is not None and self.is_global_zero else nullcontext():
            if self.is_global_zero:
                set_aside(self)
                if folder is not None and ckpt_path:
                    continue_tracked_run(self, folder)
            try:
                with absent_monitors_explained(self):
                    super().fit(
                        model,
                        train_dataloaders,
                        val_dataloaders,
                        datamodule,
                        ckpt_path,
                        weights_only,
                    )
            finally:
                if self.is_global_zero:
                    take_back(self)

    def _check_folders(self, folder: Path | None) -> None:
        """Raise UserError if the run folder, or a checkpoint's, cannot be written or continued."""
        if folder is not None:
            outputs.check_run_files(folder, RUN_FILES)
            option = "trainer.default_root_dir" if self._folder_is_given else FOLDER_SETTINGS
            outputs.check_folder(option, folder)
        settle_folders(self)  # Lightning's name for one may be another at every start
        saved_in = [str(saver.dirpath) for saver in model_checkpoints(self)]
        for place in saved_in:
            check_place(place)
            outputs.check_folder("ModelCheckpoint.dirpath", Path(place))
        if self.continues and folder is not None:
            check_found_again(folder, Path(self._folder_of_logger()), [*map(Path, saved_in)])

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
        json: bool = False,
        out: str | None = None,
    ) -> list[Mapping[str, float]]:
        """Evaluate a checkpoint or a Hugging Face folder on data.validation, texts and tasks.

        Args:
            model: The method, with the student.
            dataloaders: Not needed; the datamodule has them.
            ckpt_path: Checkpoint of the run whose config is given, or last, its newest whole
                one; without it the student is the Hugging Face folder that the config names.
            verbose: Print the scores.
            datamodule: Data module with the suites and the engine.
            weights_only: Not needed; only tensors and plain data are ever read.
            json: Print the scores as one JSON object instead of a table.
            out: File to write that JSON object to.
        """
        with self._reported("validate", verbose, json, out):
            return super().validate(model, dataloaders, ckpt_path, False, datamodule, weights_only)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
        json: bool = False,
        out: str | None = None,
    ) -> list[Mapping[str, float]]:
        """Evaluate a checkpoint or a Hugging Face folder on data.test, texts and tasks.

        Args:
            model: The method, with the student.
            dataloaders: Not needed; the datamodule has them.
            ckpt_path: Checkpoint of the run whose config is given, or last, its newest whole
                one; without it the student is the Hugging Face folder that the config names.
            verbose: Print the scores.
            datamodule: Data module with the suites and the engine.
            weights_only: Not needed; only tensors and plain data are ever read.
            json: Print the scores as one JSON object instead of a table.
            out: File to write that JSON object to.
        """
        with self._reported("test", verbose, json, out):
            return super().test(model, dataloaders, ckpt_path, False, datamodule, weights_only)

    @contextmanager
    def _reported(self, stage: str, verbose: bool, json: bool, out: str | None) -> Iterator[None]:
        """Print and write the scores that are measured inside the context."""
        file = None if out is None else Path(os.path.expanduser(out))
        if file is not None:
            outputs.check_file("--out", file)
        if json:
            only_warnings()
        # Libraries may print to stdout.
        with redirect_stdout(sys.stderr) if json else nullcontext():
            yield
        if not self.is_global_zero:
            return
        module = cast(DistillationModule, self.lightning_module)
        saved = cast(CheckpointConnector, self._checkpoint_connector).saved
        data: RolloutDataModule = self.datamodule
        suites = data.suites_of(stage)
        found = report.measured(module, suites, data.loaded, data.bench, stage, saved)
        if json:
            print(dumps(found))
        elif verbose:
            report.as_table(found, suites, Console())
        if file is not None:  # last, for it may fail
            outputs.write_text("--out", file, dumps(found) + "\n")


def _check_time(name: str, value: object) -> None:
    """Raise UserError if an option is a time by its parts with other parts than a time has."""
    if isinstance(value, Mapping):
        try:
            timedelta(**value)
        except (TypeError, OverflowError) as error:
            raise UserError(
                f"trainer.{name}: got {dict(value)}, expected numbers of days, hours, minutes or "
                "seconds"
            ) from error
