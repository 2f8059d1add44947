"""Short run of the Trainer with a linear model, for tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from opd_lightning.commands.trainer import Trainer

Optimizers = Callable[[Any], Optimizer]


def adam(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


class Toy(LightningModule):
    """Linear model that learns to double a number."""

    is_updating = validation_is_over = False  # attributes of DistillationModule

    def __init__(self, width: int = 8, optimizer: Optimizers = adam) -> None:
        super().__init__()
        self.width = width
        self.optimizer = optimizer
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if hasattr(self, "layers"):
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(1, self.width), nn.Linear(self.width, 1))
        if self.device_mesh is not None:
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Optimizer:
        return self.optimizer(self.parameters())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = ((self.layers(batch) - 2 * batch) ** 2).mean()
        self.losses.append(float(loss))
        self.log("loss", loss.detach())
        return loss


def train(
    folder: Path,
    steps: int,
    *,
    module: LightningModule | None = None,
    callbacks: Sequence[Callback] = (),
    ckpt_path: str | Path | None = "last",
    saver: dict[str, Any] | None = None,
    **trainer_args: Any,
) -> tuple[Trainer, Any]:
    """Train to optimiser step `steps`, with a checkpoint every step; return trainer and module."""
    module = module or Toy()
    options: dict[str, Any] = {"filename": "{step}", "every_n_train_steps": 1, "save_last": True}
    keeper = ModelCheckpoint(folder, **options | (saver or {}))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[keeper, *callbacks],
        **{"devices": 1, **trainer_args},
    )
    numbers: Any = torch.linspace(-1, 1, 4).repeat(16)[:, None]  # every step has the same
    data: DataLoader[Tensor] = DataLoader(numbers, batch_size=4)
    trainer.fit(module, data, ckpt_path=str(ckpt_path) if ckpt_path else None)
    return trainer, module
