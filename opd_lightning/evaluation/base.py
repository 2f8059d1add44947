"""The contract of a suite: a measurement of the student that knows itself.

`RolloutDataModule` loads every suite of a stage, asks what it needs of the engine, streams its
batches, and `EvaluatedModule` logs its scores. Neither knows the kinds of suite.
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
    """Prompts, and the token ids of each as the student sees it."""

    prompts: list[Prompt]
    ids: list[list[int]]


class EngineNeeds(NamedTuple):
    """The longest sequence that a suite asks the engine for."""

    prompt_tokens: int
    response_tokens: int


class Chart(NamedTuple):
    """The figure of a suite that TensorBoard shows first."""

    figure: str
    has_interval: bool = False  # `<figure>_low` and `<figure>_high` are logged too


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything a suite may use to load and measure.

    Attributes:
        source: The student's folder.
        template_args: Extra variables of the student's chat template.
        read: Prompts of a source, as many as there were when the run began.
        render: Token ids of a prompt as the student sees it.
        check: Raises `UserError` where a prompt does not fit: called with prompts, their ids, the
            sampling and the mix (`recorded=1` for texts that are read).
        writer: A writer of rollouts that scores with the given verifier.
        engines: The engines of the run.
        ranks: The processes of the run.
        seed: `data.seed`.
        sampling: `data.sampling`.
        verifier: `data.verifier`.
    """

    source: ModelSource
    template_args: Mapping[str, Any]
    read: Callable[[PromptSource], list[Prompt]]
    render: Callable[[Prompt], list[int]]
    check: Callable[[list[Prompt], list[list[int]], Sampling, RolloutMix], None]
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
            prompts: A prompt file, or prompts made by the suite.
            sampling: Sampling of the responses; None takes `sampling` of the bench.
            mix: `recorded=1` for texts that are read; the default for responses that are sampled.
            verifier: Verifier that must be able to score the responses.
        """
        rows = self.read(prompts) if isinstance(prompts, PromptSource) else list(prompts)
        if verifier is not None:
            verifier.check(rows)
        ids = [self.render(prompt) for prompt in rows]
        self.check(rows, ids, sampling or self.sampling, mix)
        return Loaded(rows, ids)

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
        """The student's responses to the prompts of a suite, shared out over the ranks.

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
    """A batch of a suite's stream."""

    @property
    def suite(self) -> str:
        """Name of the suite."""

    @property
    def rows(self) -> int:
        """Responses or texts in it, for the progress bar."""


class Stream(Protocol):
    """The batches of a suite on this rank; every rank has the same number."""

    @property
    def rows(self) -> int:
        """Responses or texts on this rank."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


class Reader(Protocol):
    """The student as a suite may read it: one forward pass of texts."""

    def read(
        self, texts: RolloutBatch, *, top_k: int = 0, compare_with_start: bool = False
    ) -> HeadScores:
        """Score the `N` response tokens of `texts`.

        With `compare_with_start`, `values["start"] [N]` is KL(start || student) in nats.
        """


class Scores(Metric):
    """Scores of a suite, exact over ranks: every state is summed over them."""

    full_state_update = False

    def compute_by_domain(self) -> dict[str, dict[str, Tensor]]:
        """The figures of `compute` for each domain alone; empty if there is but one.

        Collective.
        """
        return {}


@dataclass(frozen=True, kw_only=True)
class Suite(metaclass=ABCMeta):  # no base, so that a configuration may leave out `class_path`
    """A measurement of the student, and its configuration.

    A subclass is decorated with `@dataclass(frozen=True, kw_only=True)`; its fields are its
    arguments in a configuration. It implements the abstract methods. All others have defaults that
    fit a suite whose prompts the student answers: `load` returns `bench.load(...)`, `stream`
    returns `bench.responses(...)`, and `scores` returns a metric with a figure named "score".
    docs/extending.md has an example.
    """

    reads: ClassVar[bool] = False  # whether `update` may call `Reader.read`

    @abstractmethod
    def load(self, name: str, bench: Bench) -> Any:
        """Read and check what is measured, before weights load. What it returns is `loaded` below.

        Raises:
            UserError: with one line that names `name`.
        """

    @abstractmethod
    def stream(self, name: str, loaded: Any, bench: Bench) -> Stream:
        """The batches to measure, from the newest weights."""

    @abstractmethod
    def scores(self, loaded: Any) -> Scores:
        """Empty scores."""

    def update(self, scores: Any, batch: Any, reader: Reader) -> None:
        """Add a batch of `stream` to the scores."""
        scores.update(batch.rollouts, batch.answers)

    def engine_needs(self, loaded: Any, bench: Bench) -> EngineNeeds | None:
        """What the engine is asked for; None if nothing is sampled.

        The default is the longest prompt of a `Loaded` with the budget of the sampling, and None
        for suites that read or load something else.
        """
        if self.reads or not isinstance(loaded, Loaded):
            return None
        budget = (self.own_sampling or bench.sampling).max_new_tokens
        return EngineNeeds(max(map(len, loaded.ids), default=0), budget)

    def judged_by(self, verifier: Verifier | None) -> str | None:
        """The figure of `scores` by which suites are compared, larger being better.

        None if there is none. `verifier` is the run's own, `data.verifier`.
        """
        return "score"

    def chart(self, verifier: Verifier | None) -> Chart | None:
        """The figure that TensorBoard shows first."""
        figure = self.judged_by(verifier)
        return None if figure is None else Chart(figure)

    @property
    def prompt_source(self) -> PromptSource | None:
        """The prompt file that must not change while a run lasts."""
        return None

    @property
    def own_sampling(self) -> Sampling | None:
        """A sampling of its own, instead of `data.sampling`."""
        return None

    @property
    def compares_with_start(self) -> bool:
        """Whether `Reader.read` is asked for the KL from the student's start."""
        return False

    def report_row(
        self,
        loaded: Any,
        figures: Mapping[str, float],
        domains: Mapping[str, Mapping[str, float]],
        bench: Bench,
    ) -> dict[str, Any]:
        """The suite in the JSON of `opd validate`: what was measured, and its figures.

        The default is the figures of the suite, and below `domains` those of its domains.
        """
        return {**figures, "domains": dict(domains)} if domains else dict(figures)

    @classmethod
    def report_table(cls, rows: Rows) -> Table:
        """A table of the report rows of all suites of this class.

        The default has a column for every figure, and a row for every suite and domain.
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
    """An empty table; the first column, which has no title, names the row."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold", min_width=12)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
