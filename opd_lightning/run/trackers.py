"""Settings of a run in loggers other than TensorBoard, and their runs across restarts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger

from opd_lightning.run.starts import last_start

WANDB_RUN = "WANDB_RUN_ID"  # environment variable that Weights & Biases reads


def continue_tracked_run(trainer: Trainer, run: Path) -> None:
    """Let Weights & Biases continue the run of the last start, unless an id is given.

    Called before the logger connects.
    """
    before = last_start(run).get("trackers", {}).get("wandb")
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and logger.version is None and before:
            os.environ.setdefault(WANDB_RUN, before)


def tracked_runs(trainer: Trainer) -> dict[str, str]:
    """Return the ids of the runs in Weights & Biases and MLflow, of the first logger each."""
    found: dict[str, str] = {}
    for logger in trainer.loggers:
        if isinstance(logger, (WandbLogger, MLFlowLogger)) and logger.version is not None:
            name = "wandb" if isinstance(logger, WandbLogger) else "mlflow"
            found.setdefault(name, str(logger.version))
    return found


def log_settings(trainer: Trainer, settings: Mapping[str, float | str]) -> None:
    """Log a run's settings to Weights & Biases and MLflow."""
    for logger in trainer.loggers:
        if isinstance(logger, (WandbLogger, MLFlowLogger)) and settings:
            logger.log_hyperparams(dict(settings))
