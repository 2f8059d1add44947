"""Lightning's Trainer with this program's own commands; each method here is an `opd` subcommand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import ProgressBar

from opd_lightning import preflight
from opd_lightning.errors import UserError
from opd_lightning.export import load_student, write_hf_folder
from opd_lightning.methods.base import DistillationModule
from opd_lightning.progress import StepProgressBar


class Trainer(LightningTrainer):
    """See Lightning's documentation; `export` and a progress bar in optimiser steps are added."""

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
