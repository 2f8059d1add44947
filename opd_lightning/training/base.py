"""Base LightningModule of all methods: student, optimiser, training step and logging."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.plugins import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric, SumMetric

from opd_lightning.errors import EngineMismatchError, RunStoppedError, UserError
from opd_lightning.evaluation.module import EvaluatedModule
from opd_lightning.losses.reduction import Aggregation
from opd_lightning.metrics.depth import DepthStatistics
from opd_lightning.metrics.log import write_step
from opd_lightning.metrics.overlap import OverlapStatistics
from opd_lightning.metrics.signal import SignalStatistics
from opd_lightning.metrics.step import EngineStatistics, ResponseStatistics, RewardParts
from opd_lightning.metrics.sums import Means
from opd_lightning.metrics.teachers import TeacherStatistics
from opd_lightning.models.sharding import Sharding, full_tensor
from opd_lightning.models.student import Student
from opd_lightning.processes import Ranks, rank_zero_note
from opd_lightning.rules.base import Rates, Scored, Signal
from opd_lightning.timing import StepTimer
from opd_lightning.training.accumulation import accumulating
from opd_lightning.training.callback import run_callbacks
from opd_lightning.training.contract import Contract
from opd_lightning.training.learning_rates import scaled
from opd_lightning.training.resumption import check_whole_steps, rewind
from opd_lightning.training.scoring import mean_logprobs
from opd_lightning.training.skipped_steps import SkippedSteps, check_weights
from opd_lightning.types import RolloutBatch, TokenScores, WholeStep

log = logging.getLogger(__name__)


class DistillationModule(Contract, EvaluatedModule):
    """Base class of methods. A subclass computes the loss of a micro-batch.

    Args:
        student: The model that learns.
        optimizer: Optimiser. Published learning rates are 1e-5 to 1e-6 for all weights and 1e-4
            for LoRA.
        lr_scheduler: Learning-rate scheduler, stepped once per optimiser step.
        aggregation: Reduction of token losses; see `losses/reduction.py`.
        max_logprob_gap: Largest mean gap of a step between log-probs of engine and trainer, in
            nats per sampled token. A larger gap stops the run.
        stop_after_skips: Number of consecutive skipped steps that stops the run. A step is
            skipped, without an update, if its loss or gradient is not finite.
        overlap_top_k: Size of the top-k sets whose overlap is logged.
    """

    def __init__(
        self,
        student: Student,
        *,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5),
        lr_scheduler: LRSchedulerCallable | None = None,
        aggregation: Aggregation = "token-mean",
        max_logprob_gap: float = 0.1,
        stop_after_skips: int = 3,
        overlap_top_k: int = 16,
    ) -> None:
        super().__init__()
        self.student = student
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.aggregation: Aggregation = aggregation
        self.max_logprob_gap = max_logprob_gap
        self.overlap_top_k = overlap_top_k
        self.timer = StepTimer()
        self.loss_sum = SumMetric(nan_strategy="disable")
        self.skipped = SkippedSteps(stop_after_skips)
        self.responses = ResponseStatistics()
        self.reward_parts = RewardParts()
        self.engine_gap = EngineStatistics()
        self.signal = SignalStatistics()
        self.overlap = OverlapStatistics()
        self.depth = DepthStatistics()
        self.by_teacher = TeacherStatistics()
        self.rates = Means()
        # [B, R] or [B, 1] values of the latest micro-batch, by name, for logs.
        self.token_figures: Mapping[str, Tensor] = {}
        # Figures of the latest optimiser step, by name. `trainer.callback_metrics` also has older
        # values, of figures that this step lacks.
        self.step_figures: Mapping[str, float] = {}
        self._factor = 1.0  # factor of the step's loss: see `Contract.loss_factor`
        self._later: list[RolloutBatch] = []  # the step's micro-batches after the first
        self._tokens = 0.0  # response tokens of the last logged step
        self.is_updating = False  # an update of weights, scheduler and callbacks is in progress
        # Factors on the learning rate, by name. Callbacks add theirs and checkpoint them.
        self.rate_scales: dict[str, float] = {}

    # Helpers for methods ------------------------------------------------------------------

    def compare_with_engine(self, batch: RolloutBatch, student: TokenScores) -> None:
        """Record the gap between the engine's log-probs of its samples and the trainer's.

        An engine that truncates reports the log-probs of what it kept; the trainer's are then
        divided by the mass that the same truncation keeps of its whole distribution.
        A step whose mean gap is too large stops the run before the optimiser step. Rollouts that
        are recorded or were sampled under another prompt are not compared. For rollouts of older
        weights a gap is expected, so only their importance weights are recorded.
        """
        mask = batch.response_mask & batch.on_policy[:, None]
        self.skipped.record_engine(batch, mask)
        versions = [rollout.policy_version for rollout in batch.rollouts]
        fresh = torch.tensor(versions, device=mask.device) == batch.totals.step
        self.engine_gap.update(
            batch.behaviour_logprobs[mask],
            student.sampled_logprobs[mask],
            fresh[:, None].expand_as(mask)[mask],
        )
        if student.log_mass is not None:
            self.rates.update(batch, {"engine/kept_mass": student.log_mass.exp()})

    def note_signal(
        self, batch: RolloutBatch, student: TokenScores, teacher: TokenScores, mask: Tensor
    ) -> None:
        """Record statistics of the teacher's scores of the tokens in `mask [B, R]`."""
        self.signal.update(batch, student, teacher, mask)
        self.overlap.update(student, teacher, mask)
        self.depth.update(student, teacher, mask)
        if domains := self.all_asks()["teacher"].teacher.domains:
            self.by_teacher.update(batch, domains, student, teacher, mask)

    def note_rules(self, scored: Scored, signal: Signal, rates: Rates) -> None:
        """Record the effect of the rules on the signal, per token."""
        done = {**rates, "selected": signal.mask}
        self.rates.update(scored.batch, {f"rule/{name}": rate for name, rate in done.items()})
        if "teacher" not in scored.others:  # else recorded by SignalStatistics
            self.rates.update(scored.batch, {"entropy/student": scored.student.entropy})
        ratio = {"log_ratio": scored.log_ratio} if "teacher" in scored.others else {}
        self.token_figures = ratio | {"advantage": signal.advantage, **done}

    # Lightning ----------------------------------------------------------------------------

    def configure_model(self) -> None:
        self.student.load(Sharding.of(self.trainer))
        self.load_start()
        if self.trainer.state.fn == TrainerFn.FITTING:  # only training uses teachers
            for teacher in self.teachers():
                teacher.load(self.trainer.strategy.root_device, self.student)

    def configure_optimizers(self) -> Any:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        if own := sorted(name for name in trained if not name.startswith("student.")):
            log.warning(
                "%s: the optimiser trains the student, and not the method's own %s; override "
                "configure_optimizers to train them too, or call requires_grad_(False) on them",
                type(self).__name__,
                ", ".join(own[:4]) + ("..." if len(own) > 4 else ""),
            )
        optimizer = self.optimizer([p for p in self.student.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        planned = getattr(scheduler, "total_steps", None)
        if planned is not None and planned < self.trainer.max_steps:
            raise UserError(
                f"lr_scheduler.total_steps: got {planned} for trainer.max_steps "
                f"{self.trainer.max_steps}; set both alike"
            )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        try:
            super().lr_scheduler_step(scheduler, metric)
        except ArithmeticError as error:
            raise UserError(
                f"model.lr_scheduler: {type(scheduler).__name__} has no learning rate after step "
                f"{self.trainer.global_step} ({error}); correct its settings, or if they are from "
                "a checkpoint, which was changed then, name another"
            ) from error

    def teardown(self, stage: str) -> None:
        for teacher in self.teachers():
            teacher.close()

    def likelihoods(self, batches: Sequence[RolloutBatch]) -> list[float]:
        """Return the student's mean log-prob of each rollout's tokens, nats. Collective."""
        with self.trainer.precision_plugin.forward_context():
            return mean_logprobs(self.student, (batch.to(self.device) for batch in batches))

    def training_step(self, batch: RolloutBatch | WholeStep, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch, the first one of a whole step."""
        if isinstance(batch, WholeStep):
            batch = batch[0]
        assert batch.totals.step == self.trainer.global_step
        loss = self.loss(batch)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise RunStoppedError(
                f"{type(self).__name__}: its loss has no gradient; compute it from the log-probs "
                "of `student`, or from `values`: those in `scored` are detached"
            )
        self.loss_sum.update(loss.detach())
        if not batch.is_filler:
            self.responses.update(batch)
            self.reward_parts.update(batch)
        for callback in run_callbacks(self.trainer):
            callback.after_loss(self.trainer, self, batch)
        # Lightning divides by the micro-batches, and DDP and FSDP average over ranks; `loss` is
        # already this micro-batch's share of the whole step.
        return loss * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def on_train_start(self) -> None:
        check_whole_steps(self.trainer)
        self.depth.limit = self.trainer.datamodule.sampling.max_new_tokens  # type: ignore[attr-defined]
        for metric in self._metrics():
            metric.reset()  # an exception may have interrupted a step
        self.skipped.reset()
        self.is_updating = False

    def on_train_batch_start(self, batch: RolloutBatch | WholeStep, batch_idx: int) -> None:
        self._later = batch[1:] if isinstance(batch, WholeStep) else []

    def _metrics(self) -> tuple[Metric, ...]:
        about_teacher = (self.signal, self.overlap, self.depth, self.by_teacher)
        about_responses = (self.responses, self.reward_parts, self.engine_gap)
        return (self.loss_sum, *about_responses, *about_teacher, self.rates)

    def on_before_backward(self, loss: Tensor) -> None:
        self.timer.start("backward")

    def on_after_backward(self) -> None:
        self.timer.stop("backward")

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        with self.timer.stage("log"):
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of 16-mixed
            if scaler is not None and optimizer.defaults.get("fused"):
                scaler.unscale_(optimizer)  # else in its step, after norms are read and clipped
            parameters = list(self.student.parameters())
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
            loss = self.loss_sum.compute() * self._factor
            skipped = self.skipped.skip(
                self.trainer.global_step,
                loss,
                norm,
                parameters,
                loss_scale=1.0 if scaler is None else scaler.get_scale(),
            )
            if skipped is not None:
                rank_zero_note(skipped)
            self._log_step(loss, norm, skipped=skipped is not None)
        for teacher in self.teachers():
            teacher.release()
        self.timer.start("optimizer")
        self.is_updating = True
        self.validation_is_over = False

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if all(parameter.grad is None for parameter in self.student.parameters()):
            return  # of a skipped step; torch's `clip_grad_value_` fails without gradients
        if optimizer.defaults.get("fused"):
            # MixedPrecision refuses to clip for optimisers that unscale gradients in their step.
            # `on_before_optimizer_step` has unscaled these, so its base class may clip them.
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            plugin = self.trainer.precision_plugin
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        assert optimizer_closure is not None
        passes = accumulating(optimizer_closure, self._later, self.trainer, batch_idx)

        def closure() -> Any:
            result = passes()
            self._scale_gradients()  # before callbacks see them and they are clipped
            return result

        with scaled(self.trainer.optimizers, math.prod(self.rate_scales.values())):
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
        check_weights(self.trainer.global_step, self.student, Ranks.of(self.trainer))
        self.timer.stop("optimizer")

    def _scale_gradients(self) -> None:
        """Multiply the gradients of the step by the factor of its loss."""
        self._factor = self.loss_factor()
        if self._factor != 1:
            for parameter in self.student.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._factor)

    def on_train_batch_end(self, *_: Any) -> None:
        self._later = []
        self.is_updating = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        rewind(checkpoint["loops"]["fit_loop"], self.trainer)
        checkpoint["skipped_steps"] = self.skipped.counts()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.skipped.resume(checkpoint.get("skipped_steps", {}))

    def on_validation_start(self) -> None:
        self.timer.pause()

    def on_validation_end(self) -> None:
        self.timer.resume()

    # Logs ---------------------------------------------------------------------------------

    def _log_step(self, loss: Tensor, gradient_norm: Tensor, *, skipped: bool) -> None:
        values: dict[str, Any] = {
            "loss": loss,
            "optim/skipped_steps": float(self.skipped.total),
            "optim/gradient_norm": gradient_norm,
            "optim/learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
        }
        for metric in self._metrics():
            if metric.update_called and metric is not self.loss_sum:
                values |= metric.compute()
            metric.reset()
        gap = float(values.get("engine/logprob_gap_mean", 0.0))
        if not skipped and not gap <= self.max_logprob_gap:  # true for NaN as well
            raise EngineMismatchError.of_logprobs(
                self.trainer.global_step, gap, self.max_logprob_gap
            )
        # Timings of the previous step: the current one is not over.
        values |= self.timer.figures(self._tokens)
        self._tokens = float(values["response/tokens_per_step"])
        figures = self.step_figures = {name: float(value) for name, value in values.items()}
        epoch = {"epoch": float(self.trainer.current_epoch)}
        write_step(self.trainer, figures | epoch, self.trainer.global_step)
        # For Lightning's callbacks and the progress bar. Its `log` takes 0.5 ms per value.
        held = torch.tensor(list(figures.values()), device=self.device)
        self.trainer.callback_metrics.update(zip(figures, held.unbind(), strict=True))
        shown = ("loss", "reward", "tokens_per_second")
        self.trainer.progress_bar_metrics.update({k: figures[k] for k in shown if k in figures})
