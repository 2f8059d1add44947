"""Check that the prompt files of a resumed run are those that it began with."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.rows import check_place
from opd_lightning.errors import UserError, note, reason_of
from opd_lightning.processes import Ranks

RECORD = ".prompts.json"
CHUNK = 2**20  # bytes read at once


class Content(NamedTuple):
    """Size and hash of a file, or of all files of a folder concatenated by name."""

    size: int  # bytes
    sha256: str

    @classmethod
    def of(cls, path: Path, size: int | None = None) -> Content:
        """Hash the first `size` bytes; all by default."""
        digest = hashlib.sha256()
        taken = 0
        for part in _chunks(path):
            part = part if size is None else part[: size - taken]
            digest.update(part)
            taken += len(part)
            if taken == size:
                break
        return cls(taken, digest.hexdigest())


class PromptFiles:
    """Record of every prompt file's content in the run folder, compared on resumption.

    JSON lines that have only grown are read up to their recorded size. Any other change is
    refused, since steps would hold other prompts and scores would be of other questions. Files
    are not read again while a run continues.

    Args:
        folder: The run folder; None records nothing.
        resumes: Whether the run is resumed, so that a record in the folder applies.
    """

    def __init__(self, folder: Path | None = None, *, resumes: bool = False) -> None:
        self.folder = folder
        self.resumes = resumes
        self._sizes: dict[PromptSource, int] = {}

    def agree(
        self,
        sources: Mapping[str, PromptSource],
        ranks: Ranks,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Fix how many bytes of every file are read, before any is; the same on all ranks.

        Args:
            sources: Prompt sources by their key in the record, such as "data.train" and
                "data.validation.math"; of mixed ones their parts are recorded.
            ranks: All ranks must call; rank 0 writes the record and prints notes.
            options: Configuration keys of the sources that have another key in the record.

        Raises:
            UserError: A file is absent, or was changed; a folder is no saved dataset.
        """
        options = {name: name for name in sources} | dict(options or {})
        parts = [
            (f"{name}{part}", f"{options[name]}{part}.path", one)
            for name, source in sources.items()
            for part, one in source.parts().items()
        ]
        sources = {name: one for name, _, one in parts}
        paths = {name: one.file for name, one in sources.items() if one.file is not None}
        for name, option, _ in parts:
            if name in paths:
                check_place(option, paths[name])
        if self.folder is None:
            return
        record = self.folder / RECORD
        known: dict[str, Content] = {}
        first = ranks.rank == 0
        if first:
            if self.resumes:
                known = {name: one for name, one in _recorded(record).items() if name in paths}
            known |= {name: Content.of(paths[name]) for name in paths.keys() - known.keys()}
        known = ranks.gather(known)[0]
        for name, content in known.items():
            self._check(name, paths[name], content, first=first)
            self._sizes[sources[name]] = content.size
        if first:
            self.folder.mkdir(parents=True, exist_ok=True)
            plain = {name: content._asdict() for name, content in known.items()}
            unfinished = record.with_suffix(".tmp")
            unfinished.write_text(json.dumps(plain, indent=1), encoding="utf-8")
            unfinished.replace(record)

    def size(self, source: PromptSource) -> int | None:
        """Return the number of bytes of a source's file to read; None for all."""
        return self._sizes.get(source)

    def _check(self, name: str, path: Path, before: Content, *, first: bool) -> None:
        may_grow = path.suffix == ".jsonl" and path.is_file()
        if Content.of(path, before.size if may_grow else None) != before:
            raise UserError(
                f"{name}: {str(path)!r} is not what this run began with ({before.size} bytes, "
                f"sha256 {before.sha256[:12]}...), so steps and scores would be of other prompts; "
                "put the old file back, start a new run from an exported student, or give a suite "
                "of other prompts another name"
            )
        grown = path.stat().st_size - before.size if may_grow else 0
        if grown and first:
            note(
                f"{name}: {str(path)!r} has grown by {grown} bytes since the run began; this run "
                "ignores them, a new run reads them"
            )


def _recorded(record: Path) -> dict[str, Content]:
    """Read the record of a run; empty if there is none."""
    if not os.path.lexists(record):
        return {}
    try:
        if not record.is_file():
            raise ValueError("it is no file")
        saved = json.loads(record.read_text(encoding="utf-8"))
        found = {name: Content(**content) for name, content in saved.items()}
        for name, (size, sha256) in found.items():
            if type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{64}", sha256):
                raise ValueError(f"{name!r} has no size and sha256")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{str(record)!r}: cannot be read: {reason_of(error, 120)}; it is the record of the "
            "prompts that this run began with: put it back, or delete it if they are as they were"
        ) from error
    return found


def _chunks(path: Path) -> Iterator[bytes]:
    inside = sorted(p for p in path.rglob("*") if p.is_file())
    # `datasets` leaves cache files when another process works with the folder.
    for file in [path] if path.is_file() else [p for p in inside if p.name[:6] != "cache-"]:
        if file != path:
            yield str(file.relative_to(path)).encode()
        with file.open("rb") as opened:
            while part := opened.read(CHUNK):
                yield part
