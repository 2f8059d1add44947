"""What `opd validate`, `opd test` and validation during `opd fit` measure.

Three kinds of suites: responses that the student writes, texts that it reads, and tasks of
lm-evaluation-harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.harness.task import HarnessTask
from opd_lightning.metrics.evaluation import SuiteScores
from opd_lightning.metrics.exam import ExamScores
from opd_lightning.metrics.likelihood import LikelihoodScores
from opd_lightning.rollouts.base import Sampling
from opd_lightning.types import Prompt
from opd_lightning.verifiers.base import Verifier


class Loaded(NamedTuple):
    """Prompts, and each as the student sees it."""

    prompts: list[Prompt]
    ids: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class EvaluationSuite:
    """Prompts to be answered and scored at validation.

    Args:
        prompts: Where the prompts are.
        samples: Responses per prompt.
        pass_at: The k for which pass@k is measured; None takes the powers of two from 2 to
            `samples`, and `samples`.
        batch_size: Prompts per call of the engine.
        sampling: How to draw them; None takes the training sampling.
        verifier: Scores them; None takes the DataModule's.
    """

    prompts: PromptSource
    samples: int = 1
    pass_at: list[int] | None = None
    batch_size: int = 256
    sampling: Sampling | None = None
    verifier: Verifier | None = None

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("batch_size", self.batch_size)):
            if value < 1:
                raise UserError(f"{name} of a suite: got {value}, expected at least 1")
        wrong = [k for k in self.pass_at or () if not 1 <= k <= self.samples]
        if wrong:
            raise UserError(
                f"pass_at of a suite: got {wrong[0]}, expected 1 to {self.samples}, its 'samples'"
            )

    def scores(self, loaded: Loaded) -> SuiteScores:
        """Empty scores of the suite."""
        powers = {2**i for i in range(1, self.samples.bit_length())}
        pass_at = sorted(powers | {self.samples} - {1}) if self.pass_at is None else self.pass_at
        return SuiteScores([prompt.domain for prompt in loaded.prompts], self.samples, pass_at)


@dataclass(frozen=True, kw_only=True)
class LikelihoodSuite:
    """Texts to be read at validation: the recorded responses of a file, each under its prompt.

    Nothing is sampled, so there is no noise. Tokens are weighted alike and the EOS counts as one;
    the temperature is 1.

    Args:
        prompts: Where the rows are; every one needs a `response` or `response_ids`.
        compare_with_start: Measure how far the student is from its start, too. This takes the
            start's weights: with LoRA they are there; else a copy, on the device during
            validation alone, or sharded like the student.
        batch_size: Texts of a forward pass in each process.
    """

    prompts: PromptSource
    compare_with_start: bool = True
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size of a suite: got {self.batch_size}, expected at least 1")

    def scores(self, loaded: Loaded) -> LikelihoodScores:
        """Empty scores of the suite."""
        return LikelihoodScores(self.compare_with_start)


Suite = EvaluationSuite | LikelihoodSuite | HarnessTask
Scores = SuiteScores | LikelihoodScores | ExamScores
