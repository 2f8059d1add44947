"""Teacher scores on disk, in shards that are written atomically and indexed by content hashes.

A folder holds `teacher.json` and shards `scores-<checksum>.safetensors`. A shard has M rows of N
response tokens in all, flat:

    keys          [M, 16] uint8     hash of (prompt ids, response ids)
    ends          [M] int64         end of each row's tokens; a row starts at the previous end
    logprobs      [N] float32       nats, of the response's tokens
    entropy       [N] float32       nats; NaN where the teacher does not return it
    top_ids       [N, K] int32      most probable first
    top_logprobs  [N, K] float32    nats
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from torch import Tensor

from opd_lightning.errors import UserError

DESCRIPTION = "teacher.json"
FORMAT = 1
OPEN_SHARDS = 64  # memory maps kept open
DIGEST = 16  # bytes of keys and checksums


@dataclass(frozen=True, kw_only=True)
class Description:
    """Teacher and settings of the scores in a store."""

    teacher: str  # see `model_identity`
    temperature: float  # divisor of the logits
    top_k: int  # number of top tokens; fewer if the vocabulary is smaller
    format: int = FORMAT


class RowScores(NamedTuple):
    """Scores of one response of T tokens."""

    logprobs: Tensor  # [T] float32 nats
    entropy: Tensor  # [T] float32 nats
    top_ids: Tensor  # [T, K] int32
    top_logprobs: Tensor  # [T, K] float32 nats


def row_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bytes:
    """Return a 128-bit hash of a prompt and its response."""
    digest = blake2b(len(prompt_ids).to_bytes(8, "little"), digest_size=DIGEST)
    digest.update(np.asarray([*prompt_ids, *response_ids], dtype="<i4").tobytes())
    return digest.digest()


class ScoreStore:
    """Reader of stored scores. Only the keys are held in memory.

    Every shard is read once and compared with its checksum when the store is opened.

    Args:
        folder: Folder in the format of this module.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description = read_description(folder)
        self.shards = sorted(folder.glob("scores-*.safetensors"))
        self._places: dict[bytes, tuple[int, int, int]] = {}  # shard, first token, last + 1
        for number, shard in enumerate(self.shards):
            _verify(shard)
            with safe_open(shard, "numpy") as file:
                keys, ends = file.get_tensor("keys"), file.get_tensor("ends").tolist()
            for key, start, end in zip(keys, [0, *ends], ends, strict=False):
                self._places[key.tobytes()] = (number, start, end)
        self._open = lru_cache(OPEN_SHARDS)(self._opened)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, key: bytes, top_k: int) -> RowScores:
        """Return a row's scores with at most `top_k` top tokens; raise KeyError if missing."""
        number, start, end = self._places[key]
        parts = self._open(number)
        tops = (parts[name][start:end, :top_k] for name in ("top_ids", "top_logprobs"))
        return RowScores(parts["logprobs"][start:end], parts["entropy"][start:end], *tops)

    def _opened(self, number: int) -> dict[str, Any]:
        file = safe_open(self.shards[number], "pt")
        return {name: file.get_slice(name) for name in RowScores._fields}


def exists(folder: Path) -> bool:
    """Return whether `folder` contains a store."""
    return (folder / DESCRIPTION).is_file()


def shard_name(content: bytes) -> str:
    """Return the file name of a shard, which contains the checksum of its content."""
    return f"scores-{blake2b(content, digest_size=DIGEST).hexdigest()}.safetensors"


def read_description(folder: Path) -> Description:
    place = folder / DESCRIPTION
    if not place.is_file():
        raise UserError(
            f"no cached scores in {str(folder)!r}; make them with `opd cache-teacher --config ...`"
        )
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        if found["format"] == FORMAT:
            return Description(**found)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(place)!r} is damaged: {error}; delete the folder and run `opd cache-teacher` "
            "again"
        ) from error
    raise UserError(
        f"{str(place)!r} is of format {found['format']}, expected {FORMAT}; name a new folder and "
        "run `opd cache-teacher` again"
    )


def _verify(shard: Path) -> None:
    with shard.open("rb") as file:
        digest = file_digest(file, lambda: blake2b(digest_size=DIGEST)).hexdigest()
    if digest not in shard.name:
        raise UserError(
            f"{str(shard)!r} is damaged: its content does not have the checksum in its name; "
            "delete this file and run `opd cache-teacher` again"
        )
