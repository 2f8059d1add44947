"""The first responses of a run, written and collated as in the run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle, islice
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from opd_lightning.data.collate import collate, count
from opd_lightning.data.micro_batches import micro_batches_within, split_by_cost
from opd_lightning.data.stream import TrainingStream
from opd_lightning.data.writer import Row
from opd_lightning.preflight.step_shape import StepShape
from opd_lightning.rollouts.base import Engine, Request, Sampling
from opd_lightning.seeding import TRAINING_SAMPLE, derive_seed
from opd_lightning.types import (
    Author,
    Completion,
    Rollout,
    RolloutBatch,
    StepTotals,
    TokenScores,
    Totals,
)

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule
    from opd_lightning.training.base import DistillationModule


class Generation(NamedTuple):
    """Duration of one call of the engine."""

    rows: int
    longest: int  # tokens of the longest response: the number of decoding steps
    seconds: float


@dataclass
class Probe:
    """A run that is set up and loaded, and a few of its responses.

    Args:
        module: Student and teachers are loaded, on the module's device.
        data: Set up for "fit".
        stream: The training stream.
        samples: Responses per kind of author.
        program: Bytes of this process before weights were loaded.
    """

    module: DistillationModule
    data: RolloutDataModule
    stream: TrainingStream
    samples: int
    program: int = 0
    generations: list[Generation] = field(default_factory=list)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def sampling(self) -> Sampling:
        return self.data.sampling

    @property
    def engine(self) -> Engine | None:
        """The student's engine; None if the run requests nothing from it."""
        return self.data.engine if self._engine_length else None

    @property
    def _engine_length(self) -> int:
        """Tokens of the longest sequence that the student's engine starts for."""
        return self.data.engines.planned_length(Author.STUDENT)

    @cached_property
    def own_sampling(self) -> Sampling:
        """Sampling of `own`, with a budget that fits the engine, for prompts cut by `_rows`.

        The engine may be too short for training prompts and responses only where suites alone
        sample.
        """
        longest = max(map(len, self.stream.prompt_ids))
        room = max(self._engine_length - longest, self._engine_length // 2)
        return replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))

    @cached_property
    def own(self) -> list[Rollout]:
        """Responses of the student, also if only validation samples: the engine is the same."""
        return self._write(Author.STUDENT)

    @cached_property
    def given(self) -> list[Rollout]:
        """Responses of the demonstrators that the run has."""
        mix = self.data.mix
        rollouts = self._write(Author.RECORDED) if mix.reads_records else []
        return rollouts + (self._write(Author.TEACHER) if mix.teacher else [])

    @property
    def trained(self) -> list[Rollout]:
        """Responses of all authors that the run trains on."""
        return [*(self.own if self.data.mix.samples else []), *self.given]

    @property
    def requests(self) -> list[Request]:
        """Requests that `own` was written for."""
        return [Request(row.prompt_ids, row.seed) for row in self._rows(Author.STUDENT)]

    @cached_property
    def shape(self) -> StepShape:
        """Sizes of a step."""
        longest = max(map(len, self.stream.prompt_ids))
        recorded = None
        if self.data.mix.reads_records:
            renderer = self.data.renderer(training=True)
            recorded = max(len(renderer.recorded(prompt)) for prompt in self.stream.prompts)
        return StepShape.of(self.data, self.stream.ranks.world_size, longest, recorded)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step; with `max_tokens`, of one with the probe's responses."""
        if self.stream.max_tokens is None:
            return self.stream.micro_batches
        rollouts = list(islice(cycle(self.trained), self.shape.rows))
        return micro_batches_within(rollouts, self.stream.max_tokens, packed=self.stream.packed())

    def generate(self, requests: list[Request], at_most: int | None = None) -> list[Completion]:
        """Time the student's engine on `requests`, with at most `at_most` tokens each."""
        assert self.engine is not None
        budget = self.own_sampling.max_new_tokens
        sampling = replace(self.own_sampling, max_new_tokens=min(budget, at_most or budget))
        began = perf_counter()
        completions = self.engine.generate(requests, sampling)
        longest = max(len(c.response_ids) for c in completions)
        self.generations.append(Generation(len(requests), longest, perf_counter() - began))
        return completions

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the seconds until the device is done to `seconds[name]`."""
        self._wait()
        began = perf_counter()
        yield
        self._wait()
        self.seconds[name] += perf_counter() - began

    def _wait(self) -> None:
        if self.module.device.type == "cuda":
            torch.cuda.synchronize(self.module.device)

    def batches(self, rollouts: list[Rollout]) -> list[RolloutBatch]:
        """Collate micro-batches no larger than the run's, on the module's device."""
        written, demonstrated = (
            Totals(*count(rollouts, demonstrated=kind)) for kind in (False, True)
        )
        totals = StepTotals(step=0, written=written, demonstrated=demonstrated)
        if self.stream.max_tokens is None:
            parts = -(-len(rollouts) // self.shape.rows_per_batch)
        else:
            parts = micro_batches_within(
                rollouts, self.stream.max_tokens, packed=self.stream.packed()
            )
        return [
            collate(
                part,
                totals=totals,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                top_k=self.sampling.top_k,
                pad_id=self.stream.pad_id,
            ).to(self.module.device)
            for part in split_by_cost(rollouts, parts, packed=self.stream.packed())
        ]

    def logprobs(self, batch: RolloutBatch) -> Tensor:
        """Compute the trainer's log-probs, `[B, R]`, as a step does."""
        return self._scores(batch).logprobs

    def _scores(self, batch: RolloutBatch) -> TokenScores:
        with self.module.trainer.precision_plugin.forward_context():
            return self.module.student.score(batch)

    @torch.no_grad()
    def gaps(self, rollouts: list[Rollout]) -> Tensor:
        """Compute |engine - trainer| of the log-probs of every response token, `[N]` nats."""
        gaps = [
            (self._scores(batch).sampled_logprobs - batch.behaviour_logprobs)[
                batch.response_mask
            ].abs()
            for batch in self.batches(rollouts)
        ]
        return torch.cat(gaps)

    def _write(self, author: Author) -> list[Rollout]:
        samplings: dict[Author, Sampling] = {**self.stream.samplings}
        if author is Author.STUDENT:
            samplings[author] = self.own_sampling
        self.stream.engines.prepare([author])
        return self.stream.writer.write(self._rows(author), samplings)

    def _rows(self, author: Author) -> list[Row]:
        """Return rows of the run's first prompts, with the run's seeds."""
        stream = self.stream
        prompt_ids = stream.prompt_ids
        if author is Author.STUDENT:
            room = self._engine_length - self.own_sampling.max_new_tokens
            prompt_ids = [ids[-room:] for ids in prompt_ids]
        per_prompt = 1 if author.is_demonstrator() else stream.samples_per_prompt
        per_prompt = min(per_prompt, self.samples)
        chosen = stream.order.take(0, self.samples // per_prompt)
        return [
            Row(
                stream.prompts[i],
                prompt_ids[i],
                position,
                author,
                derive_seed(TRAINING_SAMPLE, stream.seed, 0, position, sample),
            )
            for position, i in enumerate(chosen)
            for sample in range(per_prompt)
        ]
