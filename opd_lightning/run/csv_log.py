"""Earlier rows of a CSVLogger's file, which Lightning deletes when a run starts again."""

from __future__ import annotations

import csv
import locale
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

ASIDE = ".before"  # suffix of the file while the run starts


def set_aside(trainer: Trainer) -> None:
    """Move the CSV files of the trainer's loggers aside, before Lightning opens new ones.

    A file that is aside already is complete: an earlier start ended before `put_back`.
    """
    for logger in _csv_loggers(trainer):
        file = _file(logger)
        if file.is_file() and not _aside(file).exists():
            file.replace(_aside(file))


def put_back(trainer: Trainer, step: int) -> None:
    """Write the earlier rows of steps before `step` to the new files, and remove the old ones."""
    for logger in _csv_loggers(trainer):
        aside = _aside(_file(logger))
        if not aside.exists():
            continue
        # Lightning writes in the encoding of the locale.
        with aside.open(newline="", encoding=locale.getpreferredencoding(False)) as file:
            for row in csv.DictReader(file):
                at = row.pop("step", None)
                # A kill may have cut the last line short.
                if at and at.isdigit() and int(at) < step and None not in row.values():
                    figures: dict[str, Any] = {n: value for n, value in row.items() if value}
                    logger.experiment.log_metrics(figures, int(at))
        logger.save()
        aside.unlink()


def take_back(trainer: Trainer) -> None:
    """Undo `set_aside` where the run ended before `put_back` was done."""
    for logger in _csv_loggers(trainer):
        file = _file(logger)
        if _aside(file).exists():
            _aside(file).replace(file)


def _csv_loggers(trainer: Trainer) -> list[CSVLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]


def _file(logger: CSVLogger) -> Path:
    return Path(logger.log_dir, ExperimentWriter.NAME_METRICS_FILE)


def _aside(file: Path) -> Path:
    return file.with_name(file.name + ASIDE)
