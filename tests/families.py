"""Tiny random models of many architectures, built from their configurations.

Settings that scale or cap logits, embeddings and residuals are far from neutral, and no weight,
bias or persistent buffer has its initial value, so that code which leaves one out gives other
log-probs. All share the character tokenizer of `tests/conftest.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.conftest import CHARACTERS, SPECIAL, write_tokenizer

VOCABULARY = len(SPECIAL) + len(CHARACTERS)
LENGTH = 64  # tokens of context

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": SPECIAL.index("<pad>"),
    "eos_token_id": SPECIAL.index("<eos>"),
    "bos_token_id": None,
}
# Heads are 32 wide, the smallest that vLLM's attention on CPUs takes.
_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": LENGTH,
}
_HEADS = {"head_dim": 32}
_NO_GROUPS = {"num_key_value_heads": 2}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": LENGTH}
_MLA: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 2,
}

# By model type: settings beside `_TOKENS`.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": _LLAMA,
    "arcee": _LLAMA,
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 2},
    "cohere": _LLAMA | {"logit_scale": 0.25},
    "cohere2": _LLAMA | _HEADS | _WINDOWS | {"logit_scale": 0.25},
    "deepseek_v3": _LLAMA
    | _MLA
    | _EXPERTS
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "ernie4_5": _LLAMA | _HEADS,
    "exaone4": _LLAMA | _HEADS | _WINDOWS,
    "falcon": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
    },
    "falcon_h1": _LLAMA
    | _HEADS
    | {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
        "lm_head_multiplier": 0.3,
        "embedding_multiplier": 2.0,
    },
    "gemma": _LLAMA | _HEADS,
    "gemma2": _LLAMA
    | _HEADS
    | _WINDOWS
    | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 16},
    "gemma3_text": _LLAMA | _HEADS | _WINDOWS | {"final_logit_softcapping": 2.0},
    "gemma4_text": _LLAMA
    | _HEADS
    | _WINDOWS
    | {
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "final_logit_softcapping": 2.0,
    },
    "glm": _LLAMA | _HEADS,
    "glm4": _LLAMA | _HEADS,
    "glm4_moe": _LLAMA
    | _HEADS
    | _EXPERTS
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neox": _LLAMA,
    "gpt_oss": _LLAMA | _HEADS | _WINDOWS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": _GPT | {"rotary_dim": 16},
    "granite": _LLAMA
    | {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "granitemoe": _LLAMA | {"num_local_experts": 4, "logits_scaling": 4.0},
    "helium": _LLAMA | _HEADS,
    "hunyuan_v1_dense": _LLAMA | _HEADS,
    "hyperclovax": _LLAMA | _HEADS | {"logits_scaling": 0.25, "embedding_multiplier": 2.0},
    "lfm2": _LLAMA | {"layer_types": ["conv", "full_attention"]},
    "llama": _LLAMA,
    "llama4_text": _LLAMA | _HEADS | {"num_local_experts": 2, "intermediate_size_mlp": 96},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "minimax_m2": _LLAMA | _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": _LLAMA | _HEADS | _WINDOWS,
    "mistral": _LLAMA | _HEADS | {"sliding_window": 8},
    "mixtral": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": LENGTH},
    "nanochat": _LLAMA | {"final_logit_softcapping": 2.0},
    "nemotron": _LLAMA | _HEADS,
    "olmo": _LLAMA | {"clip_qkv": 1.0},
    "olmo2": _LLAMA,
    "olmo3": _LLAMA | _WINDOWS,
    "olmoe": _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 96,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": LENGTH,
    },
    "persimmon": _LLAMA | _NO_GROUPS,
    "phi": _LLAMA,
    "phi3": _LLAMA,
    "phimoe": _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "lm_head_bias": True},
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA | _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3": _LLAMA | _HEADS,
    "qwen3_moe": _LLAMA | _HEADS | _EXPERTS | {"num_experts": 4},
    "qwen3_next": _LLAMA
    | _HEADS
    | _EXPERTS
    | {
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "recurrent_gemma": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "block_types": ("recurrent", "attention"),
        "attention_window_size": 16,
        "logits_soft_cap": 2.0,
    },
    "seed_oss": _LLAMA | _HEADS,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA | {"sliding_window": 8},
    "vaultgemma": _LLAMA | _HEADS | _WINDOWS | {"final_logit_softcapping": 2.0},
    "xglm": {
        "d_model": 64,
        "num_layers": 2,
        "attention_heads": 2,
        "ffn_dim": 96,
        "max_position_embeddings": LENGTH,
    },
}


# One of each kind: plain, tied and biased heads; scaled and capped logits; windows; learned
# positions; projected embeddings; experts, shared experts, latent attention; recurrent layers.
QUICK = {"cohere2", "deepseek_v3", "falcon_h1", "gemma2", "gpt2", "gpt_oss"}
QUICK |= {"mamba", "opt", "phi", "phimoe", "qwen2_moe", "qwen3"}


def family_params(names: Iterable[str] = FAMILIES) -> list[Any]:
    """Return names as parameters of a test, of which a quick run takes those in `QUICK` alone."""
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


def family_config(name: str, **settings: Any) -> PreTrainedConfig:
    """Return the configuration of a family, with `settings` above its own."""
    kind = CONFIG_MAPPING[name]
    config: PreTrainedConfig = kind(**(_TOKENS | FAMILIES[name] | settings))
    return config


def family_model(name: str, *, seed: int = 0, **settings: Any) -> Any:
    """Return a random float32 model of a family in eval mode; weights depend on the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(family_config(name, **settings)).eval()
        randomize(model)
    return model


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Draw matrices anew and move everything else that is saved away from its initial value."""
    saved = model.state_dict().keys()
    for tensor in model.parameters():
        if tensor.dim() > 1:
            tensor.normal_(0, 0.15)
        else:
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            buffer.add_(torch.randn_like(buffer), alpha=0.1)


def write_family(folder: Path, name: str, *, seed: int = 0, **settings: Any) -> Path:
    """Write the model, its configuration and the character tokenizer to `folder`; return it."""
    family_model(name, seed=seed, **settings).save_pretrained(folder)
    write_tokenizer(folder)
    return folder
