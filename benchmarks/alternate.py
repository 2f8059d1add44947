"""Callback that disables diagnostics in every other step, for `overhead.py`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from time import process_time
from typing import Any

import torch

from callbacks import CollapseWatch, RolloutLog, SignalPlots
from opd_lightning.models import head
from opd_lightning.training.callback import RunCallback

PATTERN = (True, False, False, True)


class Alternate(RunCallback):
    """Enables and disables diagnostics between steps, and measures CPU time in seconds.

    Args:
        first: Whether diagnostics are on in the first step.
    """

    runs_last = True

    def __init__(self, first: bool = True) -> None:
        self.pattern = [is_on == first for is_on in PATTERN]
        self.is_on: list[bool] = []  # by step
        self.losses: list[float] = []  # likewise
        self.learning: list[float] = []  # per response token, by step
        self.whole: list[float] = []  # likewise, from the start of a step to that of the next
        self.inside: list[dict[str, float]] = []  # likewise, by diagnostic; empty if off
        self._now: defaultdict[str, float] = defaultdict(float)
        self._restore: list[Callable[[], None]] = []
        self._tokens = 0
        self._began = 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, RolloutLog | SignalPlots):
                # Log in steps with diagnostics only, which are half of all.
                callback.every_n_steps *= 2

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        assert trainer.accumulate_grad_batches == 1
        if self.learning:
            self.whole.append((process_time() - self._began) / self._tokens)
        is_on = self.pattern[batch_idx % len(PATTERN)]
        self.is_on.append(is_on)
        for owner, name, instead in _diagnostics(trainer, module):
            self._replace(owner, name, self._timed(owner, name) if is_on else instead)
        if not is_on:
            self._replace(module, "overlap_top_k", 0)
        self._tokens = int(batch.response_mask.sum())
        self._began = process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.learning.append((process_time() - self._began) / self._tokens)
        for restore in self._restore:
            restore()
        self._restore.clear()
        self.inside.append({name: took / self._tokens for name, took in self._now.items()})
        self._now.clear()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        setattr(owner, name, value)
        self._restore.append(lambda: setattr(owner, name, before))

    def _timed(self, owner: Any, name: str) -> Callable[..., Any]:
        function, of = getattr(owner, name), getattr(owner, "__name__", type(owner).__name__)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = process_time()
            done = function(*args, **kwargs)
            self._now[f"{of}.{name}"] += process_time() - began
            return done

        return timed


def _diagnostics(trainer: Any, module: Any) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Yield owner and name of every diagnostic function, and its replacement when off."""
    yield head, "_describe", _only_logprobs
    for name in ("note_signal", "note_rules", "compare_with_engine", "_log_step"):
        yield module, name, _nothing
    yield module.responses, "update", _nothing
    for callback in trainer.callbacks:
        if isinstance(callback, RolloutLog | SignalPlots | CollapseWatch):
            for name in ("on_before_optimizer_step", "after_loss", "on_train_batch_end"):
                yield callback, name, _nothing


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _only_logprobs(logprobs: torch.Tensor, targets: torch.Tensor, top_k: int) -> head.FlatScores:
    known = logprobs.gather(1, targets)[:, 0].detach()
    none = logprobs.detach()[:, :0]
    return head.FlatScores(known, torch.zeros_like(known), none.long(), none)
