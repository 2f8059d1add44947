"""Write figures to a trainer's loggers, and have them on disk before a checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.fabric.utilities.logger import _add_prefix
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary


def write_figures(trainer: Trainer, figures: Mapping[str, float], step: int) -> None:
    """Hand a run's figures to its loggers, and have them on disk.

    Lightning would do so after the step's checkpoint is saved, so that a run that dies in between
    would resume behind figures that nobody wrote.

    Args:
        trainer: Whose loggers.
        figures: Numbers by name.
        step: Optimiser steps made by the weights that the figures are of.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _write_event(logger, figures, step)
        else:
            logger.log_metrics(dict(figures), step)
        logger.save()


def write_validation(
    trainer: Trainer, scores: Mapping[str, float], tables: Mapping[str, str]
) -> None:
    """Log the scores and Markdown tables of a validation, at the number of optimiser steps made."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            for tag, table in tables.items():
                logger.experiment.add_text(tag, table, trainer.global_step)
    write_figures(trainer, scores, trainer.global_step)  # and all of it is on disk


def write_step(trainer: Trainer, figures: Mapping[str, float], step: int) -> None:
    """The same of one optimiser step, where `log_every_n_steps` wants it.

    Args:
        trainer: Whose loggers.
        figures: Numbers by name.
        step: Its index: steps made before it.
    """
    if (step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
        write_figures(trainer, figures, step)


@rank_zero_only
def _write_event(logger: TensorBoardLogger, figures: Mapping[str, float], step: int) -> None:
    """All figures in one event: `log_metrics` makes one of each, in forty times the time."""
    named = _add_prefix(figures, logger._prefix, logger.LOGGER_JOIN_CHAR)
    values = [Summary.Value(tag=name, simple_value=value) for name, value in named.items()]
    logger.experiment.file_writer.add_summary(Summary(value=values), step)
