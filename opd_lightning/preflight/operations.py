"""Floating-point operations of a decoder's forward pass, and the peak they are compared with.

    linear layers   2 for every weight of a layer's matrices and every token
    attention       2 S^2 x queries x layers for a sequence of S tokens: the products with keys and
                    with values take 4 S^2 x queries, and a causal mask leaves half
    head            2 x hidden x vocabulary for every position that it reads

A backward pass counts two forward passes. What is computed again (activation checkpointing, the
chunks of the head) and padding are not counted: these are the operations of the model, as in MFU.
"""

from __future__ import annotations

from collections.abc import Iterable

from opd_lightning.preflight.widths import Widths

H100_PEAK = 989e12  # dense bfloat16 operations a second, by the data sheet; an H200's is the same


def forward_operations(widths: Widths, lengths: Iterable[float], read: float) -> float:
    """Return the operations of one forward pass.

    Args:
        widths: Sizes of the decoder, whose layers have gated products.
        lengths: Tokens of every sequence, without padding.
        read: Positions that the head reads, over all sequences.
    """
    rows = list(lengths)
    projections = 2 * widths.hidden * (widths.queries + widths.keys)
    weights = widths.layers * (projections + 3 * widths.hidden * widths.intermediate)
    attention = 2 * widths.layers * widths.queries * sum(length**2 for length in rows)
    head = 2 * widths.hidden * widths.vocabulary * read
    return 2 * weights * sum(rows) + attention + head
