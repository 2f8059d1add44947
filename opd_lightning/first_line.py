"""What a run says of itself when it begins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer

from opd_lightning.errors import note

if TYPE_CHECKING:
    from opd_lightning.methods.base import DistillationModule


class FirstLine(Callback):
    """One line instead of Lightning's table of modules, on rank 0."""

    def on_train_start(  # type: ignore[override]
        self, trainer: Trainer, module: DistillationModule
    ) -> None:
        folder = trainer.log_dir  # a broadcast, for every rank
        if trainer.is_global_zero:
            note(_line(trainer, module, folder))


def _line(trainer: Trainer, module: DistillationModule, folder: str | None) -> str:
    sizes = [(p.numel(), p.requires_grad) for p in module.student.parameters()]
    parameters, trained = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    share = "all" if trained == parameters else f"{trained:,} of them"
    steps = trainer.estimated_stepping_batches
    end = "" if math.isinf(steps) else f" to {int(steps):,}"
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    several = f" x {data.samples_per_prompt} samples" if data.samples_per_prompt > 1 else ""
    processes = f", {trainer.world_size} processes" if trainer.world_size > 1 else ""
    return (
        f"{type(module).__name__} trains {module.student.source.path} ({parameters:,} parameters, "
        f"{share}) on {trainer.strategy.root_device.type}{processes}: "
        f"step {trainer.global_step:,}{end}, {data.prompts_per_step} prompts{several} a step"
        + (f"; run folder {folder}" if folder is not None else "")
    )
