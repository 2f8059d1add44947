"""Logging to a trainer's loggers, flushed to disk before a checkpoint is saved."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.fabric.utilities.logger import _add_prefix
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary

from opd_lightning.metrics.media import write_text


def write_figures(trainer: Trainer, figures: Mapping[str, float], step: int) -> None:
    """Log figures and flush them to disk.

    Lightning would flush after the step's checkpoint is saved. A run that is killed in between
    would resume after that step without its figures.

    Args:
        trainer: Its loggers receive the figures.
        figures: Values by name.
        step: Number of optimiser steps that made the weights behind the figures.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _write_event(logger, figures, step)
        elif figures:  # a CSVLogger would write an empty row
            logger.log_metrics(dict(figures), step)
        logger.save()


def write_validation(
    trainer: Trainer, scores: Mapping[str, float], tables: Mapping[str, str]
) -> None:
    """Log the scores and Markdown tables of a validation, at the number of optimiser steps made."""
    for tag, table in tables.items():
        if trainer.is_global_zero:
            write_text(trainer, tag, table, trainer.global_step)
    write_figures(trainer, scores, trainer.global_step)  # flushes the tables, too


def write_step(trainer: Trainer, figures: Mapping[str, float], step: int) -> None:
    """Log the figures of one optimiser step if it is one of every `log_every_n_steps`.

    Args:
        trainer: Its loggers receive the figures.
        figures: Values by name.
        step: Index of the step, from 0.
    """
    if (step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
        write_figures(trainer, figures, step)


@rank_zero_only
def _write_event(logger: TensorBoardLogger, figures: Mapping[str, float], step: int) -> None:
    """Write all figures as one event; `log_metrics` writes one each and takes 40 times as long."""
    named = _add_prefix(figures, logger._prefix, logger.LOGGER_JOIN_CHAR)
    values = [Summary.Value(tag=name, simple_value=value) for name, value in named.items()]
    logger.experiment.file_writer.add_summary(Summary(value=values), step)
