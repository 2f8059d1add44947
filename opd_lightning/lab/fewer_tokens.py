"""A model behind a smaller tokenizer: the first tokens of its own, and their embeddings."""

from __future__ import annotations

import json
from pathlib import Path


def write_with_fewer_tokens(model: Path, folder: Path, size: int) -> None:
    """Write a copy of a model whose tokenizer has only its first tokens.

    Byte-pair tokenizers number their tokens in the order of their merges, so that a prefix is
    itself one: it cuts texts into more and shorter tokens, and all of them have trained embeddings.
    But the model was trained on texts that were cut otherwise.

    Args:
        model: Hugging Face folder with a byte-pair tokenizer, special tokens first.
        folder: Folder to write.
        size: Number of tokens to keep.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = AutoModelForCausalLM.from_pretrained(model)
    whole.resize_token_embeddings(size)
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    own = content["model"]
    own["vocab"] = {token: i for token, i in own["vocab"].items() if i < size}
    own["merges"] = [pair for pair in own["merges"] if "".join(pair) in own["vocab"]]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
