"""The one place that multiplies by the vocabulary matrix, in chunks of response tokens.

No `[B, L, V]` tensor exists: prompts never reach the head, and logits live for one chunk, in the
forward pass and (recomputed) in the backward pass.

Axes: N response tokens of a micro-batch, n tokens of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits of one chunk: 2**26 float32 values are 256 MiB (441 tokens at a vocabulary of 152,064).
MAX_CHUNK_ELEMENTS = 2**26

Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A model's output projection and what the model does to its logits afterwards."""

    project: Callable[[Tensor], Tensor]  # hidden [n, H] -> raw logits [n, V]
    vocab_size: int
    temperature: float  # of the sampler; both sides of a comparison use the same one
    scale: float = 1.0  # some architectures multiply their logits
    softcap: float | None = None  # others squash them: softcap * tanh(logits / softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, H]` -> float32 `[n, V]`, divided by the temperature."""
        logits = self.project(hidden).float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature


@dataclass(frozen=True, slots=True)
class TokenStates:
    """Where a model predicts the response tokens, and the head to read its predictions with."""

    hidden: Tensor  # [N, H]
    head: Head


class FlatScores(NamedTuple):
    """Scores of the N sampled tokens of a micro-batch, before they go back to `[B, R]`."""

    logprobs: Tensor  # [N] float32 nats; carries the gradient
    entropy: Tensor  # [N] float32 nats, detached
    top_ids: Tensor  # [N, K] int64, most likely first


def score_tokens(states: TokenStates, targets: Tensor, *, top_k: int) -> FlatScores:
    """Log-prob of each target `[N]`, entropy and the `top_k` most likely tokens."""

    def score_chunk(hidden: Tensor, chunk_targets: Tensor) -> FlatScores:
        return _describe(states.head.logits(hidden).log_softmax(dim=-1), chunk_targets, top_k)

    chunk = _chunk_size(states.head.vocab_size)
    return FlatScores(*_in_chunks(score_chunk, chunk, states.hidden, targets))


def score_divergence(
    student: TokenStates,
    teacher: TokenStates,
    targets: Tensor,
    divergence: Divergence,
    *,
    top_k: int,
) -> tuple[FlatScores, FlatScores, Tensor]:
    """One pass over both heads: student scores, teacher scores and the divergence `[N]`.

    `divergence(student_logprobs [n, V], teacher_logprobs [n, V]) -> [n]` sees full log-softmaxes;
    gradients reach the student's hidden states and head only.
    """

    def compare_chunk(
        student_hidden: Tensor, teacher_hidden: Tensor, chunk_targets: Tensor
    ) -> tuple[Tensor, ...]:
        # A teacher answers in its own dtype, whatever the student is trained in.
        with torch.no_grad(), torch.autocast(teacher_hidden.device.type, enabled=False):
            theirs = teacher.head.logits(teacher_hidden).log_softmax(dim=-1)
        ours = student.head.logits(student_hidden).log_softmax(dim=-1)
        distance = divergence(ours, theirs)
        mine = _describe(ours, chunk_targets, top_k)
        return distance, *mine, *_describe(theirs, chunk_targets, top_k)

    chunk = _chunk_size(student.head.vocab_size)
    distance, *scores = _in_chunks(
        compare_chunk, chunk, student.hidden, teacher.hidden.detach(), targets
    )
    return FlatScores(*scores[:3]), FlatScores(*scores[3:]), distance


def _describe(logprobs: Tensor, targets: Tensor, top_k: int) -> FlatScores:
    chosen = logprobs.gather(-1, targets[:, None]).squeeze(-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
        top_ids = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1).indices
    return FlatScores(chosen, entropy, top_ids)


def _chunk_size(vocab_size: int) -> int:
    return max(1, MAX_CHUNK_ELEMENTS // vocab_size)


def _in_chunks(
    function: Callable[..., tuple[Tensor, ...]], chunk: int, *inputs: Tensor
) -> list[Tensor]:
    """Apply `function` to slices of at most `chunk` rows and concatenate each of its outputs.

    With several chunks and gradients on, a chunk's logits are freed after its forward pass and
    computed again in the backward pass.
    """
    rows = inputs[0].shape[0]
    if rows <= chunk:
        return list(function(*inputs))
    parts = [
        checkpoint(function, *(x[i : i + chunk] for x in inputs), use_reentrant=False)
        for i in range(0, rows, chunk)
    ]
    return [torch.cat(column) for column in zip(*parts, strict=True)]
