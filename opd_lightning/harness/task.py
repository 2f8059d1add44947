"""What the configuration says of a task of lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.metrics.exam import ExamScores

if TYPE_CHECKING:
    from opd_lightning.harness.exam import Exam


@dataclass(frozen=True, kw_only=True)
class HarnessTask:
    """A task of lm-evaluation-harness, which says what to ask and how answers are graded.

    Log-likelihoods are the student's own, at temperature 1; texts are written by `data.engine`,
    greedily unless the task says otherwise, and cut at the first of the task's stop strings. What
    exceeds the student's context is cut on the left.

    Args:
        task: Its name, or that of a group with a score of its own.
        include_path: Folder of tasks of your own, looked at before those that come with the
            harness.
        limit: Take so many documents of every task; None takes all.
        num_fewshot: Examples before every question; None takes the task's own number.
        apply_chat_template: Put questions, and examples as earlier turns, into the student's chat
            template; else they are plain text.
        metric: What the suite is judged by, as it is logged; None takes `acc_norm` where the task
            has it, else the task's first.
        batch_size: Texts of a forward pass in each process.
    """

    task: str
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    metric: str | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} of a task: got {value}, expected at least {least}")

    def scores(self, loaded: Exam) -> ExamScores:
        """Empty scores of the task."""
        return ExamScores(loaded)
