"""A task as an exam: its questions before a run, its figures once they are answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd_lightning.errors import UserError
from opd_lightning.evaluation.harness import library
from opd_lightning.evaluation.harness.figures import Figures
from opd_lightning.evaluation.harness.requests import (
    GenerationRequest,
    LikelihoodRequest,
    RequestEncoder,
)
from opd_lightning.evaluation.statistics import RESAMPLES

if TYPE_CHECKING:
    from opd_lightning.evaluation.harness.models import Likelihood, RecordingModel
    from opd_lightning.evaluation.tasks import HarnessTask


class LoadedTask:
    """lm-eval's own evaluation, with the answers from elsewhere.

    It is held once with a blank sheet, which finds out all questions and whatever is wrong with the
    task before a weight loads; and again whenever there are answers. Both times it asks the same.

    Args:
        task: Which task, and how it is asked.
        reader: Whose tokens, and how many.
    """

    def __init__(self, task: HarnessTask, reader: RequestEncoder) -> None:
        from opd_lightning.evaluation.harness.models import RecordingModel

        self.task = task
        self._loaded = library.load(task.task, task.include_path)
        self._set_examples()
        self._asked = RecordingModel(reader)
        blank = self._hold(self._asked)
        self.metric = blank.choose(task.metric)
        self.documents = blank.documents

    @classmethod
    def prepare(cls, suite: str, task: HarnessTask, reader: RequestEncoder) -> LoadedTask:
        """The exam of a suite; whatever is wrong is one line that names it."""
        library.check_installed()
        try:
            with library.secluded():
                return cls(task, reader)
        except UserError as error:
            raise UserError(f"data.tasks.{suite}: {error}") from error

    @property
    def likelihood_requests(self) -> list[LikelihoodRequest]:
        """Texts whose likelihoods are asked for."""
        return self._asked.likelihood_requests

    @property
    def generation_requests(self) -> list[GenerationRequest]:
        """Texts to be gone on with."""
        return self._asked.generation_requests

    @property
    def shortened(self) -> int:
        """Questions that were cut on the left, being too long for the model."""
        return self._asked.shortened

    def grade(
        self, likelihoods: Sequence[Likelihood], written: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        """Figures by name, from an answer to every reading and the tokens of every writing.

        `score` is the metric that the task is judged by, the higher the better, and `score_low` to
        `score_high` its 95 % interval where the standard error is known; `score/<task>` are those
        of a group's members.
        """
        from opd_lightning.evaluation.harness.models import AnsweringModel

        decode = self._asked.tokenizer.decode
        texts = [
            writing.cut(decode(list(ids), skip_special_tokens=True))
            for writing, ids in zip(self.generation_requests, written, strict=True)
        ]
        with library.secluded():
            found = self._hold(AnsweringModel(self._asked, likelihoods, texts))
        return found.judged_by(self.metric)

    def _hold(self, examinee: RecordingModel) -> Figures:
        """Run lm-eval, whose every process has all questions."""
        from lm_eval.evaluator import evaluate

        for one in self._loaded["tasks"].values():
            one.set_fewshot_seed(library.EXAMPLES_SEED)
        try:
            results = evaluate(
                lm=examinee,
                task_dict=self._loaded,
                limit=self.task.limit,
                bootstrap_iters=RESAMPLES,
                log_samples=False,
                apply_chat_template=self.task.apply_chat_template,
                fewshot_as_multiturn=True,
            )
        except UserError:
            raise
        except Exception as error:  # tasks bring code of their own
            raise UserError(
                f"lm-eval cannot ask or grade {self.task.task!r}: {library.reason(error)}"
            ) from error
        assert results is not None
        return Figures.of(results, self.task.task)

    def _set_examples(self) -> None:
        given = self.task.num_fewshot
        for name, one in self._loaded["tasks"].items():
            own = one.get_config("num_fewshot")
            if given and own == 0:
                raise UserError(
                    f"num_fewshot: got {given}, but {name!r} is made for 0; leave it out"
                )
            one.set_config("num_fewshot", own or 0 if given is None else given)
