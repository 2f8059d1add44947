"""Sample rollouts as text in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from opd_lightning.errors import UserError
from opd_lightning.types import Rollout, RolloutBatch


class RolloutLog(Callback):
    """Writes a few of the step's rollouts to TensorBoard's text tab.

    Args:
        every_n_steps: Optimiser steps between two entries.
        count: Rollouts per entry.
        max_characters: Longer prompts and responses are cut in the middle.
    """

    def __init__(self, every_n_steps: int = 10, count: int = 4, max_characters: int = 2000) -> None:
        if every_n_steps < 1 or count < 1:
            raise UserError(
                f"RolloutLog: got every_n_steps={every_n_steps}, count={count}, expected both "
                "at least 1"
            )
        self.every_n_steps = every_n_steps
        self.count = count
        self.max_characters = max_characters
        self._last_step = -1

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        step = batch.totals.step
        if step == self._last_step or step % self.every_n_steps:
            return
        self._last_step = step
        # Micro-batches run from long to short: an even spread shows both.
        spread = batch.rollouts[:: max(1, len(batch.rollouts) // self.count)]
        text = self._table(spread[: self.count])
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("rollouts", text, step)

    def _table(self, rollouts: Sequence[Rollout]) -> str:
        """A Markdown table, one rollout a row."""
        columns = ("prompt", "author", "response", "end", "reward", "mean log-prob")
        rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for r in rollouts:
            question = " ".join(f"[{m['role']}] {m['content']}" for m in r.prompt.messages)
            mean = sum(r.behaviour_logprobs) / max(len(r.behaviour_logprobs), 1)
            rows.append(
                f"| {self._cell(question)} | {r.author} | {self._cell(r.text)} "
                f"| {r.stop_reason} | {r.reward:.2f} | {mean:.3f} |"
            )
        return "\n".join(rows)

    def _cell(self, text: str) -> str:
        if len(text) > self.max_characters:
            half = self.max_characters // 2
            text = f"{text[:half]} ... {text[-half:]}"
        # Markdown would end the cell at a bar and the row at a line break.
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")
