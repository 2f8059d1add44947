"""Lightning's Trainer with this program's own commands; each method here is an `opd` subcommand."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console

from opd_lightning import preflight, signals
from opd_lightning.cache_teacher import fill
from opd_lightning.checkpoints import CheckpointConnector, write
from opd_lightning.checkpoints.savers import RememberSavers
from opd_lightning.data.datamodule import RolloutDataModule
from opd_lightning.data.prompt_files import PromptFiles
from opd_lightning.errors import NotReadyError, UserError
from opd_lightning.export import load_student, write_hf_folder
from opd_lightning.interruption import SaveOnInterruption, TermAsInterrupt
from opd_lightning.methods.base import DistillationModule
from opd_lightning.preflight import report
from opd_lightning.preflight.check import look_at
from opd_lightning.progress import StepProgressBar
from opd_lightning.quiet import only_warnings
from opd_lightning.run_lock import held
from opd_lightning.run_log import RunLog
from opd_lightning.sharding import check_strategy
from opd_lightning.teachers.cached import CachedTeacher
from opd_lightning.types import Author
from opd_lightning.write_responses import write_responses


class Trainer(LightningTrainer):
    """See Lightning's documentation.

    Added are our own commands, a progress bar in optimiser steps, a log without seams, and a
    checkpoint when a run is cut short.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        ours: list[Callback] = [RememberSavers(), SaveOnInterruption()]
        has_bar = any(isinstance(callback, ProgressBar) for callback in given)
        if kwargs.get("enable_progress_bar") is not False and not has_bar:
            ours.append(StepProgressBar())
        # Stable: who saves whole steps comes after those that have a part in them.
        given = sorted(given, key=lambda callback: getattr(callback, "comes_last", False))
        kwargs["callbacks"] = [RunLog(), *given, *ours]  # its log begins before others' figures
        super().__init__(*args, **kwargs)  # to the letter: the parser reads it
        self._checkpoint_connector = CheckpointConnector(self)
        check_strategy(self.strategy, self.num_devices, self.num_nodes)
        self._signal_connector = TermAsInterrupt(self)
        if not any(getattr(callback, "heeds_signals", False) for callback in given):
            signals.hand_back()

    def save_checkpoint(
        self,
        filepath: str | Path,
        weights_only: bool | None = None,
        storage_options: Any | None = None,
    ) -> None:
        """Write a checkpoint, whole or not at all; all processes must call it."""
        if storage_options is not None:
            raise UserError("save_checkpoint: got storage_options, expected none; disks take none")
        if self.model is None:
            super().save_checkpoint(filepath, weights_only)  # says what is wrong
        with self.profiler.profile("save_checkpoint"):  # type: ignore[attr-defined]
            write(self, self._checkpoint_connector.dump_checkpoint(weights_only), filepath)

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Train, alone in the run folder, on the prompts that the run began with."""
        folder = None if self.logger is None else Path(self.log_dir or ".")
        data = kwargs.get("datamodule")
        if isinstance(data, RolloutDataModule):
            data.prompt_files = PromptFiles(folder, resumes=bool(kwargs.get("ckpt_path")))
        with held(folder) if folder is not None and self.is_global_zero else nullcontext():
            super().fit(*args, **kwargs)

    def export(
        self,
        model: DistillationModule,
        ckpt_path: str,
        out: str,
        datamodule: LightningDataModule | None = None,
    ) -> None:
        """Write a checkpoint's student as a Hugging Face folder.

        Args:
            ckpt_path: Checkpoint of the run whose config is given.
            out: Folder to write; must not exist or be empty.
            datamodule: Not needed; every command is handed one.
        """
        folder = Path(out)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--out: {out!r} is not empty; name a new folder")
        preflight.check_usable(model.student.source)
        step = load_student(model.student, ckpt_path)
        write_hf_folder(model.student, folder)
        print(f"wrote the student of step {step} to {folder}")

    def check(
        self,
        model: DistillationModule,
        datamodule: RolloutDataModule,
        samples: int = 16,
        compare_teachers: bool = True,
        json: bool = False,
    ) -> None:
        """Look at a run before it is started: settings, tokens, numbers, cost. Writes nothing.

        In one process, with student and teachers whole on its device.

        Args:
            samples: Responses that the numbers are taken of.
            compare_teachers: Load the weights of teachers elsewhere too, and compare log-probs.
            json: Print one JSON object instead of a table.
        """
        if samples < 1:
            raise UserError(f"--samples: got {samples}, expected at least 1")
        if not self.is_global_zero:
            return
        only_warnings()
        self.strategy.connect(model)
        self.datamodule = datamodule
        model.trainer = datamodule.trainer = self
        try:
            with redirect_stdout(sys.stderr):  # libraries print what they like
                findings = look_at(
                    self, model, datamodule, samples=samples, compare_teachers=compare_teachers
                )
        finally:
            datamodule.teardown("fit")
            model.teardown("fit")
        if json:
            print(report.as_json(findings))
        else:
            report.as_table(findings, Console())
        if any(finding.level == "error" for finding in findings):
            raise NotReadyError(report.verdict(findings))

    def cache_teacher(
        self,
        model: DistillationModule,
        batch_tokens: int = 16384,
        datamodule: RolloutDataModule | None = None,
    ) -> None:
        """Ask the teachers behind a run's CachedTeachers about its recorded responses.

        Run it again to go on where it stopped. One process, on the trainer's first device.

        Args:
            batch_tokens: Most tokens of a batch, prompts and padding included.
            datamodule: Holds the responses.
        """
        parts = [part for teacher in model.teachers() for part in teacher.parts()]
        cached = [part for part in parts if isinstance(part, CachedTeacher)]
        if not cached:
            raise UserError(
                "model: it asks no CachedTeacher, so there is nothing to cache; put one around the "
                "teacher"
            )
        assert datamodule is not None
        for teacher in cached:
            teacher.note_unknown()
        self.strategy.connect(model)
        model.trainer = datamodule.trainer = self
        datamodule.setup("fit")
        for teacher in cached:
            fill(
                teacher,
                student=model.student,
                device=self.strategy.root_device,
                batch_tokens=batch_tokens,
            )

    def write_responses(
        self,
        model: DistillationModule,
        out: str,
        author: Literal["student", "teacher"] = "student",
        samples: int = 1,
        batch_size: int = 256,
        ckpt_path: str | None = None,
        datamodule: RolloutDataModule | None = None,
    ) -> None:
        """Write responses to the prompts of data.train, as a prompt file of recorded responses.

        Run it again to go on where it stopped.

        Args:
            out: File to write, JSON lines.
            author: The student with data.engine, or the teacher of data.teacher.
            samples: Responses per prompt.
            batch_size: Prompts per call of the engine.
            ckpt_path: Checkpoint of the student; without one it writes as it starts.
            datamodule: Holds the prompts, the engines and the sampling.
        """
        assert datamodule is not None
        write_responses(
            model,
            datamodule,
            Path(out),
            kind=Author(author),
            samples=samples,
            batch_size=batch_size,
            ckpt_path=ckpt_path,
        )
