"""Suites of prompts that the student answers: their configuration, stream and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.evaluation.base import Bench, Chart, Loaded, Rows, Suite, new_table
from opd_lightning.evaluation.scores import SuiteScores
from opd_lightning.evaluation.stream import EvaluationStream
from opd_lightning.rollouts.base import Sampling
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
        return bench.load(self.prompts, self.sampling, verifier=self.verifier or bench.verifier)

    def stream(self, name: str, loaded: Loaded, bench: Bench) -> EvaluationStream:
        """Return the stream of responses to the prompts, with scores."""
        return bench.responses(
            name,
            loaded,
            verifier=self.verifier or bench.verifier,
            sampling=self.sampling,
            samples=self.samples,
            batch_size=self.batch_size,
        )

    def scores(self, loaded: Loaded) -> SuiteScores:
        """Return empty scores of the suite."""
        powers = {2**i for i in range(1, self.samples.bit_length())}
        pass_at = sorted(powers | {self.samples} - {1}) if self.pass_at is None else self.pass_at
        return SuiteScores([prompt.domain for prompt in loaded.prompts], self.samples, pass_at)

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
        """Return measured prompts, samples, sampling and figures, and those of `domains`."""
        sampling = asdict(self.sampling or bench.sampling)
        counts = Counter(prompt.domain for prompt in loaded.prompts)
        found = _counted(figures, counts.total())
        about = {"prompts": found.pop("prompts"), "samples": self.samples, "sampling": sampling}
        by_domain = {domain: _counted(its, counts[domain]) for domain, its in domains.items()}
        return {**about, **found, **({"domains": by_domain} if by_domain else {})}

    @classmethod
    def report_table(cls, rows: Rows) -> Table:
        """Make a table with a row for every suite and, below it, for each of its domains.

        Columns that no suite has are left out.
        """
        lines = [line for row in rows.values() for line in (row, *_domains(row).values())]
        keys = {key for line in lines for key in line}
        passes = sorted((key for key in keys if key.startswith("pass_at_")), key=_k)
        figures = ("score", *passes, "majority", "unverified", "length", "truncated")
        shown = [key for key in figures if key in keys]
        titles = {"score": ["score", "95 %"], **{key: [f"pass@{_k(key)}"] for key in passes}}
        table = new_table("prompts", *(title for key in shown for title in titles.get(key, [key])))
        for name, row in rows.items():
            table.add_section()
            several = f", n={row['samples']}" if row["samples"] > 1 else ""
            table.add_row(f"[bold]{name}[/]{several}", *_cells(row, shown))
            for domain, its in _domains(row).items():
                table.add_row(f"  {domain}", *_cells(its, shown))
        return table


def _counted(figures: Mapping[str, float], prompts: int) -> dict[str, Any]:
    """Return the figures with the number of prompts that they are means over, `prompts` or less."""
    known = {name: value for name, value in figures.items() if name != "measured"}
    return {"prompts": int(figures.get("measured", prompts)), **known}


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
