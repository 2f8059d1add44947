"""Rows of a prompt file: JSON lines, parquet, or a folder saved by `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from opd_lightning.errors import UserError, cut, reason_of

READABLE = "a .jsonl or .parquet file or a folder written by Dataset.save_to_disk"

LINE_BYTES = 2**27  # limit of a JSON line; a conversation has `chat.MAX_CHARACTERS` at most


class BadRowError(ValueError):
    """Error in one row; `PromptSource` adds the file and the line."""


Row = bytes | Mapping[str, Any] | BadRowError


def read_rows(path: str, size: int | None = None) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row); a JSON line is undecoded bytes, so that errors name it.

    A row whose values cannot be read is an error as a value; the rows behind it follow.

    Args:
        path: A file or folder.
        size: Read JSON lines up to this many bytes; None reads all.

    Raises:
        UserError: The file or folder cannot be read.
    """
    try:
        yield from _read(Path(path), size)
    except OSError as error:
        if error.errno is None:  # a library's, about the content
            raise _unreadable(Path(path), "prompts", error) from error
        raise UserError(
            f"cannot read {cut(path, 150)!r}: {error.strerror}; give {READABLE}"
        ) from error


def _read(place: Path, size: int | None) -> Iterator[tuple[int, Row]]:
    if place.is_dir():
        return _read_folder(place)
    if not place.is_file():
        raise UserError(f"no prompt file at {str(place)!r}; give {READABLE}")
    if place.suffix == ".jsonl":
        return _read_jsonl(place, size)
    if place.suffix == ".parquet":
        return _read_parquet(place)
    raise UserError(f"cannot read {str(place)!r}: unknown suffix {place.suffix!r}; give {READABLE}")


def _read_jsonl(path: Path, size: int | None) -> Iterator[tuple[int, Row]]:
    taken = 0
    with path.open("rb") as file:
        for line, (raw, length) in enumerate(_lines(file), start=1):
            if size is not None:
                length = min(length, size - taken)
            taken += length
            if length > LINE_BYTES:
                yield line, BadRowError(f"must have at most {LINE_BYTES} bytes, got {length}")
            elif (raw := raw[:length]).strip():
                yield line, raw


def _lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield the beginning of every line, no longer than is needed to refuse it, and its length."""
    while raw := file.readline(LINE_BYTES + 1):
        length, last = len(raw), raw
        while not last.endswith(b"\n") and (last := file.readline(LINE_BYTES)):
            length += len(last)
        yield raw, length


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in _rows_of(batch):
                    row += 1
                    yield row, values
    except Exception as error:  # a damaged file raises too many types to list
        if isinstance(error, OSError) and error.errno:  # from the disk
            raise
        raise _unreadable(path, "parquet", error, row) from error


def check_place(option: str, path: Path) -> None:
    """Raise UserError if no prompts can be at a path; `option` is where the run names it."""
    if not path.exists():
        raise UserError(f"{option}: no prompt file at {str(path)!r}; give {READABLE}")
    if path.is_dir():
        try:
            _check_folder(path)
        except UserError as error:
            raise UserError(f"{option}: {error}") from error


def _check_folder(path: Path) -> None:
    """Raise UserError if a folder is not what Dataset.save_to_disk wrote."""
    if (path / "dataset_dict.json").is_file():
        try:
            splits = [*map(str, json.loads((path / "dataset_dict.json").read_bytes())["splits"])]
            splits[0]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise _unreadable(path / "dataset_dict.json", "a list of splits", error) from error
        raise UserError(
            f"'{path}' holds several splits ({', '.join(splits)}); give the folder of one, such as "
            f"'{path / splits[0]}'"
        )
    if not (path / "state.json").is_file():
        raise UserError(f"'{path}' is not a saved dataset: it has no state.json; give {READABLE}")


def _read_folder(path: Path) -> Iterator[tuple[int, Row]]:
    _check_folder(path)
    from datasets import load_from_disk

    try:
        dataset = load_from_disk(str(path))
        dataset.data.validate(full=True)  # damaged offsets would read outside of the file
    except Exception as error:  # a damaged folder raises too many types to list
        raise _unreadable(path, "a saved dataset", error) from error
    yield from rows_of_dataset(dataset, str(path))


def rows_of_dataset(dataset: Any, path: str) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row) of a `datasets.Dataset`; `path` is its name in errors."""
    row = 0
    try:
        for values in dataset.with_format(None):
            row += 1
            yield row, values
    except Exception as error:  # from a damaged file
        raise _unreadable(path, "a saved dataset", error, row) from error


def _rows_of(batch: Any) -> Iterator[Row]:
    """Yield the rows of a record batch: all at once, or one by one if some cannot be read."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, RecursionError):
        yield from (_only_row(batch.slice(i, 1)) for i in range(batch.num_rows))
    else:
        yield from rows


def _only_row(batch: Any) -> Row:
    """Return the row of a batch of one, or what is wrong with it."""
    try:
        row: Mapping[str, Any] = batch.to_pylist()[0]
        return row
    except UnicodeDecodeError as error:
        return BadRowError(f"must be UTF-8, got a bad byte at position {error.start}")
    except RecursionError:
        return BadRowError("is nested too deeply to be read")
    except (ValueError, OverflowError) as error:
        return BadRowError(f"cannot be read: {reason_of(error, 150)}")


def _unreadable(path: Path | str, kind: str, error: Exception, row: int = 0) -> UserError:
    reason = reason_of(error, 150)
    where = f" behind row {row}" if row else ""
    return UserError(f"cannot read '{path}' as {kind}{where}: {reason}; give {READABLE}")


def shown(value: Any) -> str:
    """Return a value of a row as errors show it."""
    return "nothing" if value is None else cut(repr(value))
