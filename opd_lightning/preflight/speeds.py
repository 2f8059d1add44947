"""Seconds on assumed speeds of a GPU; none is measured."""

from __future__ import annotations

from dataclasses import dataclass

from opd_lightning.errors import UserError
from opd_lightning.preflight.operations import H100_PEAK


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Speeds of a GPU; by default an H200's by its data sheet, and usual shares of them.

    Args:
        memory: Bytes.
        peak: Dense bfloat16 operations a second.
        training: Share of the peak that the student's passes reach.
        scoring: Share of the peak that passes without a gradient reach, and prefills.
        bandwidth: Bytes of its memory read a second.
        decoding: Share of the bandwidth that decoding reaches.
    """

    memory: float = 140 * 2**30
    peak: float = H100_PEAK
    training: float = 0.35
    scoring: float = 0.45
    bandwidth: float = 4.8e12
    decoding: float = 0.6

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise UserError(f"{name}: got {value}, expected a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """An engine's copy of a model.

    Args:
        weights: Bytes of its weights, 2 for each.
        cached: Bytes of a token's keys and values in all layers.
        gpus: GPUs that share the copy.
    """

    weights: float
    cached: float
    gpus: int = 1

    def sequences(self, memory: float, length: float) -> float:
        """Return the number of sequences of `length` tokens that fit in memory, at least 1."""
        return max(1.0, (memory - self.weights) / (length * self.cached))

    def step_seconds(self, gpu: Gpu, rows: float, context: float) -> float:
        """Return the seconds of a decoding step.

        It reads all weights, and the keys and values of `rows` sequences of `context` tokens, and
        computes two operations per weight and row.
        """
        read = self.weights + rows * context * self.cached
        work = rows * self.weights  # 2 bytes and 2 operations per weight
        return read / (gpu.bandwidth * gpu.decoding * self.gpus) + work / (
            gpu.peak * gpu.scoring * self.gpus
        )

    def seconds(
        self,
        gpu: Gpu,
        rows: float,
        *,
        prompt: float,
        mean: float,
        most: float,
        memory: float,
        at_once: float,
    ) -> float:
        """Return the seconds of `rows` responses: prefill, full batches, the longest response.

        Args:
            gpu: Speeds.
            rows: Responses of one engine.
            prompt: Tokens of a prompt, on average.
            mean: Tokens of a response, on average.
            most: Tokens of the longest response.
            memory: Bytes for weights and KV cache, over all its GPUs.
            at_once: Most rows that it decodes at once.
        """
        if not rows:
            return 0.0
        together = min(rows, at_once, self.sequences(memory, prompt + mean))
        prefill = rows * prompt * self.weights / (gpu.peak * gpu.scoring * self.gpus)
        step = self.step_seconds(gpu, together, prompt + mean / 2)
        last = self.step_seconds(gpu, 1, prompt + mean / 2)
        return prefill + rows / together * mean * step + (most - mean) * last
