"""A way to train a student on some GPUs: whether it fits, and its seconds."""

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
    MOST,
    NETWORK,
    NODE,
    PER_NODE,
    ROLLOUTS,
    ROOM,
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

ROWS = 2  # of a micro-batch


@dataclass(frozen=True)
class Run:
    """One row of a table.

    Args:
        student: Of `SHAPES`.
        trainers: GPUs that train.
        shards: 1 is DDP, all trainers FSDP2, else HSDP.
        lora: Whether adapters train alone.
        checkpointing: Of gradients.
        rows: Of a micro-batch.
        remote: Whether the teacher is behind servers of its own.
        servers: GPUs beside the trainers that write; 0 is an engine in the trainer's process that
            sleeps while it trains, and fills what the trainer leaves meanwhile.
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
        """Without what an engine in the process takes while it is awake."""
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
        """Of a process at its fullest moment, but for the engine."""
        return sum(self.memory().fullest().values())

    @property
    def engine_share(self) -> float:
        """Of the GPU that an engine in the process may fill beside what is always there."""
        always = sum(self.memory().always.values()) + self.memory().pushing["push"]
        return math.floor(100 * max(0.0, 1 - always / ROOM)) / 100

    def fits(self) -> bool:
        """An engine in the process holds its weights and 32 of the longest sequences at least."""
        least = weight_bytes(self.student) + 32 * LONGEST * cached_bytes(self.student)
        return self.trainer_bytes <= ROOM and (
            self.servers > 0 or self.engine_share * ROOM >= least
        )

    # Seconds ------------------------------------------------------------------------------

    @property
    def bandwidth(self) -> float:
        """Of the slowest link that gathering and scattering pass."""
        across = self.trainers if self.shards == 1 else self.shards
        return NODE if across <= PER_NODE else NETWORK

    def student_seconds(self) -> float:
        work = training_gpu_seconds(self.student, lora=self.lora, checkpointing=self.checkpointing)
        return work / self.trainers

    def traffic_seconds(self) -> float:
        """Gathers and scatters within a copy of the weights, all-reduces over the network."""
        sent = step_traffic(self.plan())
        reduced = sent.pop("all_reduce")
        link = NODE if self.trainers <= PER_NODE else NETWORK
        return sum(sent.values()) / self.bandwidth + reduced / link

    def teacher_seconds(self) -> float:
        return 0.0 if self.remote else teacher_gpu_seconds(self.student) / self.trainers

    def generate_seconds(self) -> float:
        if not self.servers:
            share = ROLLOUTS / self.trainers
            return decoding_seconds(self.student, share, 1, self.engine_share * ROOM)
        gpus = gpus_of_engine(self.student)
        share = ROLLOUTS / (self.servers // gpus)
        return decoding_seconds(self.student, share, gpus, served_bytes(self.student))

    def gather_seconds(self) -> float:
        """One collective a tensor, in the master weights' dtype."""
        tensors = len(list(self.plan().student.parameters()))
        calls = tensors * CALL if self.shards > 1 else 0.0
        return push_traffic(self.plan()) / self.bandwidth + calls

    def push_seconds(self) -> float:
        """To a folder for servers, else within the device's memory."""
        if self.servers:
            return self.gather_seconds() + folder_seconds(self.student)
        return self.gather_seconds() + copy_seconds(self.student)

    def step_seconds(self) -> float:
        """Servers write the next step's rollouts meanwhile; an engine in the process does not."""
        trains = max(self.student_seconds() + self.teacher_seconds(), self.traffic_seconds())
        writes = self.generate_seconds()
        return (max(writes, trains) if self.servers else writes + trains) + self.push_seconds()


def copy_seconds(student: str) -> float:
    """Master weights are read and an engine's written, in one device's memory."""
    return (nbytes(list(model(student).parameters())) + weight_bytes(student)) / HBM


def folder_seconds(student: str) -> float:
    """The first process writes, then every server reads at a speed of its own."""
    return 2 * weight_bytes(student) / FOLDER


def broadcast_seconds(student: str) -> float:
    return weight_bytes(student) / NETWORK
