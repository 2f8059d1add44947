"""Progress of a run in optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning.processes import rank_zero_note
from opd_lightning.terminal.progress import Progress, say
from opd_lightning.training.callback import RunCallback
from opd_lightning.types import WholeStep

if TYPE_CHECKING:
    from opd_lightning.evaluation.module import EvaluatedModule
    from opd_lightning.training.base import DistillationModule


class StepProgressBar(ProgressBar):
    """Progress bar of the whole run, with the loss, the reward and tokens per second.

    A long step has a separate bar, in micro-batches. A validation has one in responses, and leaves
    a line with its scores. A log has lines instead, on rank 0, at most one every
    `log_every_n_steps` steps and a few per minute.

    Args:
        label: Name of the bar.
    """

    def __init__(self, label: str = "step") -> None:
        super().__init__()
        self.label = label
        self._enabled = True
        self._steps: Progress | None = None
        self._parts: Progress | None = None
        self._suites: Progress | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Progress holds a lock, which cannot be pickled.
        return {**vars(self), "_steps": None, "_parts": None, "_suites": None}

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bars."""
        if self._enabled:
            say(" ".join(map(str, args)))

    # Training -----------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.estimated_stepping_batches
        self._steps = Progress(
            self.label,
            None if math.isinf(steps) else int(steps),
            "step",
            done=trainer.global_step,  # a resumed run begins in the middle
            every=trainer.log_every_n_steps,  # type: ignore[attr-defined]
            disable=not self._enabled,
        )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._parts is None:
            parts = len(batch) if isinstance(batch, WholeStep) else trainer.accumulate_grad_batches
            self._parts = Progress(
                "learn", parts, "micro-batch", within=True, disable=not self._enabled
            )

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts = self._parts
        if parts is not None and parts.done + 1 < (parts.total or 0):  # else the step is done
            parts.update()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        steps, parts = self._steps, self._parts
        if steps is None or parts is None or not self._enabled:
            return
        if steps.done < trainer.global_step:
            parts.close()
            self._parts = None
            steps.figures = ", ".join(_figures(self.get_metrics(trainer, pl_module)))
            steps.update(trainer.global_step - steps.done)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def _close(self) -> None:
        for bar in (self._suites, self._parts, self._steps):
            if bar is not None:
                bar.close()
        self._suites = self._parts = self._steps = None

    # Evaluation ---------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer.val_dataloaders, fits=trainer.state.fn == TrainerFn.FITTING)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer.test_dataloaders, fits=False)

    def _begin(self, suites: Any, *, fits: bool) -> None:
        responses = sum(suite.rows for suite in suites)
        self._suites = Progress(
            "evaluate", responses, "response", within=fits, disable=not self._enabled
        )

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._suites is not None:
            self._suites.update(batch.rows)

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.on_validation_batch_end(*args, **kwargs)

    def on_validation_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: EvaluatedModule
    ) -> None:
        if self._suites is not None:
            self._suites.close()
        measured = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self._enabled and measured:
            for suite in pl_module.suites:
                say(f"step {trainer.global_step}, {_scores(suite, pl_module.scores)}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._suites is not None:
            self._suites.close()


def _figures(shown: Mapping[str, Any]) -> list[str]:
    """Format metrics, the loss first and the speed last."""
    names = sorted(shown.keys() - {"v_num", "tokens_per_second"}, key=lambda n: (n != "loss", n))
    figures = [f"{name} {float(shown[name]):.3g}" for name in names]
    rate = shown.get("tokens_per_second")
    return figures if rate is None else [*figures, f"{float(rate):,.0f} tokens/s"]


def _scores(suite: str, scores: Mapping[str, float]) -> str:
    """Format the scores of a suite in a line."""
    known = {key.removeprefix(f"val/{suite}/"): value for key, value in scores.items()}
    parts = []
    if "score" in known:
        parts.append(f"score {known['score']:.3f}")
    if "score_low" in known:
        parts[0] += f" ({known['score_low']:.3f} to {known['score_high']:.3f})"
    if "length" in known:
        parts += [f"length {known['length']:.1f}", f"truncated {known['truncated']:.1%}"]
    if "perplexity" in known:
        parts.append(f"perplexity {known['perplexity']:.4g}")
    if "kl" in known:
        parts.append(f"KL from the start {known['kl']:.4f}")
    if not parts:  # a suite of another kind
        parts += [f"{name} {value:.3g}" for name, value in known.items() if "/" not in name]
    return f"{suite}: " + ", ".join(parts)


class FirstLine(RunCallback):
    """Callback that prints one line instead of Lightning's table of modules, on rank 0.

    If the checkpoint that the run continues from is its last, the line says that instead.
    """

    def __init__(self) -> None:
        self._trains = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._trains:
            rank_zero_note(
                f"nothing is left to train: the run is at step {trainer.global_step:,}; raise "
                "trainer.max_steps to continue it"
            )

    def on_train_start(  # type: ignore[override]
        self, trainer: Trainer, module: DistillationModule
    ) -> None:
        self._trains = True
        folder = trainer.log_dir  # a broadcast, for every rank
        rank_zero_note(_line(trainer, module, folder))


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
