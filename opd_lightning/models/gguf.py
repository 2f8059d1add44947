"""GGUF files as models: converted once to an ordinary Hugging Face folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from opd_lightning.errors import UserError, is_panic, note, reason_of
from opd_lightning.models.folder import refuse_pointer
from opd_lightning.models.identity import sample_of
from opd_lightning.models.made_once import made_once, user_cache
from opd_lightning.terminal.library_bars import shown_as

log = logging.getLogger(__name__)

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# Tokens that end a response, as GGUF names them beside the tokenizer's EOS.
_END_OF_TURN = "tokenizer.ggml.eot_token_id"
# Byte-level tokenizers that split a text as GPT-2 does, and those that cut out every digit first,
# by GGUF's name of the split (llama.cpp's list). transformers rebuilds both as the former.
_SPLIT = "tokenizer.ggml.pre"
_AS_GPT2 = {"gpt-2", "mpt", "olmo", "jais", "trillion", "granite-docling"}
_DIGITS_FIRST = {
    *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
}
_FORMAT = 1  # increase when the folder of a file changes


def gguf_file(path: Path, role: str) -> Path | None:
    """Return the GGUF file that a path names; None if it names another model.

    It is the path itself, or the only GGUF file of a folder without config.json.

    Raises:
        UserError: The file does not exist or is not whole, or the folder has several.
    """
    if path.is_dir():
        if (path / "config.json").exists() or not (files := sorted(path.glob(f"*{_SUFFIX}"))):
            return None
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(
                f"{role} model: {str(path)!r} holds several GGUF files ({names}); give the path of "
                "one"
            )
        path = files[0]
    if path.suffix != _SUFFIX:
        return None
    if not path.is_file():
        raise UserError(f"{role} model: no GGUF file at {str(path)!r}; give a file on this machine")
    try:
        refuse_pointer(path, role)
        with path.open("rb") as stream:
            magic = stream.read(len(_MAGIC))
    except OSError as error:
        raise UserError(
            f"{role} model: cannot read {str(path)!r}: {error.strerror}; give another"
        ) from error
    if magic != _MAGIC:
        raise UserError(f"{role} model: {str(path)!r} is no GGUF file; get the file again")
    if _PART.search(path.name):
        raise UserError(
            f"{role} model: {str(path)!r} is one of several parts, which transformers cannot read; "
            "merge them with `llama-gguf-split --merge`"
        )
    return path


def converted(file: Path, role: str) -> Path:
    """Return the Hugging Face folder of a GGUF file, in the user's cache; make it on first use.

    Weights are those that transformers reads, dequantized to float32. The chat template and the
    tokens that end a response are those of the file.

    Args:
        file: File that `gguf_file` returned.
        role: Use of the model; named in errors.

    Raises:
        UserError: transformers cannot read the file, or the package gguf is missing.
    """
    digest = blake2b(f"{_FORMAT}".encode() + sample_of(file), digest_size=6).hexdigest()
    folder = user_cache("gguf") / f"{file.stem}-{digest}"
    if not folder.exists():
        check_package(file, role)
        note(f"{role} model: {str(file)!r} is converted to {str(folder)!r}, once")

    def make(unfinished: Path) -> None:
        try:
            write_folder(file, unfinished)
        except (MemoryError, UserError):
            raise
        except BaseException as error:  # from several libraries
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            if isinstance(error, OSError) and error.errno is not None:  # from the cache's disk
                raise
            raise UserError(
                f"{role} model: cannot read {str(file)!r}: {reason_of(error)}; get the file again, "
                "or the model's own folder"
            ) from error

    made_once(folder, f"{role} model: {file.name}", make)
    return folder


def write_folder(file: Path, folder: Path) -> None:
    """Write a GGUF file's model as config, float32 safetensors, tokenizer and stop tokens.

    Errors of transformers are raised as they are. A tokenizer whose way of splitting texts is not
    known is written with GPT-2's, and a warning.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **place)
    fields = GGUFReader(file).fields
    _restore_split(tokenizer, fields, file)
    with shown_as("read GGUF", "tensor"):
        model, found = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **place,
        )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, found.get(kind) or ())):
            raise ValueError(f"{kind.replace('_', ' ')}: {names[0]} of {len(names)}")
    # A model that was never quantized, because transformers refuses to save one that was.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    ends = _stop_tokens(tokenizer, fields)
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _restore_split(tokenizer: Any, fields: Mapping[str, Any], file: Path) -> None:
    """Let a byte-level tokenizer cut out digits first where the file says so."""
    backend = tokenizer.backend_tokenizer
    split = fields.get(_SPLIT)
    # transformers has set a split of its own if it knows the file's.
    if split is None or not isinstance(backend.pre_tokenizer, ByteLevel):
        return
    name = split.contents()
    if name in _DIGITS_FIRST:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    elif name not in _AS_GPT2:
        log.warning(
            "%s splits texts in a way that is not known (%s), so some texts have other tokens than "
            "in training; use the model's own folder if there is one",
            file,
            name,
        )


def _stop_tokens(tokenizer: Any, fields: Mapping[str, Any]) -> list[int]:
    """Return the ids that end a response: the tokenizer's EOS, and the end of a turn if named."""
    named = fields.get(_END_OF_TURN)
    ends = [tokenizer.eos_token_id, None if named is None else int(named.contents())]
    return list(dict.fromkeys(end for end in ends if end is not None))


def check_package(file: Path, role: str) -> None:
    """Raise UserError if the package gguf is missing."""
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise UserError(
            f"{role} model: {str(file)!r} needs the package gguf to be read; install "
            "opd-lightning[gguf]"
        )
