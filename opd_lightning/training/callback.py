"""Base class of callbacks with hooks and flags beyond Lightning's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import Callback, Trainer

from opd_lightning.data.mix import RolloutMix

if TYPE_CHECKING:
    from opd_lightning.training.base import DistillationModule
    from opd_lightning.types import RolloutBatch

# By category and chart title: the kind of chart and regular expressions of its tags. The tags of a
# "Margin" are value, lower bound and upper bound.
Layout = dict[str, dict[str, list[Any]]]


class RunCallback(Callback):
    """Lightning callback with additional hooks and flags.

    The hooks of all callbacks are called in the order of `trainer.callbacks`. A callback that needs
    none of them may derive from `lightning.pytorch.Callback`.
    """

    moves_ema_teachers: ClassVar[bool] = False
    """True if the callback updates the method's EMA teachers. A run with EMA teachers needs one."""

    runs_last: ClassVar[bool] = False
    """True if it runs after all callbacks without this flag, whatever their configured order. Set
    it to save or restore the state that the others left."""

    handles_signals: ClassVar[bool] = False
    """True if it handles SIGUSR1 and SIGTERM. Without such a callback both end the run."""

    charts: ClassVar[Layout] = {}
    """Charts added to TensorBoard's Custom Scalars tab, by category and title."""

    def before_step(self, trainer: Trainer, step: int) -> None:
        """Called on all ranks before the rollouts of optimiser step `step` are generated or read.

        An exception ends the run at this point; callbacks after this one are not called then.
        With `data.max_staleness` 1 generation of these rollouts started one step earlier.
        """

    def after_loss(self, trainer: Trainer, module: DistillationModule, batch: RolloutBatch) -> None:
        """Called on all ranks after the loss of a micro-batch, before its backward pass.

        `module.token_figures` are those of `batch`. Lightning's `on_train_batch_*` get the
        micro-batch too or, with `data.max_tokens_per_micro_batch`, a `WholeStep` of them.
        """

    def mix_at(self, step: int, mix: RolloutMix) -> RolloutMix:
        """Return the mix of authors for optimiser step `step`.

        Must be a pure function of its arguments: steps are queried in any order, and again after a
        resumption. Callbacks compose: the first gets `data.mix`, each later one the result of the
        previous one. Authors absent from `data.mix` cannot be added, because their models are not
        loaded; a share that is positive there may take any value.

        Args:
            step: Number of the optimiser step, from 0.
            mix: Mix so far.
        """
        return mix

    def on_step_back(
        self, trainer: Trainer, module: DistillationModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called after weights and optimiser were restored from `checkpoint` during a run.

        Restore here state that depends on the weights, such as those of an EMA teacher.
        """


def run_callbacks(trainer: Trainer) -> list[RunCallback]:
    """Return the callbacks of a trainer that derive from `RunCallback`, in their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, RunCallback)]
