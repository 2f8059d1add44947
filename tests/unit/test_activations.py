"""Activation memory of a micro-batch, counted by autograd, against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_lightning.preflight.activations import Arithmetic, activation_bytes
from opd_lightning.preflight.widths import Widths

ROWS, LENGTH = 4, 96
CONFIG = Qwen3Config(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=448,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
)


def kept_bytes(dtype: torch.dtype, *, autocast: bool, checkpointing: bool) -> int:
    """Of everything that the backward pass is given, but the weights and their copies."""
    model = Qwen3ForCausalLM(CONFIG).to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {s for p in model.parameters() if p.dim() > 1 for s in (p.shape, p.t().shape)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        copied = tensor.shape in shapes and tensor.dtype != dtype
        if tensor.untyped_storage().data_ptr() not in weights and not copied:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0  # as in any micro-batch of uneven responses
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast", "of"),
    [
        (torch.float32, False, Arithmetic(4, 4)),
        (torch.float32, True, Arithmetic(4, 2)),
        (torch.bfloat16, False, Arithmetic(2, 2)),
    ],
    ids=["32-true", "bf16-mixed", "bfloat16"],
)
def test_what_a_micro_batch_keeps(
    dtype: torch.dtype, autocast: bool, of: Arithmetic, checkpointing: bool
) -> None:
    kept = kept_bytes(dtype, autocast=autocast, checkpointing=checkpointing)
    widths = Widths.of(CONFIG)
    formula = activation_bytes(widths, ROWS, LENGTH, of, checkpointing=checkpointing)
    if checkpointing:  # the formula adds the layer that the backward pass works on
        formula -= activation_bytes(
            widths._replace(layers=1), ROWS, LENGTH, of, checkpointing=False
        ) - ROWS * LENGTH * CONFIG.hidden_size * (4 + of.stream)
    assert formula == pytest.approx(kept, rel=0.03)
