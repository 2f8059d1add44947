"""The operations that estimates and benchmarks count are those that PyTorch counts."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from opd_lightning.preflight.operations import forward_operations, matrix_weights
from opd_lightning.preflight.widths import Widths
from tests.described import TINY

QWEN3 = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type")}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 512}
MOE = QWEN3 | {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}


def built(kind: str, settings: dict[str, Any]) -> Any:
    config = CONFIG_MAPPING[kind](**settings)
    # PyTorch does not count the operations of grouped products.
    loops = {"experts_implementation": "eager"} if kind == "qwen3_moe" else {}
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", **loops)


def counted(model: Any, length: int, *, backward: bool = False) -> float:
    """Operations of two rows, whose last five logits are read."""
    ids = torch.zeros(2, length, dtype=torch.int64)
    with torch.set_grad_enabled(backward), FlopCounterMode(display=False) as counter:
        logits = model(ids, use_cache=False, logits_to_keep=5).logits
        if backward:
            logits.sum().backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("length", [8, 96])
@pytest.mark.parametrize(
    ("kind", "settings"), [("qwen3", QWEN3), ("gpt2", GPT2), ("qwen3_moe", MOE)]
)
def test_operations_are_those_that_torch_counts(
    kind: str, settings: dict[str, Any], length: int
) -> None:
    model = built(kind, settings)
    widths = Widths.of(model.config)
    # Eager attention computes what the causal mask hides, too.
    hidden = 2 * widths.layers * widths.queries * 2 * length**2
    matrices = matrix_weights(model, model.config)
    expected = forward_operations(widths, [length] * 2, 2 * 5, matrices) + hidden
    assert counted(model, length) == pytest.approx(expected, rel=1e-3)  # rotary angles
    if kind == "qwen3":
        assert forward_operations(widths, [length] * 2, 10) == expected - hidden
        backward = counted(model, length, backward=True)
        assert backward == pytest.approx(3 * expected, rel=1e-3)
