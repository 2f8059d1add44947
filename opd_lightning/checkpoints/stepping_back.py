"""Rollback of weights and optimiser to a checkpoint during a run; the step count continues."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def step_back(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Restore weights, optimiser and loss scale from a checkpoint of this run.

    Steps, schedules, prompts and seeds continue, and so do the settings of parameter groups
    (learning rate, betas), which belong to the schedule. All processes must call this between
    two steps.

    Returns:
        The checkpoint's content, for other states that belong to the weights.

    Raises:
        UserError: If the checkpoint is missing or damaged.
    """
    connector = trainer._checkpoint_connector
    resumed_from = connector._ckpt_path
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    connector.resume_start(path)  # this loads sharded models completely
    content: dict[str, Any] = connector._loaded_checkpoint
    connector.restore_model()
    connector.restore_precision_plugin_state()
    if trainer.strategy.lightning_restore_optimizer:
        connector.restore_optimizers()
    connector.resume_end()
    connector._ckpt_path = resumed_from
    # Loading replaces the groups of the optimisers.
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group, setting in zip(groups, settings, strict=True):
        group.update(setting)
    return content
