"""Files of a local model folder, checked without reading weights."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from opd_lightning.errors import UserError, reason_of
from opd_lightning.models import strict_json

CONFIGURATION = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.json",
)
_TEXTS = ("chat_template.jinja", "merges.txt", "tokenizer.model", "spiece.model")
_LFS = b"version https://git-lfs.github.com/spec/"
_MOST_LAYERS = 10_000
_MOST_TOKENS = 2**24
_ENTRY = {"dtype", "shape", "data_offsets"}  # keys of a tensor in the header
_MAX_HEADER = 100_000_000  # bytes; safetensors refuses larger ones
_MAX_JSON = 2**28  # bytes of a JSON file; large tokenizers have 2**25
_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"  # in transformers' order


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: str  # as safetensors names it, such as "BF16"
    shape: tuple[int, ...]


Tensors = dict[str, Stored]


def check_texts(folder: Path, names: tuple[str, ...], role: str) -> None:
    """Raise UserError if a JSON file is damaged, or a text file is a Git LFS pointer.

    Args:
        folder: Local folder; files that it lacks are skipped.
        names: JSON files; those of a tokenizer bring its other files along.
        role: Use of the model; named in errors.
    """
    also = _TEXTS if names == TOKENIZER else ()
    for name in (*names, *also):
        if (folder / name).is_file():
            refuse_pointer(folder / name, role)
    for name in names:
        if not (folder / name).is_file():
            continue
        content = _read_object(folder / name, role)
        if name == "config.json":
            _check_config(folder / name, content, role)
        if name == "tokenizer.json" and (largest := _largest_id(content)) >= _MOST_TOKENS:
            raise _error(folder / name, role, f"says the id of a token is {str(largest)[:20]}")


def _check_config(file: Path, content: Mapping[str, Any], role: str) -> None:
    """Raise UserError for values that transformers would fail on, or allocate memory for."""
    classes = content.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):
        raise _error(file, role, "has architectures that are no list of names")
    for key, value in content.items():
        # transformers makes a list of them when it reads the configuration.
        if "layers" in key and isinstance(value, int) and value > _MOST_LAYERS:
            raise _error(file, role, f"says {key} is {str(value)[:20]}")


def _largest_id(content: Mapping[str, Any]) -> int:
    """Return the largest id in a tokenizer.json; the library allocates memory up to it."""
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else []
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    return max((i for i in ids if isinstance(i, int)), default=0)


def check_weights(folder: Path, role: str) -> Tensors:
    """Check that the weight files exist and are whole; return what tensors they hold, by name.

    Of safetensors files the headers are read; of pickle files, which are zip archives, the
    directories; their tensors are not returned.

    Raises:
        UserError: A file is missing, truncated or a Git LFS pointer.
    """
    tensors: Tensors = {}
    for file in _weight_files(folder, role):
        refuse_pointer(file, role)
        if file.suffix == ".safetensors":
            tensors |= _tensors(file, role)
        else:
            _check_archive(file, role)
    return tensors


def _weight_files(folder: Path, role: str) -> Iterator[Path]:
    """Yield the files that transformers reads."""
    for name in (_SAFETENSORS, _PICKLE):
        if (folder / name).is_file():
            yield folder / name
            return
        index = folder / f"{name}.index.json"
        if index.is_file():
            refuse_pointer(index, role)
            content = _read_object(index, role)
            listed = content.get("weight_map")
            if not isinstance(listed, Mapping) or not listed:
                raise _error(index, role, "has no weight_map")
            if not isinstance(content.get("metadata", {}), Mapping):
                raise _error(index, role, "has metadata that are no object")
            if names := [name for name in listed.values() if not isinstance(name, str)]:
                raise _error(index, role, f"names {str(names[0])[:40]!r}, which is no file")
            for shard in sorted({*listed.values()}):
                if not (folder / shard).is_file():
                    raise _error(index, role, f"names {shard!r}, which is not there")
                yield folder / shard
            return
    raise UserError(
        f"{role} model {str(folder)!r}: got no weights, expected {_SAFETENSORS}, its shards, or "
        f"{_PICKLE}; get the whole folder"
    )


def _tensors(file: Path, role: str) -> Tensors:
    """Return the entries of a safetensors header. Raise UserError if the file is incomplete."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise _error(file, role, f"is no whole safetensors file ({size} bytes)")
        try:
            header = strict_json.loads(stream.read(length))
            listed = {name: x for name, x in header.items() if name != "__metadata__"}
            end = max((x["data_offsets"][1] for x in listed.values()), default=0)
            tensors = {name: Stored(str(x["dtype"]), (*x["shape"],)) for name, x in listed.items()}
            if unknown := {key for x in listed.values() for key in x} - _ENTRY:
                raise ValueError(f"unknown key {min(unknown)!r}")
        except (
            ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError
        ) as error:  # fmt: skip
            raise _error(file, role, f"has a damaged header ({reason_of(error, 100)})") from error
    if size != 8 + length + end:
        raise _error(file, role, f"has {size} bytes, and its header says {8 + length + end}")
    return tensors


def _check_archive(file: Path, role: str) -> None:
    with file.open("rb") as stream:
        start = stream.read(4)
    # The directory of a zip archive is at its end. Files of old versions are no archives.
    if not start or (start.startswith(b"PK") and not zipfile.is_zipfile(file)):
        raise _error(file, role, f"is cut ({file.stat().st_size} bytes)")


def refuse_pointer(file: Path, role: str) -> None:
    """Raise UserError if a file is a Git LFS pointer."""
    with file.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise UserError(
                f"{role} model: {str(file)!r} is a Git LFS pointer, not the file itself; run "
                "`git lfs pull` in its folder"
            )


def _read_object(file: Path, role: str) -> Mapping[str, Any]:
    """Return the object in a JSON file."""
    if (size := file.stat().st_size) > _MAX_JSON:
        raise _error(file, role, f"has {size} bytes, expected at most {_MAX_JSON}")
    try:
        content = strict_json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _error(file, role, f"is no JSON file ({str(error)[:100]})") from error
    if not isinstance(content, dict):
        raise _error(file, role, f"holds a {type(content).__name__}, expected an object")
    return content


def _error(file: Path, role: str, what: str) -> UserError:
    return UserError(f"{role} model: {str(file)!r} {what}; get the file again")
