"""What a checkpoint says about Lightning's loops: a step has not begun, or is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opd_lightning.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

EPOCH_LOOP = "epoch_loop."
OPTIMISER = f"{EPOCH_LOOP}automatic_optimization.optim_progress"


def check_whole_steps(trainer: Trainer) -> None:
    """An epoch ends between two optimiser steps, so that their number tells where a run is."""
    batches, parts = trainer.num_training_batches, trainer.accumulate_grad_batches
    if batches % parts:
        raise UserError(
            f"trainer.limit_train_batches: got {batches} micro-batches for "
            f"accumulate_grad_batches {parts}, expected a multiple, so that no step is cut short"
        )


def rewind(fit_loop: dict[str, Any], trainer: Trainer) -> None:
    """Turn a checkpoint from inside of a step into one of the step's beginning.

    The weights have not moved since the last optimiser step. Lightning's counters have, and would
    resume behind micro-batches whose gradient is lost; so they are put back to what a checkpoint
    taken right after that optimiser step has, which Lightning resumes from exactly. A validation
    that was cut short begins again.

    Args:
        fit_loop: The loop's state in the checkpoint; changed in place.
        trainer: Whose loop it is.
    """
    steps, parts = trainer.global_step, trainer.accumulate_grad_batches
    total = fit_loop[f"{EPOCH_LOOP}batch_progress"]["total"]
    if trainer.validating:
        validation = fit_loop[f"{EPOCH_LOOP}val_loop.batch_progress"]
        if not trainer.lightning_module.validation_is_over:
            # As of a first batch that was started: what Lightning takes for an evaluation to redo.
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            none = dict.fromkeys(begun, 0)
            validation |= {"total": begun, "current": none, "is_last_batch": False}
    elif total["ready"] > steps * parts or total["completed"] == total["ready"]:
        fit_loop |= _after(steps, parts, int(trainer.num_training_batches))


def _after(steps: int, parts: int, epoch: int) -> dict[str, Any]:
    """Counters of the loop in the hooks after optimiser step number `steps`, counted from 1.

    Args:
        steps: Optimiser steps made.
        parts: Micro-batches of a step.
        epoch: Micro-batches of an epoch.
    """
    epochs = max(steps * parts - 1, 0) // epoch  # before the one of that step
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
