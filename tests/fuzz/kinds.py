"""Kinds of inputs: how they are made, and run by the program.

A kind is a file with a subclass of `Kind` and a line in `KINDS`.
"""

from __future__ import annotations

import base64
import json
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.outcome import Outcome
from tests.processes import Process

KINDS = {
    "configurations": "tests.fuzz.configurations:Configurations",
    "prompt_files": "tests.fuzz.prompt_files:PromptFiles",
    "model_folders": "tests.fuzz.model_folders:ModelFolders",
    "checkpoints": "tests.fuzz.checkpoints:Checkpoints",
    "requests": "tests.fuzz.requests:Requests",
    "responses": "tests.fuzz.responses:Responses",
}


@dataclass(frozen=True)
class Input:
    """An input, made by a kind: plain data, which can be written down and run again.

    Attributes:
        what: What was mutated and how, in words.
        files: Content of files by their path in the folder of the input.
        words: The command line, or what else the program is told.
        places: What a refusal may name: one of these has to be in its line; empty: anything.
        facts: Plain data that the kind judges an acceptance by.
    """

    what: str
    files: dict[str, bytes] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        plain = {
            "what": self.what,
            "files": {name: _packed(content) for name, content in self.files.items()},
            "words": self.words,
            "places": self.places,
            "facts": self.facts,
        }
        return json.dumps(plain, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Input:
        plain = json.loads(text)
        return cls(
            plain["what"],
            {name: _unpacked(content) for name, content in plain["files"].items()},
            tuple(plain["words"]),
            tuple(plain["places"]),
            plain["facts"],
        )

    def write(self, folder: Path) -> None:
        """Write the files."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _packed(content: bytes) -> dict[str, str]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = None
    if text is not None and len(text) < 3000:
        return {"text": text}
    return {"zlib": base64.b64encode(zlib.compress(content, 9)).decode()}


def _unpacked(packed: dict[str, str]) -> bytes:
    if "text" in packed:
        return packed["text"].encode()
    return zlib.decompress(base64.b64decode(packed["zlib"]))


class Kind(ABC):
    """Makes and runs inputs of one kind.

    Attributes:
        name: Its name, that of its file.
        seconds: CPU seconds that an input may take.
    """

    name: str
    seconds: float = 20.0

    def prepare(self, base: Path) -> None:  # noqa: B027 - not every kind has any
        """Write the files that every input begins with to an empty folder; called once."""

    @abstractmethod
    def make(self, random: Random, base: Path) -> Input:
        """Return an input: what is drawn from `random` decides all of it.

        Args:
            random: Seeded by the coordinates of the input.
            base: The folder of `prepare`, to be read only.
        """

    @abstractmethod
    def run(self, given: Input, base: Path, folder: Path) -> Outcome:
        """Run the program on an input.

        Args:
            given: The input, of `make` or a kept case.
            base: The folder of `prepare`, to be read only.
            folder: An empty folder of its own.
        """

    def close(self) -> None:  # noqa: B027 - not every kind holds something
        """Let go of processes and files."""


def kind(name: str) -> Kind:
    """Return a new kind by its name."""
    module, _, owner = KINDS[name].partition(":")
    made: Kind = getattr(import_module(module), owner)()
    return made


def copied(base: Path, folder: Path, leave_out: Sequence[str] = ()) -> None:
    """Copy the files of a base folder, without those in some of its folders."""
    shutil.copytree(
        base, folder, ignore=shutil.ignore_patterns(*leave_out), dirs_exist_ok=True, symlinks=True
    )


def done(process: Process) -> None:
    """Wait for a process that must succeed."""
    out, err = process.communicate(600)
    if process.returncode:
        raise RuntimeError(f"{out}{err}")
