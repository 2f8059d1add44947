"""Likelihood suites as a stream of micro-batches of recorded texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from opd_lightning.data.collate import collate
from opd_lightning.data.ranks import Ranks
from opd_lightning.data.writer import RolloutWriter, Row
from opd_lightning.types import Author, Prompt, RolloutBatch, StepTotals, Totals

_NO_STEP = StepTotals(step=0, written=Totals(0, 0), demonstrated=Totals(0, 0))


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
    """The texts of a suite, a batch at a time; they belong to no optimiser step."""

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
        """Batches, as many on every rank."""
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
            if not chosen:  # a sharded model is read by all ranks equally often
                texts = [replace(text, dropped=True) for text in texts]
            batch = collate(texts, totals=_NO_STEP, temperature=1.0, pad_id=self.pad_id)
            yield LikelihoodBatch(suite=self.suite, texts=batch)
