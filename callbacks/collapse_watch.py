"""Detection of collapsing responses: warning, stop or step back."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from lightning.pytorch import Trainer

from opd_lightning.errors import CollapseError, UserError, raised_by_all
from opd_lightning.metrics.log import write_step
from opd_lightning.processes import rank_zero_note
from opd_lightning.training.base import DistillationModule
from opd_lightning.training.callback import Layout, RunCallback

from .collapse_rules import Band, Disagreement, Entropy, Length, Repetition, Truncation
from .collapse_tracks import Track, Tracks
from .good_checkpoints import GoodCheckpoints, StepBack


class CollapseWatch(RunCallback):
    """Compares the figures of every step with their bands.

    A figure outside its band for `patience` consecutive steps is reported in one line on the
    terminal; steps without the figure do not count. Then the run continues (`warn`), ends (`stop`),
    or restores weights, optimiser and EMA teachers from a checkpoint before the collapse
    (`step_back`) and continues with a lower learning rate. The step counter is not reset: the next
    prompts are new, the schedule continues, and the log has each step once. `collapse/out_of_band`
    is the number of rules that a step breaks, `collapse/step_backs` the number of step-backs so
    far.

    Args:
        action: Action on a collapse.
        truncation: Rule for the share of truncated responses; null disables a rule.
        repetition: Rule for the share of repetitive responses.
        entropy: Rule for the student's entropy.
        length: Rule for the length of responses.
        disagreement: Rule for the distance between student and teacher, if there is a teacher.
        start_steps: Number of first steps, whose median is the start of a figure; no rule applies.
        step_back: Settings of the action `step_back`.
    """

    runs_last = True  # its checkpoints include the state of all other callbacks
    charts: ClassVar[Layout] = {
        "Do they collapse?": {
            "rules that the step breaks, step-backs so far": ["Multiline", ["collapse/"]],
        }
    }

    def __init__(
        self,
        action: Literal["warn", "stop", "step_back"] = "warn",
        truncation: Truncation | None = Truncation(),  # noqa: B008 - frozen, shown by --help
        repetition: Repetition | None = Repetition(),  # noqa: B008
        entropy: Entropy | None = Entropy(),  # noqa: B008
        length: Length | None = Length(),  # noqa: B008
        disagreement: Disagreement | None = Disagreement(),  # noqa: B008
        start_steps: int = 3,
        step_back: StepBack = StepBack(),  # noqa: B008
    ) -> None:
        rules: tuple[Band | None, ...] = (truncation, repetition, entropy, length, disagreement)
        bands = [rule for rule in rules if rule is not None]
        if not bands or start_steps < 1:
            raise UserError(
                f"CollapseWatch: got {len(bands)} rules and start_steps {start_steps}, expected at "
                "least one of each; take the callback away to watch nothing"
            )
        self.action = action
        self.tracks = Tracks(bands, start_steps)
        self.settings = step_back
        self.good = GoodCheckpoints(step_back.every_n_steps) if action == "step_back" else None
        self.step_backs = 0
        self._seen = 0  # optimiser steps made

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit" and self.good is not None:
            self.good.check(trainer)

    def on_train_start(self, trainer: Trainer, module: DistillationModule) -> None:  # type: ignore[override]
        self._seen = trainer.global_step
        self._slow_down(module)
        if self.good is not None:
            self.good.begin(trainer)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, module: DistillationModule, *_: Any
    ) -> None:
        if trainer.global_step == self._seen:  # not after every micro-batch
            return
        self._seen = trainer.global_step
        # All ranks have the same figures, hence the same result.
        self.tracks.add(module.step_figures, self._seen - 1)
        for reason in self.tracks.why_idle():
            rank_zero_note(reason)
        outside = [track for track in self.tracks.measured if track.outside]
        lost = [track for track in outside if track.is_out_of_patience]
        figures = {"collapse/out_of_band": float(len(outside))}
        if self.action == "warn":
            for track in lost:
                if track.outside == track.band.patience:  # once per departure from the band
                    rank_zero_note(f"step {self._seen - 1}: {track}; {_LOOK}")
        elif lost:
            self._act(trainer, module, lost[0])
        if self.good is not None:
            figures["collapse/step_backs"] = float(self.step_backs)
        write_step(trainer, figures, self._seen - 1)  # before the step's checkpoint
        if self.good is not None and not lost:
            self.good.note(trainer, healthy=not any(track.outside for track in self.tracks))

    def _act(self, trainer: Trainer, module: DistillationModule, track: Track) -> None:
        what, limit = f"step {self._seen - 1}: {track}", self.settings.at_most
        if self.good is None:
            before = f"resume from a checkpoint before step {track.since}"
            raise raised_by_all(CollapseError(f"{what}; {before}, and {_CHANGE}"))
        if self.step_backs == limit or not self.good.steps:
            times = f"after {limit} step-back{'s' * (limit > 1)}"
            why = times if self.good.steps else "without a good checkpoint to step back to"
            raise raised_by_all(CollapseError(f"{what}; the run ends {why}: {_CHANGE}"))
        self.step_backs += 1
        self._slow_down(module)
        step = self.good.step_back(trainer, module)
        self.tracks.reset_outside()
        rank_zero_note(
            f"{what}; back to the weights after {step} steps ({self.step_backs} of {limit}), the "
            f"learning rate times {module.rate_scales['collapse']:.3g} from here on"
        )

    def _slow_down(self, module: DistillationModule) -> None:
        module.rate_scales["collapse"] = self.settings.slow_down**self.step_backs

    def state_dict(self) -> dict[str, Any]:
        good = None if self.good is None else self.good.state_dict()
        return {"step_backs": self.step_backs, "good": good, **self.tracks.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step_backs = state["step_backs"]
        self.tracks.load_state_dict(state)
        if self.good is not None and state["good"] is not None:
            self.good.load_state_dict(state["good"])


_CHANGE = "lower the learning rate or the method's scale, or add TrustRegion to model.terms"
_LOOK = f"look at rollouts, and if they are bad, {_CHANGE}"
