"""Writer of a score store, in shards that are written atomically."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Self

import numpy as np
import torch
from safetensors.torch import save

from opd_lightning.errors import UserError
from opd_lightning.teachers.score_store import (
    DESCRIPTION,
    DIGEST,
    Description,
    RowScores,
    exists,
    read_description,
    shard_name,
)

SHARD_BYTES = 2**26
SHARD_SECONDS = 60.0  # maximum work that a killed process loses
PART = "unfinished.part"


class ScoreWriter:
    """Context manager that adds rows to a store, and creates the store if it does not exist.

    Its exit writes all added rows, also after an exception. A killed process loses only its
    unfinished shard. Two writers in one folder are refused.

    Args:
        folder: Folder of the store.
        description: Description of a new store; an existing one must have the same.
    """

    def __init__(self, folder: Path, description: Description) -> None:
        self.folder = folder
        self.description = description
        self._keys: list[bytes] = []
        self._rows: list[RowScores] = []
        self._bytes = 0
        self._since = monotonic()

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise UserError(
                f"another process is writing to {str(self.folder)!r}; wait until it is done"
            ) from error
        if exists(self.folder):
            self._check_description()
        else:
            content = json.dumps(asdict(self.description), indent=2) + "\n"
            self._write(DESCRIPTION, content.encode())
        return self

    def _check_description(self) -> None:
        found = read_description(self.folder)
        if found != self.description:
            os.close(self._lock)
            raise UserError(
                f"{str(self.folder)!r} holds scores of {found}, expected {self.description}; give "
                "every teacher a folder of its own"
            )

    def __exit__(self, *_: object) -> None:
        try:
            self.flush()
        finally:
            os.close(self._lock)

    def add(self, key: bytes, scores: RowScores) -> None:
        """Add a row; write the shard if it is full or older than `SHARD_SECONDS`."""
        self._keys.append(key)
        self._rows.append(scores)
        self._bytes += sum(part.nbytes for part in scores)
        if self._bytes >= SHARD_BYTES or monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the rows added since the last shard."""
        if self._rows:
            columns = {
                name: torch.cat([getattr(row, name) for row in self._rows])
                for name in RowScores._fields
            }
            keys = np.frombuffer(b"".join(self._keys), dtype=np.uint8).reshape(-1, DIGEST)
            lengths = torch.tensor([len(row.logprobs) for row in self._rows])
            places = {"keys": torch.from_numpy(keys.copy()), "ends": lengths.cumsum(0)}
            content = save(places | columns)
            self._write(shard_name(content), content)
        self._keys, self._rows, self._bytes, self._since = [], [], 0, monotonic()

    def _write(self, name: str, content: bytes) -> None:
        """Write a file atomically: it is synchronised to disk before it gets its name."""
        part = self.folder / PART
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.rename(self.folder / name)
        os.fsync(self._lock)
