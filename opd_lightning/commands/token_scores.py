"""Token log-probs of student and teacher for responses outside training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from opd_lightning.data.collate import collate
from opd_lightning.data.views import Renderer
from opd_lightning.errors import UserError, note
from opd_lightning.run.model_checks import context_of
from opd_lightning.teachers.base import Ask
from opd_lightning.teachers.cached import CachedTeacher
from opd_lightning.training.scoring import prefetch_scores, score_batch
from opd_lightning.types import Prompt, Rollout, RolloutBatch, StepTotals, Totals

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule

LOG_RATIO, TEACHER, STUDENT = "log_ratio", "teacher", "student"  # names of token figures


class TokenScorer:
    """Scores responses with the student and, if the method has one, the teacher named "teacher".

    Both use the run's training temperature, so that their difference is the d_t of training,
    regardless of how the responses were sampled.

    Args:
        module: Method with student and teacher.
        data: Data module with the views and the temperature.
        prompt: First prompt whose responses will be scored. If it lacks a field that the teacher's
            view reads, the teacher is not used, and a note is printed.
    """

    def __init__(self, module: DistillationModule, data: RolloutDataModule, prompt: Prompt) -> None:
        data.sampling.check_temperature()
        self.module = module
        self.data = data
        self.ask = self._ask(prompt)

    def _ask(self, prompt: Prompt) -> Ask | None:
        ask = self.module.all_asks().get(TEACHER)
        if ask is None:
            return None
        if isinstance(ask.teacher, CachedTeacher):  # it has scores of recorded responses only
            ask = Ask(ask.teacher.teacher, ask.view)
        if ask.view == "student":
            return ask
        if ask.view not in self.data.views:
            raise UserError(
                f"data.views: got {', '.join(sorted(self.data.views))}, but the teacher reads the "
                f"view {ask.view!r}; add its template"
            )
        read = self.data.views[ask.view].variables
        lacks = [n for n in ("privileged", "answer") if n in read and getattr(prompt, n) is None]
        if lacks:
            given = " and ".join(f"--{name}" for name in lacks)
            note(
                f"the teacher is not asked, because its view {ask.view!r} reads more: give {given}"
            )
            return None
        return ask

    @property
    def legend(self) -> str:
        """Description of the token colours."""
        if self.ask is None:
            return "by the student's own log-prob: the redder, the less likely"
        source = self.ask.teacher.source or self.module.student.source
        return (
            f"by log pi_T - log pi_S of the teacher {source.path}: it likes the blue ones more "
            "than the student does, the red ones less"
        )

    def renderer(self) -> Renderer:
        """Return a renderer of the student's prompts and of the teacher's view."""
        source = self.module.student.source
        names = {self.ask.view} - {"student"} if self.ask is not None else set()
        views = {name: self.data.views[name] for name in names}
        bound = context_of(self.module) if views else None
        return Renderer(source.tokenizer, self.data.template_args, views, source.eos_ids, bound)

    def check(self, prompt: Prompt) -> None:
        """Raise UserError if the teacher cannot score the prompt. Needs no weights."""
        if self.ask is not None:
            self.ask.teacher.check([prompt], self.data.sampling.temperature)

    def load(self, device: torch.device) -> None:
        """Load the teacher. The student must be loaded."""
        if self.ask is not None:
            self.ask.teacher.load(device, self.module.student)

    def close(self) -> None:
        if self.ask is not None:
            self.ask.teacher.close()

    @torch.no_grad()
    def figures(self, rollouts: Sequence[Rollout]) -> list[dict[str, list[float]]]:
        """Return per rollout the token figures in nats, by name. The first sets the colours."""
        batches = [self._collate(rollout).to(self.module.device) for rollout in rollouts]
        asks = {} if self.ask is None else {TEACHER: self.ask}
        for batch in batches:
            prefetch_scores(asks, {}, batch, top_k=0)
        found = [self._figures(batch, asks) for batch in batches]
        for ask in asks.values():
            ask.teacher.release()
        return found

    def _figures(self, batch: RolloutBatch, asks: dict[str, Ask]) -> dict[str, list[float]]:
        # Rows without the view, such as one that shows a peer's success, have no teacher scores.
        known = {n: ask for n, ask in asks.items() if bool(batch.views[ask.view].available)}
        with self.module.trainer.precision_plugin.forward_context():
            scored = score_batch(
                self.module.student,
                batch,
                asks=known,
                comparisons={},
                known={},
                top_k=0,
                timer=self.module.timer,
            ).scored
        figures = {STUDENT: scored.student.logprobs}
        if known:
            figures = {LOG_RATIO: scored.log_ratio, **figures, TEACHER: scored.teacher.logprobs}
        return {name: values[0].float().tolist() for name, values in figures.items()}

    def _collate(self, rollout: Rollout) -> RolloutBatch:
        totals = Totals(len(rollout.response_ids), 1)
        return collate(
            [rollout],
            totals=StepTotals(step=0, written=totals, demonstrated=Totals(0, 0)),
            temperature=self.data.sampling.temperature,
            pad_id=self.module.student.source.pad_id,
        )
