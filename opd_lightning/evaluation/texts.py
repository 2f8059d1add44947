"""Suites of texts that the student reads: their configuration, stream and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from rich.table import Table

from opd_lightning.data.collate import collate
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.writer import RolloutWriter, Row
from opd_lightning.errors import UserError
from opd_lightning.evaluation.base import Bench, Chart, Loaded, Reader, Rows, Suite, new_table
from opd_lightning.evaluation.scores import LikelihoodScores
from opd_lightning.processes import Ranks
from opd_lightning.types import Author, Prompt, RolloutBatch, StepTotals, Totals
from opd_lightning.verifiers.base import Verifier

_NO_STEP = StepTotals(step=0, written=Totals(0, 0), demonstrated=Totals(0, 0))


@dataclass(frozen=True, kw_only=True)
class LikelihoodSuite(Suite):
    """Texts that the student reads at validation: recorded responses, each under its prompt.

    Nothing is sampled, so there is no sampling noise. All tokens have the same weight, EOS
    included; the temperature is 1.

    Args:
        prompts: Source of the rows; each needs a `response` or `response_ids`.
        compare_with_start: Also measure the KL from the student's initial weights. With LoRA they
            need no copy; otherwise a copy is on the device during validation only, or sharded
            like the student.
        batch_size: Texts of a forward pass in each process.
    """

    reads: ClassVar[bool] = True
    prompts: PromptSource
    compare_with_start: bool = True
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size of a suite: got {self.batch_size}, expected at least 1")

    def load(self, name: str, bench: Bench) -> Loaded:
        """Read and check the rows."""
        return bench.load(self.prompts, mix=RolloutMix(recorded=1))

    def stream(self, name: str, loaded: Loaded, bench: Bench) -> LikelihoodStream:
        """Return a stream of the texts, padded into batches."""
        return LikelihoodStream(
            name,
            *loaded,
            writer=bench.writer(None),
            batch_size=self.batch_size,
            ranks=bench.ranks,
            pad_id=bench.source.pad_id,
        )

    def scores(self, loaded: Loaded) -> LikelihoodScores:
        """Return empty scores of the suite."""
        return LikelihoodScores(self.compare_with_start)

    def update(self, scores: LikelihoodScores, batch: LikelihoodBatch, reader: Reader) -> None:
        """Read the texts with the student and, if compared, with its initial weights."""
        found = reader.read(batch.texts, compare_with_start=self.compare_with_start)
        logprobs = found.student.logprobs
        scores.update(logprobs, found.values.get("start", torch.zeros_like(logprobs)))

    def judged_by(self, verifier: Verifier | None) -> str:
        return "log_likelihood"

    def chart(self, verifier: Verifier | None) -> Chart:
        return Chart("perplexity")

    @property
    def prompt_source(self) -> PromptSource:
        return self.prompts

    @property
    def compares_with_start(self) -> bool:
        return self.compare_with_start

    def report_row(
        self,
        loaded: Loaded,
        figures: Mapping[str, float],
        domains: Mapping[str, Mapping[str, float]],
        bench: Bench,
    ) -> dict[str, Any]:
        """Return the number of texts and the figures."""
        return {"prompts": len(loaded.prompts), **figures}

    @classmethod
    def report_table(cls, rows: Rows) -> Table:
        """Make a table with perplexity, loss and KL of every suite."""
        table = new_table("texts", "perplexity", "nats per token", "KL from the start")
        for name, row in rows.items():
            moved = f"{row['kl']:.4f}" if "kl" in row else ""
            loss = f"{-row['log_likelihood']:.4f}"
            figures = (str(row["prompts"]), f"{row['perplexity']:.4g}", loss, moved)
            table.add_row(f"[bold]{name}[/]", *figures)
        return table


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodBatch:
    """Texts of a likelihood suite, as responses under their prompts."""

    suite: str
    texts: RolloutBatch

    @property
    def rows(self) -> int:
        return sum(not rollout.dropped for rollout in self.texts.rollouts)

    def to(self, device: torch.device, **_: object) -> LikelihoodBatch:
        return replace(self, texts=self.texts.to(device))


class LikelihoodStream:
    """Batches of a suite's texts; they belong to no optimiser step."""

    def __init__(
        self,
        suite: str,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[list[int]],
        *,
        writer: RolloutWriter,
        batch_size: int,
        ranks: Ranks,
        pad_id: int,
    ) -> None:
        self.suite = suite
        self.prompts = prompts
        self.prompt_ids = prompt_ids
        self.writer = writer
        self.pad_id = pad_id
        self.mine = ranks.batches(len(prompts), batch_size)

    def __len__(self) -> int:
        """Return the number of batches, equal on all ranks."""
        return len(self.mine)

    @property
    def rows(self) -> int:
        """Texts to read on this rank."""
        return sum(map(len, self.mine))

    def __iter__(self) -> Iterator[LikelihoodBatch]:
        for chosen in self.mine:
            rows = [
                Row(self.prompts[i], self.prompt_ids[i], i, Author.RECORDED, seed=0)
                for i in chosen or [0]
            ]
            texts = self.writer.write(rows, {})
            if not chosen:  # all ranks must run a sharded model equally often
                texts = [replace(text, dropped=True) for text in texts]
            batch = collate(texts, totals=_NO_STEP, temperature=1.0, pad_id=self.pad_id)
            yield LikelihoodBatch(suite=self.suite, texts=batch)
