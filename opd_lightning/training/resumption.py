"""State of Lightning's loops in checkpoints, aligned to whole optimiser steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opd_lightning.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

EPOCH_LOOP = "epoch_loop."
OPTIMISER = f"{EPOCH_LOOP}automatic_optimization.optim_progress"


def check_whole_steps(trainer: Trainer) -> None:
    """Raise UserError if an epoch ends inside a step: the step number must define the position."""
    batches, parts = trainer.num_training_batches, trainer.accumulate_grad_batches
    if batches % parts:
        raise UserError(
            f"trainer.limit_train_batches: got {batches} micro-batches for "
            f"accumulate_grad_batches {parts}, expected a multiple, so that no step is cut short"
        )


def rewind(fit_loop: dict[str, Any], trainer: Trainer) -> None:
    """Set a checkpoint's loop counters to the end of the last optimiser step.

    The weights have not changed since then, but Lightning's counters may have. Without this, a
    resumed run would skip micro-batches whose gradients are lost. The counters are reset to those
    of a checkpoint taken right after that optimiser step, from which Lightning resumes exactly. An
    interrupted or pending validation runs after resumption; Lightning would consider a pending one
    finished.

    Args:
        fit_loop: State of the fit loop in the checkpoint; changed in place.
        trainer: Trainer of that loop.
    """
    steps, parts = trainer.global_step, trainer.accumulate_grad_batches
    over = fit_loop[f"{EPOCH_LOOP}batch_progress"]["total"]["ready"] == steps * parts
    fit_loop |= _after(steps, parts, int(trainer.num_training_batches))
    validation = dict.fromkeys(("ready", "started", "processed", "completed"), 0)
    if not trainer.lightning_module.validation_is_over and (
        trainer.validating or (over and _validation_is_due(trainer))
    ):
        for counts in ("total", "current"):
            batches = fit_loop[f"{EPOCH_LOOP}batch_progress"][counts]
            batches["completed"] = batches["processed"]
        # Counters of a started first batch: Lightning then repeats the evaluation.
        validation |= {"ready": 1, "started": 1}
    fit_loop[f"{EPOCH_LOOP}val_loop.batch_progress"] = {
        "total": validation, "current": dict.fromkeys(validation, 0), "is_last_batch": False
    }  # fmt: skip


def _validation_is_due(trainer: Trainer) -> bool:
    """Return whether Lightning validates after the last finished step."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def _after(steps: int, parts: int, epoch: int) -> dict[str, Any]:
    """Return the loop's counters in the hooks after optimiser step `steps`, counted from 1.

    Args:
        steps: Optimiser steps made.
        parts: Micro-batches of a step.
        epoch: Micro-batches of an epoch.
    """
    epochs = max(steps * parts - 1, 0) // epoch  # before the epoch of that step
    batches = steps * parts - epochs * epoch
    begun, open_batch = (1, 1) if steps else (0, 0)
    return {
        "epoch_progress": _both(
            ready=epochs + begun, started=epochs + begun, processed=epochs, completed=epochs
        ),
        f"{EPOCH_LOOP}state_dict": {"_batches_that_stepped": steps - open_batch},
        f"{EPOCH_LOOP}batch_progress": {
            "total": _batches(steps * parts, open_batch),
            "current": _batches(batches, open_batch),
            "is_last_batch": batches == epoch,
        },
        OPTIMISER: {
            "optimizer": {
                "step": {
                    "total": {"ready": steps, "completed": steps},
                    "current": {"ready": batches // parts, "completed": batches // parts},
                },
                "zero_grad": {
                    "total": dict.fromkeys(("ready", "started", "completed"), steps),
                    "current": dict.fromkeys(("ready", "started", "completed"), batches // parts),
                },
            }
        },
    }


def _both(**counts: int) -> dict[str, dict[str, int]]:
    return {"total": dict(counts), "current": dict(counts)}


def _batches(count: int, unfinished: int) -> dict[str, int]:
    started = dict.fromkeys(("ready", "started", "processed"), count)
    return {**started, "completed": count - unfinished}
