"""Assumptions about a cluster and a step, and the seconds that follow; none is measured."""

from __future__ import annotations

from functools import cache

from benchmarks.operations import H100_PEAK, forward_operations
from benchmarks.scaling.models import TEACHERS, cached_bytes, config, weight_bytes
from opd_lightning.preflight.widths import Widths

GB = 1e9

# A GPU of the H100 kind: 80 GB, of which 5 are left to CUDA, NCCL and fragments.
ROOM = 75 * GB
PEAK = H100_PEAK
TRAINING = 0.35  # of the peak that the student's passes reach
SCORING = 0.45  # of the peak that the teacher's passes and prefills reach
HBM = 0.6 * 3350 * GB  # bytes a second that decoding reads
NODE = 300 * GB  # bytes a second that a GPU sends to others of its node
NETWORK = 40 * GB  # and to other nodes: one port of 400 Gbit/s each
FOLDER = 2 * GB  # of a shared folder, for one reader or writer
CALL = 50e-6  # seconds of a collective whatever its size
PER_NODE = 8

# A step: rollouts, and tokens of prompts and responses, on average and at most.
ROLLOUTS, PROMPT, MEAN, MOST = 512, 512, 2048, 4096
LONGEST = 2 * PROMPT + MOST
AT_ONCE = 256  # VLLMEngine.max_num_seqs
SERVED = 0.9  # of a GPU that a server's engine fills


@cache
def step_operations(name: str) -> float:
    """Of one forward pass over a step; the head reads prompts as well."""
    length = PROMPT + MEAN
    return ROLLOUTS * forward_operations(Widths.of(config(name)), [length], read=length)


def training_gpu_seconds(name: str, *, lora: bool, checkpointing: bool) -> float:
    """Of the student's passes: forward, again, and back, where frozen weights have no gradient."""
    passes = 1 + checkpointing + (1 if lora else 2)
    return passes * step_operations(name) / (PEAK * TRAINING)


def teacher_gpu_seconds(student: str) -> float:
    return step_operations(TEACHERS[student]) / (PEAK * SCORING)


@cache
def gpus_of_engine(name: str) -> int:
    """That share one copy: weights in bfloat16 fill at most half of their memory."""
    return next(n for n in (1, 2, 4, 8) if weight_bytes(name) <= 0.5 * n * ROOM)


def served_bytes(name: str) -> float:
    """That an engine of a server has for weights and KV cache, on all of its GPUs."""
    return SERVED * gpus_of_engine(name) * ROOM


def sequences(name: str, room: float) -> float:
    """Of average length whose KV cache fits beside the weights."""
    return max(1.0, (room - weight_bytes(name)) / ((PROMPT + MEAN) * cached_bytes(name)))


def decoding_step_seconds(name: str, rows: float, gpus: int) -> float:
    """Weights and the KV cache of half-written responses are read; two operations a weight."""
    operations = weight_bytes(name)  # 2 bytes a weight, and 2 operations
    read = weight_bytes(name) + rows * (PROMPT + MEAN / 2) * cached_bytes(name)
    return read / (HBM * gpus) + rows * operations / (PEAK * SCORING * gpus)


@cache
def decoding_seconds(name: str, rows: float, gpus: int, room: float) -> float:
    """A step's rollouts on one engine: prefill, full batches, then the longest response alone.

    `room` is the memory for weights and KV cache in bytes, on `gpus` together.
    """
    at_once = min(rows, AT_ONCE, sequences(name, room))
    prefill = rows * PROMPT * weight_bytes(name) / (PEAK * SCORING * gpus)
    full = rows / at_once * MEAN * decoding_step_seconds(name, at_once, gpus)
    return prefill + full + (MOST - MEAN) * decoding_step_seconds(name, 1, gpus)
