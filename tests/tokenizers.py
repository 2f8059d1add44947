"""Small tokenizers of all common kinds, and random models for them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_lightning.models.source import ModelSource

CORPUS = ["the quick brown fox jumps, over 12 lazy näive 雪 dogs\n  and then (so) on: 1+1=2;?"] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> Tokenizer:
    """Return a byte-level BPE tokenizer, as of GPT-2, Qwen and Llama 3."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end of turn>", "<|user|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentence_piece(*, strips: bool) -> Tokenizer:
    """Return a SentencePiece tokenizer, as of Llama 2 (adds a space in front) or Gemma."""
    ids = {token: i for i, token in enumerate(("<unk>", "</s>", *BYTES))}
    for character in sorted(set("".join(CORPUS).replace(" ", "▁")) - {"雪"}):
        ids[character] = len(ids)
    ids["▁t"], ids["he"] = len(ids), len(ids) + 1
    merges = [("▁", "t"), ("h", "e")]
    backend = Tokenizer(models.BPE(ids, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        front = normalizers.Prepend("▁")
        backend.normalizer = normalizers.Sequence([front, backend.normalizer])
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def unigram() -> Tokenizer:
    """Return a unigram tokenizer, as of T5's successors: Metaspace, with byte fallback."""
    pieces = [(token, -9.0) for token in ("<unk>", "</s>", *BYTES)]
    pieces += [(c, -5.0) for c in sorted(set("".join(CORPUS).replace(" ", "▁")) - {"雪"})]
    pieces += [("▁the", -3.0), ("▁so", -3.0), ("wo", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return backend


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    return backend


def as_source(tokenizer: Any) -> ModelSource:
    source = ModelSource("some/model", role="teacher")
    source.tokenizer = tokenizer
    return source


def wrapped(backend: Tokenizer) -> ModelSource:
    return as_source(PreTrainedTokenizerFast(tokenizer_object=backend))


KINDS = {
    "byte level": byte_level,
    "sentence piece, space in front": lambda: sentence_piece(strips=True),
    "sentence piece": lambda: sentence_piece(strips=False),
    "unigram": unigram,
}


# Models -----------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}: {% endif %}"
)


def write_model(folder: Path, backend: Tokenizer, end: str, seed: int) -> None:
    """Write a random float32 Qwen3 with this tokenizer; its EOS token is `end`."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 3,  # heads are often larger than their vocabulary
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.15,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder)


def permute_vocabulary(source: Path, target: Path) -> None:
    """Write a lab model with permuted token ids: the same model with another tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = Qwen3ForCausalLM.from_pretrained(source)
    size = model.config.vocab_size
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {token: int(order[i]) for token, i in vocabulary.items()}
    special = [token["content"] for token in state.pop("added_tokens")]
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps({**state, "added_tokens": []})),
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        additional_special_tokens=special,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(target)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[order] = weight.clone()
    for config in (model.config, model.generation_config):
        config.eos_token_id = int(order[config.eos_token_id])
        config.pad_token_id = int(order[config.pad_token_id])
    model.save_pretrained(target)
