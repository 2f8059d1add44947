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
from typing import Any

from torch import nn

from opd_lightning.preflight.plan import layers_and_rest
from opd_lightning.preflight.widths import Widths

H100_PEAK = 989e12  # dense bfloat16 operations a second, by the data sheet; an H200's is the same


def forward_operations(
    widths: Widths, lengths: Iterable[float], read: float, weights: float | None = None
) -> float:
    """Return the operations of one forward pass.

    Args:
        widths: Sizes of the decoder.
        lengths: Tokens of every sequence, without padding.
        read: Positions that the head reads, over all sequences.
        weights: Weights that a token is multiplied with in all layers: see `matrix_weights`. None
            is those of layers with gated products.
    """
    rows = list(lengths)
    if weights is None:
        projections = 2 * widths.hidden * (widths.queries + widths.keys)
        weights = widths.layers * (projections + 3 * widths.hidden * widths.intermediate)
    attention = 2 * widths.layers * widths.queries * sum(length**2 for length in rows)
    head = 2 * widths.hidden * widths.vocabulary * read
    return 2 * weights * sum(rows) + attention + head


def matrix_weights(model: nn.Module, config: Any) -> float:
    """Return the weights of the layers' matrices that a token is multiplied with.

    Of experts, which are tensors of three axes or more than `num_experts` modules, those that a
    token is sent to.

    Args:
        model: A causal LM, on any device.
        config: Its transformers configuration.
    """
    layers, _ = layers_and_rest(model)
    text = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(text, name, None))), 1)
    share = (getattr(text, "num_experts_per_tok", None) or 1) / experts
    matrices = [p for layer in layers for p in layer if p.dim() > 1]
    return sum(p.numel() * (share if p.dim() == 3 else 1) for p in matrices)
