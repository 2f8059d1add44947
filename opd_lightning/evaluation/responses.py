"""Suites of prompts that the student answers: their configuration, stream and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from opd_lightning.data.engines import Engines
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.writer import RolloutWriter, Row
from opd_lightning.errors import UserError
from opd_lightning.evaluation.base import Bench, Chart, EngineNeeds, Loaded, Rows, Suite, new_table
from opd_lightning.evaluation.scores import SuiteScores
from opd_lightning.processes import Ranks
from opd_lightning.rollouts.base import Sampling
from opd_lightning.seeding import EVALUATION_SAMPLE, derive_seed
from opd_lightning.types import Author, Prompt, Rollout
from opd_lightning.verifiers.base import Verifier


@dataclass(frozen=True, kw_only=True)
class EvaluationSuite(Suite):
    """Prompts that the student answers at validation, and whose responses are scored.

    Args:
        prompts: Source of the prompts.
        samples: Responses per prompt.
        pass_at: Values of k for pass@k; None uses the powers of two from 2 to `samples`, and
            `samples`.
        batch_size: Prompts per call of the engine.
        sampling: Sampling of the responses; None uses the training sampling.
        verifier: Scores the responses; None uses the DataModule's.
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

    def load(self, name: str, bench: Bench) -> Loaded:
        """Read and check the prompts."""
        sampling = self.sampling or bench.sampling
        return bench.load(self.prompts, sampling, RolloutMix(), self.verifier or bench.verifier)

    def stream(self, name: str, loaded: Loaded, bench: Bench) -> EvaluationStream:
        """Return a stream of scored responses to the prompts."""
        return EvaluationStream(
            name,
            *loaded,
            writer=bench.writer(self.verifier or bench.verifier),
            engines=bench.engines,
            sampling=self.sampling or bench.sampling,
            samples=self.samples,
            batch_size=self.batch_size,
            seed=bench.seed,
            ranks=bench.ranks,
        )

    def scores(self, loaded: Loaded) -> SuiteScores:
        """Return empty scores of the suite."""
        powers = {2**i for i in range(1, self.samples.bit_length())}
        pass_at = sorted(powers | {self.samples} - {1}) if self.pass_at is None else self.pass_at
        return SuiteScores([prompt.domain for prompt in loaded.prompts], self.samples, pass_at)

    def engine_needs(self, loaded: Loaded, bench: Bench) -> EngineNeeds:
        """Return the length of the longest prompt and the sampling's `max_new_tokens`."""
        budget = (self.sampling or bench.sampling).max_new_tokens
        return EngineNeeds(max(map(len, loaded.ids), default=0), budget)

    def judged_by(self, verifier: Verifier | None) -> str | None:
        """Return "score"; None without a verifier."""
        return "score" if self.verifier or verifier else None

    def chart(self, verifier: Verifier | None) -> Chart | None:
        """Return a chart of the score and its interval."""
        figure = self.judged_by(verifier)
        return None if figure is None else Chart(figure, has_interval=True)

    @property
    def prompt_source(self) -> PromptSource:
        return self.prompts

    @property
    def own_sampling(self) -> Sampling | None:
        return self.sampling

    def report_row(
        self,
        loaded: Loaded,
        figures: Mapping[str, float],
        domains: Mapping[str, Mapping[str, float]],
        bench: Bench,
    ) -> dict[str, Any]:
        """Return prompts, samples, sampling and figures, and the domains under `domains`."""
        prompts = loaded.prompts
        sampling = asdict(self.sampling or bench.sampling)
        row = {"prompts": len(prompts), "samples": self.samples, "sampling": sampling, **figures}
        by_domain = {
            domain: {"prompts": sum(prompt.domain == domain for prompt in prompts), **its}
            for domain, its in domains.items()
        }
        return row | ({"domains": by_domain} if by_domain else {})

    @classmethod
    def report_table(cls, rows: Rows) -> Table:
        """Make a table with a row for every suite and, below it, for each of its domains."""
        return _table(rows)


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
    """Batches of scored rollouts of a suite's prompts, by the newest weights."""

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
        """Return the number of batches, equal on all ranks; the last may be empty here."""
        return len(self.mine)

    @property
    def rows(self) -> int:
        """Responses to write on this rank."""
        return sum(map(len, self.mine)) * self.samples

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for chosen in self.mine:
            rows = [
                Row(
                    self.prompts[i],
                    self.prompt_ids[i],
                    i,
                    Author.STUDENT,
                    # Independent of the training step: two evaluations of the same weights
                    # agree, and differences between steps are paired.
                    derive_seed(EVALUATION_SAMPLE, self.seed, i, sample),
                )
                for i in chosen
                for sample in range(self.samples)
            ]
            self.engines.prepare([Author.STUDENT])  # on all ranks: weights may be sharded
            rollouts = self.writer.write(rows, {Author.STUDENT: self.sampling}) if rows else []
            yield EvaluationBatch(
                suite=self.suite, rollouts=tuple(rollouts), answers=self._answers(rollouts)
            )

    def _answers(self, rollouts: Sequence[Rollout]) -> tuple[str | None, ...] | None:
        """Extract answers for the majority vote; None without several samples or a verifier."""
        verifier = self.writer.verifier
        if self.samples == 1 or verifier is None:
            return None
        answers = verifier.answers([rollout.text for rollout in rollouts])
        return None if answers is None else tuple(answers)


def _table(suites: Rows) -> Table:
    """Make the table, without columns that no suite has."""
    rows = [row for suite in suites.values() for row in (suite, *_domains(suite).values())]
    keys = {key for row in rows for key in row}
    passes = sorted((key for key in keys if key.startswith("pass_at_")), key=_k)
    shown = [key for key in ("score", *passes, "majority", "length", "truncated") if key in keys]
    titles = {"score": ["score", "95 %"], **{key: [f"pass@{_k(key)}"] for key in passes}}
    table = new_table("prompts", *(title for key in shown for title in titles.get(key, [key])))
    for name, suite in suites.items():
        table.add_section()
        several = f", n={suite['samples']}" if suite["samples"] > 1 else ""
        table.add_row(f"[bold]{name}[/]{several}", *_cells(suite, shown))
        for domain, row in _domains(suite).items():
            table.add_row(f"  {domain}", *_cells(row, shown))
    return table


def _cells(row: Mapping[str, Any], shown: list[str]) -> list[str]:
    cells = [str(row["prompts"])]
    for key in shown:
        value = row.get(key)
        form = ".1f" if key == "length" else ".3f"
        cells.append("" if value is None else format(value, form))
        if key == "score":
            known = value is not None
            cells.append(f"{row['score_low']:.3f}-{row['score_high']:.3f}" if known else "")
    return cells


def _domains(suite: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = suite.get("domains", {})
    return found


def _k(key: str) -> int:
    return int(key.removeprefix("pass_at_"))
