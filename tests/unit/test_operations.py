"""The operations that benchmarks divide by the peak are those that PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.operations import forward_operations
from opd_lightning.preflight.widths import Widths


@pytest.mark.parametrize("length", [8, 96])
def test_operations_are_those_that_torch_counts(length: int) -> None:
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    rows, read = 2, 5
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="eager")
    ids = torch.zeros(rows, length, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False, logits_to_keep=read)
    # Eager attention computes what the causal mask hides, too.
    hidden = 2 * 3 * (4 * 32) * rows * length**2
    expected = forward_operations(Widths.of(config), [length] * rows, rows * read) + hidden
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)  # rotary angles
