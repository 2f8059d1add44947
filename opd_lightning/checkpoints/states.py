"""Check, before a run depends on it, that checkpoints can hold states of its parts."""

from __future__ import annotations

import io
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from opd_lightning.checkpoints.plain import load
from opd_lightning.errors import UserError, reason_of


class CheckStates(Callback):
    """Callback that calls `check_states` before weights load, and again after the first step."""

    def __init__(self) -> None:
        self._first = -1  # step after which states are checked again

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.checkpoint_callbacks:
            check_states(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first = trainer.global_step + 1

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self._first and trainer.checkpoint_callbacks:
            self._first = -1  # once, not for each micro-batch of the next step
            check_states(trainer)


def check_states(trainer: Trainer) -> None:
    """Refuse callbacks and rules whose state has more than tensors and plain data.

    With a NumPy number, for example, the first checkpoint fails, after hours of training perhaps.

    Raises:
        UserError: At the first such callback or rule.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    parts = [("trainer.callbacks", callback) for callback in callbacks]
    parts += [("rules", rule) for rule in getattr(trainer.lightning_module, "rules", ())]
    for place, part in parts:
        try:
            state: Any = part.state_dict()
        except Exception:  # it may need what training sets
            continue
        if not state:
            continue
        try:
            file = io.BytesIO()
            torch.save(_without_tensors(state), file)
            file.seek(0)
            load(file)
        except Exception as error:  # of any type: the state may hold anything
            raise UserError(
                f"{place}: {type(part).__name__}.state_dict: "
                f"{reason_of(error, 150)}, so that no checkpoint could be read again; return "
                "tensors, numbers, texts, lists and dicts of them"
            ) from error


def _without_tensors(state: Any) -> Any:
    """Return a state with empty tensors in place of those in its dicts, lists and tuples."""
    if isinstance(state, Tensor):
        return torch.empty(0)
    if type(state) is dict:
        return {key: _without_tensors(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(_without_tensors, state))
    return state
