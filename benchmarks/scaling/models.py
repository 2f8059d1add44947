"""Published Qwen3 models without weights."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd_lightning.preflight.plan import nbytes
from opd_lightning.preflight.widths import Widths

VOCABULARY = 151_936


class Shape(NamedTuple):
    """Sizes of a published Qwen3; heads have 128 dimensions."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    intermediate: int
    tied: bool


SHAPES = {
    "0.6B": Shape(1024, 28, 16, 8, 3072, True),
    "1.7B": Shape(2048, 28, 16, 8, 6144, True),
    "4B": Shape(2560, 36, 32, 8, 9728, True),
    "32B": Shape(5120, 64, 64, 8, 25600, False),
}
# By student; the teacher of the last one is its initial model.
TEACHERS = {"1.7B": "4B", "4B": "32B", "32B": "32B"}
LORA = LoraConfig(r=32, target_modules="all-linear")


@cache
def config(name: str) -> Any:
    s = SHAPES[name]
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.key_heads,
        head_dim=128,
        tie_word_embeddings=s.tied,
    )


@cache
def model(name: str, *, lora: bool = False, half: bool = False) -> Any:
    """Return a model on the meta device: float32, or bfloat16 if `half` or with a LoRA."""
    with torch.device("meta"):
        plain = Qwen3ForCausalLM(config(name)).to(torch.bfloat16 if half or lora else torch.float32)
        return get_peft_model(plain, LORA) if lora else plain


@cache
def weight_bytes(name: str) -> int:
    """Return the bytes of the weights in bfloat16."""
    return nbytes(list(model(name, half=True).parameters()))


@cache
def cached_bytes(name: str) -> int:
    """Return the bytes of a token's KV cache in bfloat16."""
    return 2 * Widths.of(config(name)).cache
