"""Rows of a prompt file: JSON lines, parquet, or a folder saved by `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opd_lightning.errors import UserError

READABLE = "a .jsonl or .parquet file or a folder written by Dataset.save_to_disk"


def read_rows(
    path: str, size: int | None = None
) -> Iterator[tuple[int, bytes | Mapping[str, Any]]]:
    """Yield (row number from 1, row); a JSON line is undecoded bytes, so that errors name it.

    Args:
        path: A file or folder.
        size: Read JSON lines up to this many bytes; None reads all.
    """
    place = Path(path)
    if place.is_dir():
        return _read_folder(place)
    if not place.is_file():
        raise UserError(f"no prompt file at {path!r}; give {READABLE}")
    if place.suffix == ".jsonl":
        return _read_jsonl(place, size)
    if place.suffix == ".parquet":
        return _read_parquet(place)
    raise UserError(f"cannot read {path!r}: unknown suffix {place.suffix!r}; give {READABLE}")


def _read_jsonl(path: Path, size: int | None) -> Iterator[tuple[int, bytes]]:
    taken = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if size is not None:
                raw = raw[: size - taken]
            taken += len(raw)
            if raw.strip():
                yield line, raw


def _read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read '{path}' as parquet: {reason}; give {READABLE}") from error
    with file:
        row = 0
        for batch in file.iter_batches():
            for values in batch.to_pylist():
                row += 1
                yield row, values


def _read_folder(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise UserError(
            f"'{path}' holds several splits ({', '.join(splits)}); give the folder of one, such as "
            f"'{path / splits[0]}'"
        )
    if not (path / "state.json").is_file():
        raise UserError(f"'{path}' is not a saved dataset: it has no state.json; give {READABLE}")
    from datasets import load_from_disk

    yield from enumerate(load_from_disk(str(path)).with_format(None), start=1)
