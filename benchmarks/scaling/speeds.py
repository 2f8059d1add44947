"""Assumed speeds of a cluster, and seconds computed from them; none is measured."""

from __future__ import annotations

from functools import cache

from benchmarks.scaling.models import TEACHERS, cached_bytes, config, weight_bytes
from opd_lightning.preflight.operations import forward_operations
from opd_lightning.preflight.speeds import Decoder, Gpu
from opd_lightning.preflight.widths import Widths

GB = 1e9

# A GPU like the H100: 80 GB, less 5 for CUDA, NCCL and fragmentation.
GPU = Gpu(memory=75 * GB, bandwidth=3350 * GB)
MEMORY = GPU.memory
HBM = GPU.decoding * GPU.bandwidth  # bytes per second read in decoding
NODE = 300 * GB  # bytes per second from a GPU to others of its node
NETWORK = 40 * GB  # likewise to other nodes: one port of 400 Gbit/s per GPU
FOLDER = 2 * GB  # bytes per second of a shared folder, per reader or writer
CALL = 50e-6  # latency of a collective in seconds
PER_NODE = 8

# A step: rollouts, and tokens of prompts and responses, on average and at most.
ROLLOUTS, PROMPT, MEAN, MOST = 512, 512, 2048, 4096
LONGEST = 2 * PROMPT + MOST
AT_ONCE = 256  # VLLMEngine.max_num_seqs
SERVED = 0.9  # share of GPU memory that a server's engine uses


@cache
def step_operations(name: str) -> float:
    """Return the operations of a forward pass over a step; the head reads prompts too."""
    length = PROMPT + MEAN
    return ROLLOUTS * forward_operations(Widths.of(config(name)), [length], read=length)


def training_gpu_seconds(name: str, *, lora: bool, checkpointing: bool) -> float:
    """Return the GPU seconds of forward, recomputation and backward; none for frozen weights."""
    passes = 1 + checkpointing + (1 if lora else 2)
    return passes * step_operations(name) / (GPU.peak * GPU.training)


def teacher_gpu_seconds(student: str) -> float:
    return step_operations(TEACHERS[student]) / (GPU.peak * GPU.scoring)


@cache
def gpus_of_engine(name: str) -> int:
    """Return the GPUs per copy, of whose memory the bfloat16 weights fill at most half."""
    return next(n for n in (1, 2, 4, 8) if weight_bytes(name) <= 0.5 * n * MEMORY)


def served_bytes(name: str) -> float:
    """Return the bytes for weights and KV cache of a server's engine, on all its GPUs."""
    return SERVED * gpus_of_engine(name) * MEMORY


def decoder(name: str, gpus: int = 1) -> Decoder:
    return Decoder(weights=weight_bytes(name), cached=cached_bytes(name), gpus=gpus)


def sequences(name: str, memory: float) -> float:
    """Return the sequences of average length whose KV cache fits beside the weights."""
    return decoder(name).sequences(memory, PROMPT + MEAN)


def decoding_step_seconds(name: str, rows: float, gpus: int) -> float:
    """Return the seconds of a decoding step of half responses."""
    return decoder(name, gpus).step_seconds(GPU, rows, PROMPT + MEAN / 2)


@cache
def decoding_seconds(name: str, rows: float, gpus: int, memory: float) -> float:
    """Return the seconds of `rows` rollouts; `memory` is in bytes over all `gpus`."""
    return decoder(name, gpus).seconds(
        GPU, rows, prompt=PROMPT, mean=MEAN, most=MOST, memory=memory, at_once=AT_ONCE
    )
