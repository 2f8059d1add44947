"""A task of lm-eval: its requests before a run, and its figures once they are answered."""

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

if TYPE_CHECKING:
    from opd_lightning.evaluation.harness.models import Likelihood, RecordingModel
    from opd_lightning.evaluation.tasks import HarnessTask

BOOTSTRAPS = 2000  # resamples of metrics whose standard error lm-eval has no formula for


class LoadedTask:
    """A task of lm-eval whose requests are answered outside of lm-eval.

    lm-eval evaluates it once with placeholder answers, which collects all requests and finds errors
    in the task before any weights load; and again for each set of answers. The requests are the
    same every time.

    Args:
        task: Configuration of the task.
        encoder: The student's tokenizer and context length.
    """

    def __init__(self, task: HarnessTask, encoder: RequestEncoder) -> None:
        from opd_lightning.evaluation.harness.models import RecordingModel

        self.task = task
        self._loaded = library.load(task.task, task.include_path)
        self._set_examples()
        self._recorded = RecordingModel(encoder)
        figures = self._evaluate(self._recorded)
        self.metric = figures.choose(task.metric)
        self.documents = figures.documents

    @classmethod
    def prepare(cls, suite: str, task: HarnessTask, encoder: RequestEncoder) -> LoadedTask:
        """Load the task of a suite; a UserError names the suite."""
        library.check_installed()
        try:
            with library.isolated():
                return cls(task, encoder)
        except UserError as error:
            raise UserError(f"data.tasks.{suite}: {error}") from error

    @property
    def likelihood_requests(self) -> list[LikelihoodRequest]:
        """Texts whose log-likelihoods the task needs."""
        return self._recorded.likelihood_requests

    @property
    def generation_requests(self) -> list[GenerationRequest]:
        """Contexts that the task needs continuations of."""
        return self._recorded.generation_requests

    @property
    def shortened(self) -> int:
        """Number of requests whose context was truncated on the left to fit the model."""
        return self._recorded.shortened

    def grade(
        self, likelihoods: Sequence[Likelihood], generated: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        """Compute figures by name from one likelihood or list of token ids per request.

        `score` is the main metric, higher is better, and `score_low` to `score_high` its 95 %
        interval where the standard error is known; `score/<task>` are those of a group's members.
        """
        from opd_lightning.evaluation.harness.models import AnsweringModel

        decode = self._recorded.tokenizer.decode
        texts = [
            request.cut(decode(list(ids), skip_special_tokens=True))
            for request, ids in zip(self.generation_requests, generated, strict=True)
        ]
        with library.isolated():
            found = self._evaluate(AnsweringModel(self._recorded, likelihoods, texts))
        return found.judged_by(self.metric)

    def _evaluate(self, model: RecordingModel) -> Figures:
        """Run lm-eval's `evaluate` with all requests, on every process."""
        from lm_eval.evaluator import evaluate

        for one in self._loaded["tasks"].values():
            one.set_fewshot_seed(library.EXAMPLES_SEED)
        try:
            results = evaluate(
                lm=model,
                task_dict=self._loaded,
                limit=self.task.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
                apply_chat_template=self.task.apply_chat_template,
                fewshot_as_multiturn=True,
            )
        except UserError:
            raise
        except Exception as error:  # tasks may contain any code
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
