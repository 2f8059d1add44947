"""Tasks of lm-evaluation-harness: their configuration, stream and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.table import Table

from opd_lightning.errors import UserError, note
from opd_lightning.evaluation.base import Bench, EngineNeeds, Reader, Rows, Suite, new_table
from opd_lightning.evaluation.harness.loaded_task import LoadedTask
from opd_lightning.evaluation.harness.requests import RequestEncoder
from opd_lightning.evaluation.scores import TaskScores, likelihoods_of
from opd_lightning.evaluation.stream import EvaluationBatch, EvaluationStream
from opd_lightning.evaluation.texts import LikelihoodBatch, LikelihoodStream
from opd_lightning.types import Prompt, TokenScores

ENGINE_BATCH = 256  # requests per call of the engine, as for other suites


@dataclass(frozen=True, kw_only=True)
class HarnessTask(Suite):
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

    reads: ClassVar[bool] = True
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

    def load(self, name: str, bench: Bench) -> LoadedTask:
        """Ask lm-eval for all requests of the task, and say how many had to be shortened."""
        encoder = RequestEncoder(
            tokenizer=bench.source.tokenizer,
            template_args=dict(bench.template_args),
            context_length=bench.source.context_length,
        )
        loaded = LoadedTask.prepare(name, self, encoder)
        if loaded.shortened and bench.ranks.rank == 0:
            asked = len(loaded.likelihood_requests) + len(loaded.generation_requests)
            note(
                f"data.tasks.{name}: {loaded.shortened} of {asked} questions are cut on the left "
                f"to fit the student's context of {encoder.context_length} tokens"
            )
        return loaded

    def stream(self, name: str, loaded: LoadedTask, bench: Bench) -> TaskStream:
        """Texts to write, then texts to read."""
        return TaskStream(name, loaded, bench, batch_size=self.batch_size)

    def scores(self, loaded: LoadedTask) -> TaskScores:
        """Empty scores of the task."""
        return TaskScores(loaded)

    def update(
        self, scores: TaskScores, batch: EvaluationBatch | LikelihoodBatch, reader: Reader
    ) -> None:
        """Add generated texts, or the likelihoods of texts that are read here."""
        if isinstance(batch, EvaluationBatch):
            scores.update(batch.rollouts)
        else:
            found = reader.read(batch.texts, top_k=1)
            tokens = TokenScores.unflatten(found.student, batch.texts)
            scores.update(batch.texts.rollouts, likelihoods_of(batch.texts, tokens))

    def engine_needs(self, loaded: LoadedTask, bench: Bench) -> EngineNeeds | None:
        """The longest context, and the longest answer; None if the task generates nothing."""
        requests = loaded.generation_requests
        if not requests:
            return None
        return EngineNeeds(
            max(len(request.context_ids) for request in requests),
            max(request.sampling.max_new_tokens for request in requests),
        )

    def report_row(
        self,
        loaded: LoadedTask,
        figures: Mapping[str, float],
        domains: Mapping[str, Mapping[str, float]],
        bench: Bench,
    ) -> dict[str, Any]:
        """The task, its documents and its metric beside the figures."""
        about = {"task": self.task, "documents": loaded.documents, "metric": loaded.metric}
        return {**about, **figures}

    @classmethod
    def report_table(cls, rows: Rows) -> Table:
        """Metric, score and interval of every task."""
        table = new_table("documents", "judged by", "score", "95 %")
        for name, row in rows.items():
            ends = f"{row['score_low']:.3f}-{row['score_high']:.3f}" if "score_low" in row else ""
            figures = (str(row["documents"]), row["metric"], f"{row['score']:.3f}", ends)
            table.add_row(f"[bold]{name}[/]", *figures)
        return table


class TaskStream:
    """The requests of a task: an `EvaluationStream` per sampling, then a `LikelihoodStream`.

    Requests are prompts that are named by their number.
    """

    def __init__(self, suite: str, task: LoadedTask, bench: Bench, *, batch_size: int) -> None:
        writer = bench.writer(None)
        self.parts: list[EvaluationStream | LikelihoodStream] = []
        for sampling in dict.fromkeys(request.sampling for request in task.generation_requests):
            requests = enumerate(task.generation_requests)
            chosen = [(i, request) for i, request in requests if request.sampling == sampling]
            generated = EvaluationStream(
                suite,
                [Prompt(id=str(i), messages=()) for i, _ in chosen],
                [request.context_ids for _, request in chosen],
                writer=writer,
                engines=bench.engines,
                sampling=sampling,
                samples=1,
                batch_size=ENGINE_BATCH,
                seed=bench.seed,
                ranks=bench.ranks,
            )
            self.parts.append(generated)
        texts = [
            Prompt(id=str(i), messages=(), response_ids=tuple(request.text_ids))
            for i, request in enumerate(task.likelihood_requests)
        ]
        read = LikelihoodStream(
            suite,
            texts,
            [request.context_ids for request in task.likelihood_requests],
            writer=writer,
            batch_size=batch_size,
            ranks=bench.ranks,
            pad_id=bench.source.pad_id,
        )
        self.parts.append(read)

    def __len__(self) -> int:
        """Batches, as many on every rank."""
        return sum(map(len, self.parts))

    @property
    def rows(self) -> int:
        """Questions to answer on this rank."""
        return sum(part.rows for part in self.parts)

    def __iter__(self) -> Iterator[EvaluationBatch | LikelihoodBatch]:
        for part in self.parts:
            yield from part
