"""The training phase of a step on models built from configs: seconds, memory and operations.

Runs `Trainer.fit` of Lightning with the project's method, student and teacher: autocast,
accumulation, gradient norm, checks of loss and weights, metrics, AdamW. Excluded are earlier stages
(prompts, generation, verifier, collation, weight push), loggers and checkpoints. Micro-batches are
random tokens, collated in advance.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.head import meters
from opd_lightning.data.collate import collate
from opd_lightning.data.micro_batches import split_by_cost
from opd_lightning.methods import OPD
from opd_lightning.models.compilation import compile_layers
from opd_lightning.models.packing import Packing
from opd_lightning.models.student import Student
from opd_lightning.preflight.layout import Layout
from opd_lightning.preflight.memory import process_memory
from opd_lightning.preflight.operations import forward_operations
from opd_lightning.preflight.plan import Plan, TeacherModel
from opd_lightning.preflight.widths import Widths
from opd_lightning.rollouts.base import Sampling
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.timing import StepTimer
from opd_lightning.types import (
    Author,
    Prompt,
    Rollout,
    RolloutBatch,
    StepTotals,
    StopReason,
    Totals,
)

STAGES = ("teacher", "student", "backward", "optimizer", "log")
GIB = 2**30


@dataclass(frozen=True)
class Repeats:
    """Numbers of optimiser steps, by kind of measurement."""

    warm_up: int = 2
    whole: int = 5  # timed as a whole
    stages: int = 3  # timed by stage, with a device synchronisation at each boundary


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training phase to measure.

    Args:
        student: Folder of the student's config.json.
        teacher: Folder of the teacher's config.json.
        length: Tokens of the longest sequence, prompt and response.
        prompt: Tokens of every prompt.
        rows: Sequences of a micro-batch, on average.
        micro_batches: Micro-batches of a step.
        layout: "full": all responses are as long as the longest. "padded": their lengths are
            uniform from 1/8 to all of it, micro-batches are split by cost and their rows padded on
            the right. "packed": these lengths, in one row without padding.
        attention: transformers' attention kernel of student and teacher; None for its default.
        checkpointing: Whether activations are recomputed in the backward pass.
        compiled: torch.compile's backend for the decoder layers of student and teacher, one by one
            (regional compilation: all layers of a model share their code); "" compiles nothing.
        device: "cuda" or "cpu".
    """

    student: Path
    teacher: Path
    length: int
    prompt: int
    rows: int
    micro_batches: int = 2
    layout: str = "padded"
    attention: str | None = None
    checkpointing: bool = False
    compiled: str = ""
    device: str = "cuda"


@contextmanager
def random_weights(device: str) -> Iterator[None]:
    """Initialise models randomly on `device` instead of loading weights.

    Folders need config.json only. Folders of one name get equal weights.
    """

    def draw(path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        how = {name: options[name] for name in ("dtype", "attn_implementation")}
        torch.manual_seed(zlib.crc32(Path(path).name.encode()))
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), **how)
        return model.eval(), {}

    with patch.object(AutoModelForCausalLM, "from_pretrained", draw):
        yield


def micro_batches_of(case: Case, vocabulary: int) -> list[RolloutBatch]:
    """Return the micro-batches of one step, split as in a run."""
    draw = random.Random(0)
    longest = case.length - case.prompt
    shortest = longest if case.layout == "full" else max(1, longest // 8)
    count = case.rows * case.micro_batches
    lengths = [longest, *(draw.randint(shortest, longest) for _ in range(count - 1))]

    def tokens(count: int) -> list[int]:
        return [draw.randrange(1, vocabulary) for _ in range(count)]

    rollouts = [random_rollout(tokens(case.prompt), tokens(n), [-1.0] * n) for n in lengths]
    written = Totals(sum(lengths), count)
    totals = StepTotals(step=0, written=written, demonstrated=Totals(0, 0))
    return [
        collate(part, totals=totals, temperature=1.0, pad_id=0)
        for part in split_by_cost(rollouts, case.micro_batches, packed=case.layout == "packed")
    ]


def random_rollout(prompt: list[int], response: list[int], logprobs: list[float]) -> Rollout:
    """Return a rollout of the student without text and reward.

    Args:
        prompt: `[P]` token ids.
        response: `[T]` token ids.
        logprobs: `[T]` nats, the sampler's.
    """
    return Rollout(
        prompt=Prompt(id="random", messages=({"role": "user", "content": ""},)),
        prompt_ids=prompt,
        views={},
        group=0,
        response_ids=response,
        behaviour_logprobs=logprobs,
        stop_reason=StopReason.LENGTH,
        text="",
        reward=0.0,
        group_mean=0.0,
        group_std=0.0,
        author=Author.STUDENT,
        dropped=False,
        policy_version=0,
    )


class Loader:
    """Data loader of a list; Lightning would treat a plain list as several loaders."""

    def __init__(self, batches: list[RolloutBatch]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[RolloutBatch]:
        return iter(self._batches)


class CollatedSteps(LightningDataModule):
    """Data module that repeats the same micro-batches in every step."""

    def __init__(self, batches: Sequence[RolloutBatch], steps: int) -> None:
        super().__init__()
        self.sampling = Sampling(max_new_tokens=batches[0].response_ids.shape[1])
        self._steps = [
            replace(batch, totals=replace(batch.totals, step=step))
            for step in range(steps)
            for batch in batches
        ]

    def train_dataloader(self) -> Loader:
        return Loader(self._steps)

    def compares_with_start(self, stage: str) -> bool:
        return False


class WaitingTimer(StepTimer):
    """Timer that synchronises with the device at stage boundaries while `waits` is set."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.waits = False
        self._clock = clock

    def start(self, name: str) -> None:
        self._wait()
        super().start(name)

    def stop(self, name: str) -> None:
        self._wait()
        super().stop(name)

    def _wait(self) -> None:
        if self.waits:
            self._clock()


class StepTimes(Callback):
    """Measures the seconds of steps: first of whole steps, then of their stages."""

    def __init__(self, repeats: Repeats, device: str) -> None:
        self.clock, self.held_now, self.peak = meters(device)
        self.whole: list[float] = []
        self.stages: list[dict[str, float]] = []
        self.held = 0  # bytes allocated between two steps
        self._repeats = repeats
        self._began = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            module.timer.waits = trainer.global_step >= self._repeats.warm_up + self._repeats.whole
            self._began = self.clock()
            module.timer.next_step()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        seconds = self.clock() - self._began
        module.timer.next_step()  # ends this one
        if module.timer.waits:
            self.stages.append(module.timer.last)
        elif trainer.global_step > self._repeats.warm_up:
            self.whole.append(seconds)
        self.held = self.held_now()


def measure(case: Case, repeats: Repeats, peak_operations: float) -> dict[str, Any]:
    """Run and measure the training phase.

    Returns:
        Seconds of a step and of its stages (median; smallest and largest of the whole step), MFU,
        tokens per second and bytes, with the quantities that they are computed from.
    """
    times = StepTimes(repeats, case.device)
    packing: Packing = "on" if case.layout == "packed" else "off"
    kernel: dict[str, Any] = {"attn_implementation": case.attention, "packing": packing}
    student = Student(str(case.student), gradient_checkpointing=case.checkpointing, **kernel)
    teacher = FrozenTeacher(str(case.teacher), dtype="bfloat16", **kernel)
    with random_weights(case.device):
        student.load()
        teacher.load(torch.device(case.device), student)
    if case.compiled:
        for lm in (student.model, teacher.model()):
            compile_layers(lm, case.compiled)
    module = OPD(student, teacher, max_logprob_gap=torch.inf)  # random log-probs
    module.timer = WaitingTimer(times.clock)
    batches = micro_batches_of(case, student.source.config.vocab_size)
    steps = repeats.warm_up + repeats.whole + repeats.stages
    trainer = Trainer(
        accelerator="gpu" if case.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=case.micro_batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[times],
    )
    # Otherwise layers beyond the recompilation limit would run uncompiled without an error.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        trainer.fit(module, datamodule=CollatedSteps(batches, steps))
    peak = times.peak()
    lengths = [int(n) for b in batches for n in b.views["student"].attention_mask.sum(1)]
    places = sum(batch.views["student"].input_ids.numel() for batch in batches)
    if case.layout == "packed":
        places = sum(lengths)
    return {
        **_figures(case, times, lengths, batches, places, peak_operations),
        "peak_gib": peak / GIB,
        "held_gib": times.held / GIB,
        "predicted_gib": predicted_bytes(case, batches, module, trainer) / GIB,
    }


def _figures(
    case: Case,
    times: StepTimes,
    lengths: Sequence[int],
    batches: Sequence[RolloutBatch],
    places: int,
    peak_operations: float,
) -> dict[str, Any]:
    read = sum(int(batch.response_mask.sum()) for batch in batches)
    student, teacher = (
        forward_operations(Widths.of(AutoConfig.from_pretrained(folder)), lengths, read)
        for folder in (case.student, case.teacher)
    )
    operations = {"student": student, "teacher": teacher, "backward": 2 * student}
    step = median(times.whole)
    stages = {name: median(s.get(name, 0.0) for s in times.stages) for name in STAGES}
    return {
        "step_seconds": step,
        "step_seconds_range": [min(times.whole), max(times.whole)],
        "mfu": sum(operations.values()) / step / peak_operations,
        "stage_seconds": stages,
        "stage_mfu": {
            name: count / stages[name] / peak_operations for name, count in operations.items()
        },
        "staged_step_seconds": median(s["step"] for s in times.stages),
        "operations": operations,
        "tokens": sum(lengths),
        "response_tokens": read,
        "padding_share": 1 - sum(lengths) / places,
        "tokens_per_second": sum(lengths) / step,
        "response_tokens_per_second": read / step,
    }


def predicted_bytes(
    case: Case, batches: Sequence[RolloutBatch], module: OPD, trainer: Trainer
) -> int:
    """Return the peak memory that `opd check` estimates for the largest micro-batch."""
    largest = max(batches, key=lambda batch: batch.views["student"].input_ids.numel())
    rows, length = largest.views["student"].input_ids.shape
    assert isinstance(module.teacher, FrozenTeacher)
    plan = Plan(
        student=module.student.model,
        config=module.student.source.config,
        optimizer=trainer.optimizers[0],
        layout=Layout.of(trainer),
        precision=str(trainer.precision),
        checkpointing=case.checkpointing,
        on_gpu=case.device == "cuda",
        rows=rows,
        length=length,
        response=largest.response_ids.shape[1],
        micro_batches=case.micro_batches,
        teachers=[TeacherModel(module.teacher.model())],
    )
    return sum(process_memory(plan).peak().values())
