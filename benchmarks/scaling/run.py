"""Memory and seconds of a step for a student, a number of GPUs and a strategy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from benchmarks.scaling.models import (
    TEACHERS,
    cached_bytes,
    config,
    model,
    weight_bytes,
)
from benchmarks.scaling.speeds import (
    CALL,
    FOLDER,
    HBM,
    LONGEST,
    MEMORY,
    MOST,
    NETWORK,
    NODE,
    PER_NODE,
    ROLLOUTS,
    decoding_seconds,
    gpus_of_engine,
    served_bytes,
    teacher_gpu_seconds,
    training_gpu_seconds,
)
from opd_lightning.preflight.layout import Layout
from opd_lightning.preflight.memory import Memory, process_memory
from opd_lightning.preflight.plan import Plan, TeacherModel, nbytes
from opd_lightning.preflight.traffic import push_traffic, step_traffic

ROWS = 2  # sequences of a micro-batch


@dataclass(frozen=True)
class Run:
    """Settings of a run; one row of a table.

    Args:
        student: Key of `SHAPES`.
        trainers: GPUs that train.
        shards: 1 is DDP, all trainers FSDP2, else HSDP.
        lora: Whether only adapters are trained.
        checkpointing: Whether activations are recomputed in the backward pass.
        rows: Sequences of a micro-batch.
        remote: Whether the teacher runs on separate servers.
        servers: GPUs for rollouts in addition to the trainers; 0 is an engine in the trainer's
            process, which sleeps during training and otherwise uses the free memory.
    """

    student: str
    trainers: int
    shards: int
    lora: bool = False
    checkpointing: bool = True
    rows: int = ROWS
    remote: bool = False
    servers: int = 0

    @property
    def strategy(self) -> str:
        if self.trainers == 1:
            return "one device"
        return {1: "DDP", self.trainers: "FSDP2"}.get(self.shards, f"HSDP, groups of {self.shards}")

    @property
    def micro_batches(self) -> int:
        return max(1, ROLLOUTS // (self.trainers * self.rows))

    @cache  # noqa: B019
    def plan(self) -> Plan:
        """Return the plan for the estimates, without the memory of an engine in the process."""
        student = model(self.student, lora=self.lora)
        teacher = TeacherModel(model(TEACHERS[self.student], half=True), sharded=True)
        return Plan(
            student=student,
            config=config(self.student),
            optimizer=torch.optim.AdamW([p for p in student.parameters() if p.requires_grad]),
            layout=Layout(
                world=self.trainers,
                shards=self.shards,
                per_node=min(self.trainers, PER_NODE),
                copies_gradients=self.shards == 1 and self.trainers > 1,
            ),
            precision="bf16-mixed",
            checkpointing=self.checkpointing,
            on_gpu=True,
            rows=self.rows,
            length=LONGEST,
            response=MOST,
            micro_batches=self.micro_batches,
            teachers=[] if self.remote else [teacher],
            pushed=torch.bfloat16,
        )

    @cache  # noqa: B019
    def memory(self) -> Memory:
        return process_memory(self.plan())

    @property
    def trainer_bytes(self) -> int:
        """Peak bytes of a process, without the engine."""
        return sum(self.memory().peak().values())

    @property
    def engine_share(self) -> float:
        """Share of the GPU for an engine in the process, beside permanent tensors."""
        always = sum(self.memory().always.values()) + self.memory().pushing["push"]
        return math.floor(100 * max(0.0, 1 - always / MEMORY)) / 100

    def fits(self) -> bool:
        """Return whether the run fits; an engine needs its weights and 32 longest sequences."""
        least = weight_bytes(self.student) + 32 * LONGEST * cached_bytes(self.student)
        return self.trainer_bytes <= MEMORY and (
            self.servers > 0 or self.engine_share * MEMORY >= least
        )

    # Seconds ------------------------------------------------------------------------------

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the slowest link in gathers and scatters."""
        across = self.trainers if self.shards == 1 else self.shards
        return NODE if across <= PER_NODE else NETWORK

    def student_seconds(self) -> float:
        work = training_gpu_seconds(self.student, lora=self.lora, checkpointing=self.checkpointing)
        return work / self.trainers

    def traffic_seconds(self) -> float:
        """Return the seconds of gathers and scatters within replicas and of all-reduces."""
        sent = step_traffic(self.plan())
        reduced = sent.pop("all_reduce")
        link = NODE if self.trainers <= PER_NODE else NETWORK
        return sum(sent.values()) / self.bandwidth + reduced / link

    def teacher_seconds(self) -> float:
        return 0.0 if self.remote else teacher_gpu_seconds(self.student) / self.trainers

    def generate_seconds(self) -> float:
        if not self.servers:
            share = ROLLOUTS / self.trainers
            return decoding_seconds(self.student, share, 1, self.engine_share * MEMORY)
        gpus = gpus_of_engine(self.student)
        share = ROLLOUTS / (self.servers // gpus)
        return decoding_seconds(self.student, share, gpus, served_bytes(self.student))

    def gather_seconds(self) -> float:
        """Return the seconds of one gather per tensor, in the dtype of the master weights."""
        tensors = len(list(self.plan().student.parameters()))
        calls = tensors * CALL if self.shards > 1 else 0.0
        return push_traffic(self.plan()) / self.bandwidth + calls

    def push_seconds(self) -> float:
        """Return the seconds of a push: to a folder for servers, else within the device."""
        if self.servers:
            return self.gather_seconds() + folder_seconds(self.student)
        return self.gather_seconds() + copy_seconds(self.student)

    def step_seconds(self) -> float:
        """Return the seconds of a step. Servers generate the next rollouts during training."""
        trains = max(self.student_seconds() + self.teacher_seconds(), self.traffic_seconds())
        writes = self.generate_seconds()
        return (max(writes, trains) if self.servers else writes + trains) + self.push_seconds()


def copy_seconds(student: str) -> float:
    """Return the seconds of copying weights to an engine on the same device."""
    return (nbytes(list(model(student).parameters())) + weight_bytes(student)) / HBM


def folder_seconds(student: str) -> float:
    """Return the seconds of a push by folder: rank 0 writes, then servers read in parallel."""
    return 2 * weight_bytes(student) / FOLDER


def broadcast_seconds(student: str) -> float:
    return weight_bytes(student) / NETWORK
