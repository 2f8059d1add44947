"""Gain of a run on its target suites and loss on all others."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from opd_lightning.errors import UserError
from opd_lightning.processes import broadcast, rank_zero_note
from opd_lightning.training.base import DistillationModule
from opd_lightning.training.callback import Layout, RunCallback

from .measurement import Measurement, check_measurable, measured_scores
from .pareto import ParetoFolder, Point, front


class CapabilityRetention(RunCallback):
    """Compares every validation with one before the first step.

    Every suite of `data.validation` or `data.texts` that is no target is an ability to be kept.
    Responses are compared by their score, texts by their mean log-likelihood in nats per token: a
    delta of -0.05 is five points of accuracy, or a perplexity that is 5 % higher. The worst ability
    has the lowest delta. Suites are measured at every validation (`trainer.val_check_interval`).

    Args:
        targets: Suites that the run should improve.
        keep_pareto: Keep the students (weights only) on the Pareto front of the mean delta of the
            targets and the delta of the worst ability, in the folder `pareto` of the run.
        lower_past: Drop of the worst ability beyond which the learning rate is lowered, once, for
            the rest of the run. None disables it.
        lower_to: Factor on the learning rate then, on top of the schedule.
        stop_past: Drop of the worst ability beyond which the run ends. None disables it.
    """

    charts: ClassVar[Layout] = {
        "What does it cost?": {
            "delta to the start, by suite": ["Multiline", ["retention/delta/"]],
            "gain on the targets, and the worst ability": [
                "Multiline",
                ["retention/(gain|worst)$"],
            ],
        }
    }

    def __init__(
        self,
        targets: list[str],
        keep_pareto: bool = True,
        lower_past: float | None = None,
        lower_to: float = 0.1,
        stop_past: float | None = None,
    ) -> None:
        for name, bound in (("lower_past", lower_past), ("stop_past", stop_past)):
            if bound is not None and bound < 0:
                raise UserError(f"CapabilityRetention.{name}: got {bound}, expected a drop, >= 0")
        if not 0 < lower_to < 1:
            raise UserError(f"CapabilityRetention.lower_to: got {lower_to}, expected one in (0, 1)")
        self.targets, self.keep_pareto = targets, keep_pareto
        self.lower_past, self.lower_to, self.stop_past = lower_past, lower_to, stop_past
        self.baseline: dict[str, float] = {}
        self.points: list[Point] = []
        self.lowered = False

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            check_measurable(self.targets, trainer.datamodule, trainer)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, module: DistillationModule) -> None:  # type: ignore[override]
        folder = self._pareto(trainer)
        if self.lowered:
            module.rate_scales["retention"] = self.lower_to
        suites = trainer.datamodule.suites_of("validate")  # type: ignore[attr-defined]
        if self.baseline and self.baseline.keys() != suites.keys():
            raise UserError(
                f"resume: the checkpoint holds the baseline of the suites {list(self.baseline)}, "
                f"the run has {list(suites)}; make them alike"
            )
        if not self.baseline:
            if folder is not None:
                again: bool = trainer.continues  # type: ignore[attr-defined]
                broadcast(lambda: folder.begin(again=again))
            _validate(trainer)
        elif folder is not None:
            self.points = broadcast(lambda: folder.present(self.points))

    def on_validation_epoch_end(self, trainer: Trainer, module: DistillationModule) -> None:  # type: ignore[override]
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        scores = measured_scores(module, trainer.datamodule)  # type: ignore[attr-defined]
        self.baseline = self.baseline or scores
        found = Measurement(
            step=trainer.global_step, start=self.baseline, scores=scores, targets=self.targets
        )
        # An interrupted validation is repeated: replace its point.
        earlier = [point for point in self.points if point.step < found.step]
        self.points = front([*earlier, Point.of(found)])
        module.derived |= found.figures()
        module.tables["retention"] = found.table()
        self._act(trainer, module, found)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        # A finished run whose last validation was interrupted repeats it without `on_train_start`.
        if (folder := self._pareto(trainer)) is not None:
            about = {"targets": self.targets, "baseline": self.baseline}
            folder.keep(trainer, self.points, about)

    def _pareto(self, trainer: Trainer) -> ParetoFolder | None:
        """Return the folder of the front if it is kept. Collective."""
        log_dir = trainer.log_dir  # a broadcast
        if not self.keep_pareto or log_dir is None:
            return None
        return ParetoFolder(Path(log_dir, "pareto"))

    def state_dict(self) -> dict[str, Any]:
        points = [asdict(point) for point in self.points]
        return {"baseline": self.baseline, "points": points, "lowered": self.lowered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.baseline, self.lowered = state["baseline"], state["lowered"]
        self.points = [Point(**point) for point in state["points"]]

    def _act(self, trainer: Trainer, module: DistillationModule, found: Measurement) -> None:
        drop = -found.retention
        prefix = f"step {found.step}: {found.worst!r} dropped by {drop:.3f}, more than"
        if self.lower_past is not None and drop > self.lower_past and not self.lowered:
            self.lowered = True
            module.rate_scales["retention"] = self.lower_to
            rank_zero_note(
                f"{prefix} {self.lower_past}: learning rate times {self.lower_to} from now"
            )
        if self.stop_past is not None and drop > self.stop_past:
            trainer.should_stop = True
            rank_zero_note(f"{prefix} {self.stop_past}: the run ends")


def _validate(trainer: Trainer) -> None:
    """Run a validation before the first step, with the fit loop's validation loop."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
