"""Estimates of the bytes that a micro-batch keeps for its backward pass, and of the head."""

from __future__ import annotations

from typing import NamedTuple

from opd_lightning.models.head import MAX_BLOCK_ELEMENTS, MAX_CHUNK_ELEMENTS
from opd_lightning.preflight.widths import Widths


class Arithmetic(NamedTuple):
    """Bytes per element of tensors that are kept for the backward pass."""

    stream: int  # residual stream: dtype of the weights
    compute: int  # matrix products: autocast's dtype, or that of the weights


def activation_bytes(
    widths: Widths, rows: int, length: int, of: Arithmetic, *, checkpointing: bool
) -> int:
    """Estimate the bytes that `rows` sequences of `length` tokens (padding included) keep.

    Per token and layer of a Qwen3-like block, with H hidden, A queries, K keys, I intermediate:
    both norms keep their input in float32 and its normalised value; matrix products keep their
    inputs, and autocast makes one copy for each of the five products that read a norm; queries
    and keys have norms too; attention keeps queries, keys and values repeated to A, its output
    and, per layer, a mask of `length` for every token; the gated product keeps four I. With
    gradient checkpointing, the residual stream of every layer is kept, and one layer in full.
    """
    inputs = 2 if of.compute == of.stream else 5
    hidden = widths.hidden * (2 * (4 + of.stream) + inputs * of.compute)
    heads = (widths.queries + widths.keys) * (4 + of.compute)
    attention = (4 * widths.queries + length) * of.compute
    layer = hidden + heads + attention + 4 * widths.intermediate * of.compute
    stream = widths.hidden * of.stream
    layers = widths.layers * stream + layer if checkpointing else widths.layers * layer
    last_norm = widths.hidden * (4 + of.stream)
    return rows * length * (layers + last_norm)


def head_bytes(
    widths: Widths, tokens: int, of: Arithmetic, *, on_gpu: bool, trains: bool = True
) -> int:
    """Estimate the head's bytes for `tokens` response tokens: hidden states, logits, gradient.

    Independent of the number of tokens are one chunk of logits and four float32 blocks read from
    it. The matrix is cast to the compute dtype. If it trains, its full gradient is made in
    float32 before it is added to the existing one.
    """
    logits, matrix = tokens * widths.vocabulary, widths.vocabulary * widths.hidden
    block = MAX_CHUNK_ELEMENTS // 2 if on_gpu else MAX_BLOCK_ELEMENTS
    chunk = min(logits, MAX_CHUNK_ELEMENTS) * of.compute + 4 * 4 * min(logits, block)
    cast = matrix * of.compute if of.compute < of.stream else 0
    # In float32, then in the matrix's dtype if it is another.
    gradient = matrix * (4 + (of.stream if of.stream < 4 else 0)) if trains else 0
    return 2 * tokens * widths.hidden * of.stream + chunk + cast + gradient
