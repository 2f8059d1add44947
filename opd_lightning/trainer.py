"""Lightning's Trainer with this program's own commands; each method here is an `opd` subcommand."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console

from opd_lightning import preflight
from opd_lightning.data.datamodule import RolloutDataModule
from opd_lightning.errors import NotReadyError, UserError
from opd_lightning.export import load_student, write_hf_folder
from opd_lightning.methods.base import DistillationModule
from opd_lightning.preflight import report
from opd_lightning.preflight.check import look_at
from opd_lightning.progress import StepProgressBar
from opd_lightning.quiet import only_warnings


class Trainer(LightningTrainer):
    """Lightning's, with `check`, `export` and a progress bar in optimiser steps."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("enable_progress_bar") is not False:
            given = kwargs.get("callbacks") or []
            given = given if isinstance(given, list) else [given]
            if not any(isinstance(callback, ProgressBar) for callback in given):
                kwargs["callbacks"] = [*given, StepProgressBar()]
        super().__init__(*args, **kwargs)

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

        Args:
            samples: Responses that the numbers are taken of.
            compare_teachers: Load the weights of teachers elsewhere too, and compare log-probs.
            json: Print one JSON object instead of a table.
        """
        if samples < 1:
            raise UserError(f"--samples: got {samples}, expected at least 1")
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
