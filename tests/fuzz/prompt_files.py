"""Prompt files: JSON lines, parquet and saved datasets, changed in a row or damaged as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests import processes
from tests.fuzz import mutations
from tests.fuzz.kinds import Input, Kind, copied, done
from tests.fuzz.outcome import Outcome
from tests.fuzz.small_run import STUDENT, TEACHER, settings, write_models
from tests.fuzz.warm import Warm

LINES, PARQUET, FOLDER = "prompts.jsonl", "prompts.parquet", "prompts"
ROWS: list[dict[str, Any]] = [
    {"prompt": "12+34=", "answer": "46", "domain": "add-2", "id": "a", "privileged": "it is 46",
     "response": "2+4:6,1+3:4;46"},
    {"messages": [{"role": "system", "content": "count."}, {"role": "user", "content": "1+2="}],
     "answer": 3, "privileged": "three", "response": "1+2:3;3"},
    {"messages": [{"role": "user", "content": "5-2="}], "answer": "3", "privileged": "three",
     "response_ids": [34, 8, 1]},
    {"prompt": "7-7=", "answer": 0, "response": "7-7:0;0", "privileged": "nothing", "source": "x"},
    {"prompt": "9+1=", "answer": "10", "response": "9+1:10;10", "id": 7, "privileged": "ten"},
]  # fmt: skip
# The same for formats whose columns have types.
COLUMNS = ("prompt", "answer", "response", "privileged", "domain", "id")
SETUPS = [
    (name, method, on_bad_row)
    for name in (LINES, PARQUET, FOLDER)
    for method in ("OPD", "SFT")
    for on_bad_row in ("error", "skip")
]
CONTEXT = 256  # tokens of the models


class PromptFiles(Kind):
    """`opd fit` with one optimiser step; every row is used, or counted, or the run refused."""

    name = "prompt_files"

    def __init__(self) -> None:
        self._warm: dict[str, Warm] = {}

    def prepare(self, base: Path) -> None:
        done(processes.call(write_models, str(base / STUDENT), str(base / TEACHER)))
        for name, method, on_bad_row in SETUPS:
            config = settings(name, method=method, on_bad_row=on_bad_row)
            (base / _config(name, method, on_bad_row)).write_text(yaml.safe_dump(config))
        done(processes.call(write_tables, str(base)))

    def make(self, random: Random, base: Path) -> Input:
        name = random.choices((LINES, PARQUET, FOLDER), (60, 20, 20))[0]
        method, on_bad_row = random.choice(("OPD", "SFT")), random.choice(("error", "skip"))
        facts = {"setup": [name, method, on_bad_row]}
        places = (name,)
        if name == PARQUET:
            content, how = mutations.damaged(random, (base / PARQUET).read_bytes())
            return Input(f"{name}: {how}", {PARQUET: content}, (), places, facts)
        if name == FOLDER:
            return self._folder(random, base, facts)
        rows = [dict(row) for row in ROWS]
        if random.random() < 0.3:
            content, how = mutations.damaged(random, _lines([json.dumps(row) for row in rows]))
            return Input(f"{name}: {how}", {name: content}, (), places, facts)
        number = random.randrange(len(rows))
        change = mutations.changed(random, rows[number])
        lines = [json.dumps(row) for row in rows]
        lines[number] = mutations.as_json(change.tree)
        keys = ".".join(str(key) for key in change.path)
        what = f"{name}:{number + 1}: {keys}: {change.what}: {change.value!r:.60}"
        return Input(what, {name: _lines(lines)}, (), places, facts)

    def _folder(self, random: Random, base: Path, facts: dict[str, Any]) -> Input:
        inside = sorted(p for p in (base / FOLDER).rglob("*") if p.is_file())
        files = {str(p.relative_to(base)): p.read_bytes() for p in inside}
        name = random.choice(sorted(files))
        if name.endswith(".json") and random.random() < 0.6:
            change = mutations.changed(random, json.loads(files[name]))
            files[name] = mutations.as_json(change.tree).encode()
            keys = ".".join(str(key) for key in change.path)
            how = f"{keys}: {change.what}: {change.value!r:.60}"
        elif random.random() < 0.1:
            del files[name]
            how = "missing"
        else:
            files[name], how = mutations.damaged(random, files[name])
        return Input(f"{name}: {how}", files, (), (FOLDER,), facts)

    def run(self, given: Input, base: Path, folder: Path) -> Outcome:
        config = _config(*given.facts["setup"])
        if config not in self._warm:
            self._warm[config] = Warm("fit", "--config", config, stop="fit", cwd=base)
        copied(base, folder, ("home", "tmp", "*.yaml", FOLDER, PARQUET))
        given.write(folder)
        outcome = self._warm[config].run((), folder, seconds=self.seconds)
        ignored = self._ignored(given, outcome) if outcome.accepted else ""
        return replace(outcome, places=given.places, ignored=ignored)

    def _ignored(self, given: Input, outcome: Outcome) -> str:
        """What an accepted file holds that was neither used nor told of."""
        name, method, on_bad_row = given.facts["setup"]
        told = "\n".join(outcome.err)
        found = re.search(r"skipped (\d+) of (\d+) rows", told)
        skipped, seen = (int(found[1]), int(found[2])) if found else (0, 0)
        if on_bad_row == "error" and skipped:
            return f"{skipped} rows were skipped"
        if name != LINES:
            return ""
        rows = [line for line in given.files[LINES].split(b"\n") if line.strip()]
        if found and seen != len(rows):
            return f"{seen} rows were read of {len(rows)}"
        bad = [(i, why) for i, row in enumerate(rows, 1) if (why := wrong(row, method)) is not None]
        if len(bad) > skipped:
            return f"row {bad[0][0]} was used, though {bad[0][1]}"
        bad_rows = {i for i, _ in bad}
        used = [row for i, row in enumerate(rows, 1) if i not in bad_rows]
        unread = {key for row in used for key in unread_keys(row)}
        return f"messages hold {min(unread)!r}" if unread and "message" not in told else ""

    def close(self) -> None:
        for warm in self._warm.values():
            warm.close()


def _config(name: str, method: str, on_bad_row: str) -> str:
    return f"{name}-{method}-{on_bad_row}.yaml"


def _lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def write_tables(base: str) -> None:
    """Write the rows that have a text as prompt to a parquet file and a folder of `datasets`."""
    import pyarrow as pa
    from datasets import Dataset
    from pyarrow import parquet

    rows = [
        {name: None if row.get(name) is None else str(row[name]) for name in COLUMNS}
        for row in ROWS
        if "prompt" in row
    ]
    parquet.write_table(pa.Table.from_pylist(rows), Path(base, PARQUET))
    Dataset.from_list(rows).save_to_disk(str(Path(base, FOLDER)))


def wrong(line: bytes, method: str) -> str | None:
    """Say why a JSON line cannot be used as a row; None if it can, as far as is told here.

    Written anew and from the documentation, to judge the program by.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_unique)
    except _TwiceError as error:
        return f"{error} is in it twice"
    except (ValueError, RecursionError) as error:
        return f"it is no JSON: {error}"
    if not isinstance(row, Mapping):
        return "it is no object"
    chat = row.get("messages") if row.get("messages") is not None else row.get("prompt")
    if isinstance(chat, str):
        chat = [{"role": "user", "content": chat}] if chat.strip() else None
    if not isinstance(chat, list) or not chat:
        return "it has no messages"
    for message in chat:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            return "a message has no content"
        if message.get("role") not in ("system", "user", "assistant"):
            return "a message has no role"
    for name in ("answer", "response", "privileged", "domain", "id"):
        value = row.get(name)
        numbers = (int, float) if name in ("answer", "id") else ()
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, (str, *numbers)) or value != value
        ):
            return f"{name} is {value!r:.40}"
    if method == "OPD" and row.get("answer") is None:
        return "it has no answer to verify by"
    if method == "SFT" and row.get("response") is None and row.get("response_ids") is None:
        return "it has no response to learn"
    if any("\ud800" <= character <= "\udfff" for text in _texts(row) for character in text):
        return "it has half a surrogate pair"
    return None


def unread_keys(line: bytes) -> set[str]:
    """Keys of the messages of a usable row that no chat template is given."""
    row = json.loads(line.decode("utf-8-sig"))
    chat = row.get("messages") if row.get("messages") is not None else row.get("prompt")
    return {key for message in chat if isinstance(message, dict) for key in message} - {
        "role",
        "content",
    }


class _TwiceError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise _TwiceError(repr(key))
        seen[key] = value
    return seen


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    for name in ("answer", "response", "privileged", "prompt"):
        if isinstance(row.get(name), str):
            yield row[name]
