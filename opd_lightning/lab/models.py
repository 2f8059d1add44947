"""Randomly initialised lab models: a small Qwen3 in a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.errors import UserError
from opd_lightning.lab.tokenizer import VOCABULARY, build_tokenizer
from opd_lightning.terminal.library_bars import shown_as

CONTEXT_LENGTH = 256
HEAD_DIM = 32  # the smallest that vLLM's CPU attention supports

# Both make training several times shorter than transformers' defaults (0.02, 10000), which are
# chosen for wide models and long texts. With tied embeddings 0.1 lets the initial logits differ; at
# 100 the longest rotary wavelength is about twice the context.
INITIALIZER_RANGE = 0.1
ROPE_THETA = 100.0


def new_model(folder: Path, *, layers: int, hidden_size: int, seed: int) -> None:
    """Write a randomly initialised Qwen3 with the lab's tokenizer to `folder`.

    AutoModelForCausalLM, AutoTokenizer and vLLM can load the folder. The weights are a function of
    the arguments; the global random state is neither read nor changed.

    Args:
        folder: Folder for config.json, model.safetensors and the tokenizer files.
        layers: Number of transformer blocks.
        hidden_size: Width, a multiple of 32 (one attention head for every 32).
        seed: Seed of the weights.
    """
    if hidden_size % HEAD_DIM or hidden_size < HEAD_DIM:
        raise UserError(f"hidden_size: got {hidden_size}, expected a multiple of {HEAD_DIM}")
    tokenizer = build_tokenizer(CONTEXT_LENGTH)
    heads = hidden_size // HEAD_DIM
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=None,
        dtype=torch.float32,
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    # Temperature 1 without truncation, as the trainer assumes for every sample.
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, **ends)
    with shown_as("write model", "shard"):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
