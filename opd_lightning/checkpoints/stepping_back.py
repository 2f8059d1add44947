"""What was learnt since a checkpoint is undone in the midst of a run; its clock goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def step_back(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Put weights, optimiser and loss scale back to a checkpoint of this run.

    Steps, schedules, prompts and seeds go on from where they are, and so do the settings of
    parameter groups (learning rate, betas), which belong to the schedule. All processes must call
    it, between two steps.

    Returns:
        The checkpoint's content, for whoever else keeps a state that belongs to the weights.

    Raises:
        UserError: The checkpoint is gone or damaged.
    """
    connector = trainer._checkpoint_connector
    resumed_from = connector._ckpt_path
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    connector.resume_start(path)  # of sharded models, this is all of it
    content: dict[str, Any] = connector._loaded_checkpoint
    connector.restore_model()
    connector.restore_precision_plugin_state()
    if trainer.strategy.lightning_restore_optimizer:
        connector.restore_optimizers()
    connector.resume_end()
    connector._ckpt_path = resumed_from
    # Loading has put new groups into the optimisers.
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group, setting in zip(groups, settings, strict=True):
        group.update(setting)
    return content
