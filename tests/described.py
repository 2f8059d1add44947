"""Folders that hold nothing but the config.json of a model, with the sizes of published ones."""

import json
from pathlib import Path
from typing import Any

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "vocab_size": 151_936,
    "eos_token_id": 151_645,
}


def qwen3(hidden: int, layers: int, heads: int, intermediate: int, *, tied: bool) -> dict[str, Any]:
    return QWEN3 | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": intermediate,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "1.7B": qwen3(2048, 28, 16, 6144, tied=True),
    "4B": qwen3(2560, 36, 32, 9728, tied=True),
    "8B": qwen3(4096, 36, 32, 12_288, tied=False),
    "32B": qwen3(5120, 64, 64, 25_600, tied=False),
}
WEIGHTS = {"1.7B": 1_720_574_976, "4B": 4_022_468_096, "8B": 8_190_735_360, "32B": 32_762_123_264}
TINY = QWEN3 | {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 160,
    "vocab_size": 512,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}


def describe(folder: Path, settings: dict[str, Any]) -> str:
    """Write the config.json of a model; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)
