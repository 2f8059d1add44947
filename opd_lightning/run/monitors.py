"""Figures that callbacks monitor, such as ModelCheckpoint's and EarlyStopping's `monitor`."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from opd_lightning.checkpoints.newest import model_checkpoints
from opd_lightning.errors import UserError, raised_by_all

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

VALIDATION = "val/"

log = logging.getLogger(__name__)


def check_monitors(trainer: Trainer, suites: Collection[str]) -> None:
    """Warn of monitored figures of a suite that the run does not have.

    They are not refused, since a method or callback may log figures of any name.
    """
    for callback, monitor in _monitors(trainer):
        if not monitor.startswith(VALIDATION):
            continue
        if not any(monitor.startswith(f"{VALIDATION}{suite}/") for suite in suites):
            log.warning(
                "trainer.callbacks: %s monitors %r, but the suites are %s; correct it, unless a "
                "method or callback of yours logs it",
                callback,
                monitor,
                ", ".join(suites) or "none",
            )


class WarnOfDeferredSaves(Callback):
    """Callback that warns of saves that are deferred to a validation in a run without any.

    ModelCheckpoint defers a save if nothing has logged the figure that it monitors.
    """

    def __init__(self) -> None:
        self._warned: list[ModelCheckpoint] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        for saver in model_checkpoints(trainer):
            absent = saver.monitor not in trainer.callback_metrics
            if not saver._defer_save_until_validation or not absent or saver in self._warned:
                continue
            if not any(trainer.num_val_batches):
                self._warned.append(saver)
                log.warning(
                    "trainer.callbacks: %s saved nothing after step %d, since nothing has logged "
                    "the figure that it monitors, %r; correct its monitor, or leave it out",
                    type(saver).__name__,
                    trainer.global_step,
                    saver.monitor,
                )


@contextmanager
def absent_monitors_explained(trainer: Trainer) -> Iterator[None]:
    """Raise UserError, on all ranks, in place of Lightning's errors of figures that are absent."""
    try:
        yield
    except (MisconfigurationException, RuntimeError) as error:
        figures = [str(name) for name in trainer.callback_metrics]
        for callback, monitor in _monitors(trainer):
            if monitor in figures or not _is_about(error, monitor):
                continue
            near = get_close_matches(monitor, figures, n=1, cutoff=0.0)
            example = f", such as {near[0]!r}" if near else ""
            refusal = UserError(
                f"trainer.callbacks: {callback}.monitor: got {monitor!r}, expected a figure that "
                f"the run logs{example}; correct it, and resume with --ckpt_path last"
            )
            raise raised_by_all(refusal) from error
        raise


def _monitors(trainer: Trainer) -> list[tuple[str, str]]:
    """Return class and figure of every callback that monitors one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = [(type(one).__name__, getattr(one, "monitor", None)) for one in callbacks]
    return [(name, monitor) for name, monitor in found if isinstance(monitor, str)]


def _is_about(error: Exception, monitor: str) -> bool:
    """Return whether Lightning says that it did not find the figure."""
    line = str(error)
    beginnings = (f"`ModelCheckpoint(monitor={monitor!r})`", "Early stopping conditioned on metric")
    return line.startswith(beginnings) and monitor in line
