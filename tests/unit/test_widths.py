"""Sizes of decoders by families that name them otherwise, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING, PreTrainedConfig

from opd_lightning.errors import UserError
from opd_lightning.preflight.widths import Widths

GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 99}
GEMMA4 = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 99,
          "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32,
          "intermediate_size": 96}  # fmt: skip
FALCON = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99}
MOE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99,
       "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 24,
       "num_experts_per_tok": 3, "shared_expert_intermediate_size": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("gpt2", GPT2, Widths(64, 64, 64, 256, 3, 99)),
        ("gpt2", {**GPT2, "n_inner": 100}, Widths(64, 64, 64, 100, 3, 99)),
        ("gemma4_text", GEMMA4, Widths(64, 128, 64, 96, 6, 99)),  # of the wider layers
        ("falcon", {**FALCON, "multi_query": True}, Widths(64, 64, 16, 256, 3, 99)),
        ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
         Widths(64, 64, 32, 256, 3, 99)),
        ("opt", {**FALCON, "ffn_dim": 96}, Widths(64, 64, 64, 96, 3, 99)),
        ("qwen3_5_moe_text", MOE, Widths(64, 64, 32, 80, 3, 99)),
    ],
)  # fmt: skip
def test_names_of_families(kind: str, settings: dict[str, Any], expected: Widths) -> None:
    assert Widths.of(CONFIG_MAPPING[kind](**settings)) == expected


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_what_is_not_said_is_assumed(kind: str) -> None:
    widths = Widths.of(CONFIG_MAPPING[kind](hidden_size=64))
    assert widths.queries == widths.keys == widths.hidden == 64
    assert widths.intermediate in (128, 256)
    assert widths.assumed


def test_without_layers_nothing_is_estimated() -> None:
    with pytest.raises(UserError, match="num_hidden_layers"):
        Widths.of(PreTrainedConfig(hidden_size=64))
