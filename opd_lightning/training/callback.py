"""The base class of callbacks that take part in a run, and what they declare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch import Callback, Trainer

from opd_lightning.data.mix import RolloutMix

if TYPE_CHECKING:
    from opd_lightning.training.base import DistillationModule

# Category, chart, and its kind with regular expressions of tags; a "Margin" is value, low, high.
Layout = dict[str, dict[str, list[Any]]]


class RunCallback(Callback):
    """A Lightning callback with hooks and flags for what Lightning does not know of.

    Every callback of a run is called, in the order of `trainer.callbacks`. A callback that needs
    none of this may derive from `lightning.pytorch.Callback`.
    """

    moves_ema_teachers: ClassVar[bool] = False
    """Whether it moves the method's `EMATeacher`s. A run that has some needs such a callback."""

    runs_last: ClassVar[bool] = False
    """Whether it is called after the callbacks that do not set this, whatever their order in
    `trainer.callbacks`. For one that saves or restores a step as all others left it."""

    handles_signals: ClassVar[bool] = False
    """Whether it acts on SIGUSR1 and SIGTERM. Without such a callback both end the run."""

    charts: ClassVar[Layout] = {}
    """Charts that it adds to TensorBoard's Custom Scalars tab, by category and title."""

    def before_step(self, trainer: Trainer, step: int) -> None:
        """Called on all ranks before the rollouts of optimiser step `step` are written or taken.

        An exception ends the run at this point; callbacks after this one are not called then.
        With `data.max_staleness` 1 the rollouts were started a step earlier.
        """

    def mix_at(self, step: int, mix: RolloutMix) -> RolloutMix:
        """The mix of authors of optimiser step `step`.

        Must be a function of its arguments: steps are asked for in any order, and again after a
        resumption. Callbacks compose: the first is given `data.mix`, each of the others what the
        one before it returned. Authors that `data.mix` leaves out cannot be added, because nothing
        is loaded for them; a share that is positive there may take any value.

        Args:
            step: Number of the optimiser step, from 0.
            mix: Mix so far.
        """
        return mix

    def on_step_back(
        self, trainer: Trainer, module: DistillationModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called after weights and optimiser were put back to `checkpoint` in the middle of a run.

        For what a callback keeps beside them, such as a teacher that follows the student.
        """


def run_callbacks(trainer: Trainer) -> list[RunCallback]:
    """The callbacks of a trainer that derive from `RunCallback`, in their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, RunCallback)]
