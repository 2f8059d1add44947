"""Interface of evaluation suites.

`RolloutDataModule` loads every suite of a stage, queries its `engine_length` and streams its
batches. `EvaluatedModule` logs its scores. Neither depends on the class of a suite.
"""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.data.engines import Engines
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.row_checks import RowChecks
from opd_lightning.data.writer import RolloutWriter
from opd_lightning.evaluation.stream import EvaluationStream
from opd_lightning.models.head import HeadScores
from opd_lightning.models.source import ModelSource
from opd_lightning.processes import Ranks
from opd_lightning.rollouts.base import Sampling
from opd_lightning.types import Prompt, RolloutBatch
from opd_lightning.verifiers.base import Verifier

Rows = Mapping[str, Mapping[str, Any]]  # report rows by suite


class Loaded(NamedTuple):
    """Prompts of a suite and the token ids of each under the student's chat template."""

    prompts: list[Prompt]
    ids: list[list[int]]


class Chart(NamedTuple):
    """Figure of a suite that TensorBoard shows first."""

    figure: str
    has_interval: bool = False  # `<figure>_low` and `<figure>_high` are logged too


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Resources for loading and measuring suites.

    Attributes:
        source: The student's folder.
        template_args: Extra variables of the student's chat template.
        read: Returns the prompts that a source had when the run began and that pass the checks.
        checks: Returns the checks of prompts, for a verifier or None, a sampling and a mix.
        writer: Returns a writer of rollouts that scores with the given verifier.
        engines: The engines of the run.
        ranks: The processes of the run.
        seed: `data.seed`.
        sampling: `data.sampling`.
        verifier: `data.verifier`.
    """

    source: ModelSource
    template_args: Mapping[str, Any]
    read: Callable[[PromptSource, RowChecks], list[Prompt]]
    checks: Callable[[Verifier | None, Sampling, RolloutMix], RowChecks]
    writer: Callable[[Verifier | None], RolloutWriter]
    engines: Engines
    ranks: Ranks
    seed: int
    sampling: Sampling
    verifier: Verifier | None

    def load(
        self,
        prompts: PromptSource | Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        mix: RolloutMix = RolloutMix(),  # noqa: B008 - frozen
        verifier: Verifier | None = None,
    ) -> Loaded:
        """Read, render and check the prompts of a suite.

        Args:
            prompts: Prompt file, or prompts made by the suite.
            sampling: Sampling of the responses; None takes `sampling` of the bench.
            mix: `recorded=1` for texts that are only scored; the default for sampled responses.
            verifier: Verifier that must be able to score the responses.
        """
        checks = self.checks(verifier, sampling or self.sampling, mix)
        if isinstance(prompts, PromptSource):
            rows = self.read(prompts, checks)
            return Loaded(rows, checks.ids_of(rows))
        return Loaded(list(prompts), checks.run(prompts))

    def responses(
        self,
        name: str,
        loaded: Loaded,
        *,
        verifier: Verifier | None,
        sampling: Sampling | None = None,
        samples: int = 1,
        batch_size: int = 256,
    ) -> EvaluationStream:
        """Return a stream of the student's responses to a suite's prompts, split over ranks.

        Args:
            name: Name of the suite.
            loaded: Prompts of the suite.
            verifier: Scores the responses; None leaves rewards NaN.
            sampling: Sampling of the responses; None takes `sampling` of the bench.
            samples: Responses per prompt.
            batch_size: Prompts per call of the engine.
        """
        return EvaluationStream(
            name,
            *loaded,
            writer=self.writer(verifier),
            engines=self.engines,
            sampling=sampling or self.sampling,
            samples=samples,
            batch_size=batch_size,
            seed=self.seed,
            ranks=self.ranks,
        )


class Batch(Protocol):
    """Batch of a suite's stream."""

    @property
    def suite(self) -> str:
        """Name of the suite."""

    @property
    def rows(self) -> int:
        """Number of responses or texts in the batch, for the progress bar."""


class Stream(Protocol):
    """Batches of a suite on this rank; every rank has the same number."""

    @property
    def rows(self) -> int:
        """Number of responses or texts on this rank."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Reader(Protocol):
    """Forward pass of the student for suites."""

    def read(
        self, texts: RolloutBatch, *, top_k: int = 0, compare_with_start: bool = False
    ) -> HeadScores:
        """Score the `N` response tokens of `texts`.

        With `compare_with_start`, `values["start"] [N]` is KL(start || student) in nats.
        """


class Scores(Metric):
    """Scores of a suite, exact over ranks: every state is a sum over ranks."""

    full_state_update = False

    def compute_by_domain(self) -> dict[str, dict[str, Tensor]]:
        """Return the figures of `compute` for each domain; empty if there is only one.

        Collective.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class Suite(metaclass=ABCMeta):  # not ABC, so that a configuration may omit `class_path`
    """Base class of evaluation suites. Its fields are the configuration of a suite.

    A subclass is decorated with `@dataclass(frozen=True, kw_only=True)`; its fields are its
    arguments in a configuration. It implements the abstract methods. All others have defaults that
    fit a suite whose prompts the student answers: `load` returns `bench.load(...)`, `stream`
    returns `bench.responses(...)`, and `scores` returns a metric with a figure named "score".
    docs/extending.md has an example.
    """

    reads: ClassVar[bool] = False  # whether `update` may call `Reader.read`
    is_whole: ClassVar[bool] = False  # whether its scores need all batches of the stream

    @abstractmethod
    def load(self, name: str, bench: Bench) -> Any:
        """Read and check the data, before weights load.

        The return value is passed to the other methods as `loaded`.

        Raises:
            UserError: The data does not fit; the message is one line with `name` in it.
        """

    @abstractmethod
    def stream(self, name: str, loaded: Any, bench: Bench) -> Stream:
        """Return the batches to measure, generated with the current weights."""

    @abstractmethod
    def scores(self, loaded: Any) -> Scores:
        """Return a metric without updates."""

    def update(self, scores: Any, batch: Any, reader: Reader) -> None:
        """Add a batch of `stream` to the scores."""
        scores.update(batch.rollouts, batch.answers)

    def engine_length(self, loaded: Any, bench: Bench) -> int | None:
        """Return the tokens of the longest prompt with its response; None if nothing is sampled.

        The default is the longest prompt of a `Loaded` plus `max_new_tokens` of the sampling, and
        None for suites that use a `Reader` or load something else.
        """
        if self.reads or not isinstance(loaded, Loaded):
            return None
        budget = (self.own_sampling or bench.sampling).max_new_tokens
        return max(map(len, loaded.ids), default=0) + budget

    def judged_by(self, verifier: Verifier | None) -> str | None:
        """Return the name of the figure by which the suite is judged, larger being better.

        None if there is none. `verifier` is `data.verifier`.
        """
        return "score"

    def chart(self, verifier: Verifier | None) -> Chart | None:
        """Return the figure that TensorBoard shows first."""
        figure = self.judged_by(verifier)
        return None if figure is None else Chart(figure)

    @property
    def prompt_source(self) -> PromptSource | None:
        """Prompt file that must not change during a run."""
        return None

    @property
    def own_sampling(self) -> Sampling | None:
        """Sampling of the suite's responses; None takes `data.sampling`."""
        return None

    @property
    def compares_with_start(self) -> bool:
        """Return whether the suite calls `Reader.read` with `compare_with_start`."""
        return False

    def report_row(
        self,
        loaded: Any,
        figures: Mapping[str, float],
        domains: Mapping[str, Mapping[str, float]],
        bench: Bench,
    ) -> dict[str, Any]:
        """Return the suite's entry in the JSON of `opd validate`.

        The default is the figures of the suite and, under `domains`, those of its domains.
        """
        return {**figures, "domains": dict(domains)} if domains else dict(figures)

    @classmethod
    def report_table(cls, rows: Rows) -> Table:
        """Return a table of the report rows of all suites of this class.

        The default has a column for every figure and a row for every suite and domain.
        """
        titled = [
            line
            for name, row in rows.items()
            for line in (
                (f"[bold]{name}[/]", row),
                *((f"  {domain}", its) for domain, its in row.get("domains", {}).items()),
            )
        ]
        columns = list(dict.fromkeys(key for _, row in titled for key in row if key != "domains"))
        table = new_table(*columns)
        for title, row in titled:
            cells = (row.get(key, "") for key in columns)
            texts = (f"{x:.3f}" if isinstance(x, float) else str(x) for x in cells)
            table.add_row(title, *texts)
        return table


def new_table(*columns: str) -> Table:
    """Return an empty table with an untitled first column for row names."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold", min_width=12)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
