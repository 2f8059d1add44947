"""Stream of a suite whose prompts the student answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opd_lightning.data.engines import Engines
from opd_lightning.data.writer import RolloutWriter, Row
from opd_lightning.processes import Ranks
from opd_lightning.rollouts.base import Sampling
from opd_lightning.seeding import EVALUATION_SAMPLE, derive_seed
from opd_lightning.types import Author, Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationBatch:
    """Scored rollouts of an evaluation suite."""

    suite: str
    rollouts: tuple[Rollout, ...]  # all samples of a prompt in one batch
    answers: tuple[str | None, ...] | None  # extracted answers; None if they cannot be extracted

    @property
    def rows(self) -> int:
        return len(self.rollouts)

    def to(self, *_: object, **__: object) -> EvaluationBatch:
        """Return the batch itself: it has no tensors."""
        return self


class EvaluationStream:
    """Batches of scored rollouts for a suite's prompts, generated with the current weights."""

    def __init__(
        self,
        suite: str,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[list[int]],
        *,
        writer: RolloutWriter,
        engines: Engines,
        sampling: Sampling,
        samples: int,
        batch_size: int,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self.suite = suite
        self.prompts = prompts
        self.prompt_ids = prompt_ids
        self.writer = writer
        self.engines = engines
        self.sampling = sampling
        self.samples = samples
        self.seed = seed
        self.mine = ranks.batches(len(prompts), batch_size)

    def __len__(self) -> int:
        """Return the number of batches, equal on all ranks; the last may be empty."""
        return len(self.mine)

    @property
    def rows(self) -> int:
        """Number of responses to generate on this rank."""
        return sum(map(len, self.mine)) * self.samples

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for chosen in self.mine:
            rows = [
                Row(
                    self.prompts[i],
                    self.prompt_ids[i],
                    i,
                    Author.STUDENT,
                    # Independent of the training step: evaluations of the same weights agree,
                    # and differences between steps are paired.
                    derive_seed(EVALUATION_SAMPLE, self.seed, i, sample),
                )
                for i in chosen
                for sample in range(self.samples)
            ]
            self.engines.prepare([Author.STUDENT])  # on all ranks, whose weights may be sharded
            rollouts = self.writer.write(rows, {Author.STUDENT: self.sampling}) if rows else []
            yield EvaluationBatch(
                suite=self.suite, rollouts=tuple(rollouts), answers=self._answers(rollouts)
            )

    def _answers(self, rollouts: Sequence[Rollout]) -> tuple[str | None, ...] | None:
        """Extract answers for majority votes; None with one sample or without a verifier."""
        verifier = self.writer.verifier
        if self.samples == 1 or verifier is None:
            return None
        answers = verifier.answers([rollout.text for rollout in rollouts])
        return None if answers is None else tuple(answers)
