"""Training stream with a fake engine."""

import io
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from opd_lightning.data.engines import Engines
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.order import PromptOrder
from opd_lightning.data.stream import TrainingStream
from opd_lightning.data.views import Renderer
from opd_lightning.data.writer import RolloutWriter
from opd_lightning.models.source import ModelSource
from opd_lightning.processes import Ranks
from opd_lightning.rollouts.base import Engine, Request, Sampling
from opd_lightning.timing import StepTimer
from opd_lightning.types import (
    Author,
    Completion,
    Prompt,
    Rollout,
    RolloutBatch,
    StopReason,
    WholeStep,
)
from opd_lightning.verifiers.base import Verifier

PROMPTS = [Prompt(id=str(i), messages=({"role": "user", "content": str(i)},)) for i in range(10)]
IDS = [[100 + i] for i in range(10)]


class FakeEngine(Engine):
    """Generates `seed % 5 + 1` tokens and records all calls in order.

    With a `gate` it waits for the gate to open.
    """

    def __init__(self, sleep_while_training: bool = False) -> None:
        self.sleep_while_training = sleep_while_training
        self.version = -1
        self.log: list[str] = []
        self.requests: list[Request] = []
        self.gate: threading.Event | None = None
        self.fails = False

    def start(self, source: Any, *, max_length: int) -> None:
        self.log.append("start")

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.version = version
        self.log.append(f"push {version}")

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        if self.gate is not None:
            assert self.gate.wait(10)
        if self.fails:
            raise ConnectionError("the engine is gone")
        self.log.append("generate")
        self.requests += requests
        # Responses depend on the weights.
        lengths = [r.seed % 5 + 1 for r in requests]
        return [Completion([7] * n, [-0.5 - self.version] * n, StopReason.EOS) for n in lengths]

    def sleep(self) -> None:
        self.version = -1
        self.log.append("sleep")

    def wake(self) -> None:
        self.log.append("wake")

    def close(self) -> None:
        self.log.append("close")


class FakeTokenizer:
    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return [str(len(row)) for row in rows]


class LengthVerifier(Verifier):
    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [float(int(text) > 2) for text in responses]

    def check(self, prompts: Sequence[Prompt]) -> None: ...


class Run:
    """Stream with its engine and an optimiser that only counts steps."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        micro: int = 2,
        max_tokens: int | None = None,
        per_step: int = 4,
        staleness: int = 0,
        step: int = 0,
        mix: RolloutMix = RolloutMix(),  # noqa: B008 - frozen
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        order: PromptOrder | None = None,
        limit: float = math.inf,
        teacher_samples: int = 1,
        likelihoods: Callable[[Sequence[RolloutBatch]], list[float]] = lambda batches: [],
    ) -> None:
        self.engine = engine or FakeEngine()
        self.micro = micro
        self.step = step
        self.engines = Engines(self.engine, FakeEngine(), self.push)
        for author in (Author.STUDENT, Author.TEACHER):
            self.engines.plan(author, cast(ModelSource, None), 64)
        timer = StepTimer()
        self.stream = TrainingStream(
            PROMPTS,
            IDS,
            order=order or PromptOrder(len(PROMPTS), 5),
            writer=RolloutWriter(
                self.engines.by_author,
                LengthVerifier(),
                Renderer(FakeTokenizer(), {}, {}, ()),
                timer,
            ),
            samplings={author: Sampling() for author in Author},
            before_step=lambda step: None,
            mix_at=lambda step: mix,
            prepare=lambda batches: None,
            likelihoods=likelihoods,
            now=lambda: self.step,
            limit=lambda: limit,
            engines=self.engines,
            max_staleness=staleness,
            prompts_per_step=per_step,
            samples_per_prompt=3,
            teacher_samples=teacher_samples,
            keep_best=teacher_samples > 1,
            micro_batches=micro,
            max_tokens=max_tokens,
            packed=lambda: False,
            seed=5,
            ranks=Ranks(rank=rank, world_size=world, sum=lambda n: n * world, gather=gather),
            pad_id=0,
            timer=timer,
        )

    def push(self, engine: Engine) -> None:
        if engine.version != self.step:
            engine.load_weights(self.step, [])

    def __iter__(self) -> Iterator[RolloutBatch]:
        """Iterate; the optimiser steps after the last micro-batch of a step."""
        for i, batch in enumerate(self.stream, start=1):
            assert isinstance(batch, RolloutBatch)
            self.step += i % self.micro == 0
            yield batch

    def whole_steps(self, count: int) -> list[WholeStep]:
        """The next steps of a stream with a budget."""
        taken: list[WholeStep] = []
        while len(taken) < count:
            for step in self.stream:
                assert isinstance(step, WholeStep)
                self.step += 1
                taken.append(step)
                if len(taken) == count:
                    break
        return taken

    def steps(self, count: int) -> list[RolloutBatch]:
        """Return the micro-batches of the next `count` steps."""
        taken: list[RolloutBatch] = []
        while len(taken) < count * self.micro:
            missing = count * self.micro - len(taken)
            taken += itertools.islice(self, missing)
        return taken


def rows(batches: Iterable[RolloutBatch]) -> list[tuple[str, int]]:
    return [(r.prompt.id, len(r.response_ids)) for b in batches for r in b.rollouts]


def written(batches: Iterable[RolloutBatch]) -> list[list[Rollout]]:
    """Return the rollouts by micro-batch."""
    return [list(batch.rollouts) for batch in batches]


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state after saving and loading, as Lightning loads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded
