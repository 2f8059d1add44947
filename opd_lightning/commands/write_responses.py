"""`opd write-responses`: sampled responses to a prompt file, with token ids."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

from opd_lightning.checkpoints import whole
from opd_lightning.commands.export import load_student
from opd_lightning.data.engines import push
from opd_lightning.data.mix import RolloutMix, samplings_by_author
from opd_lightning.data.row_checks import RowChecks
from opd_lightning.data.views import Renderer
from opd_lightning.data.writer import RolloutWriter, Row
from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts.base import Engine, Sampling
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.run.lock import held_file
from opd_lightning.run.model_checks import check_same_tokens, check_usable
from opd_lightning.run.outputs import check_file, check_folder
from opd_lightning.run.prompt_checks import PromptCheck
from opd_lightning.seeding import WRITTEN_SAMPLE, derive_seed
from opd_lightning.terminal.progress import Progress
from opd_lightning.timing import StepTimer
from opd_lightning.training.base import DistillationModule
from opd_lightning.types import Author, Prompt, Rollout

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
GIVEN = ("id", "messages", "answer", "privileged", "domain")  # fields that a prompt decides


@dataclass(frozen=True)
class _Author:
    """Model that writes the responses, with its engine and sampling."""

    kind: Author
    source: ModelSource
    engine: Engine
    sampling: Sampling


def write_responses(
    module: DistillationModule,
    data: RolloutDataModule,
    out: Path,
    *,
    kind: Author,
    samples: int,
    batch_size: int,
    ckpt_path: str | None,
) -> None:
    """Write `samples` responses to every prompt of `data.train`; complete `out` if it exists.

    A row has the prompt's fields, `response`, `response_ids`, `stop_reason`, `reward` if there is a
    verifier, and `written_by`: model, sampling and seed, the same for all rows of a file. Its id is
    the prompt's id and the number of the sample. The file is locked against other writers. A file
    with rows of other prompts than those of `data.train` is refused.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"--{name}: got {value}, expected at least 1")
    if out.is_dir() or (out.exists() and not out.is_file()):
        raise UserError(f"--out: got {str(out)!r}, expected a file to write")
    check_folder("--out", out.parent)
    if out.exists():
        check_file("--out", out)
    author = _author(module, data, kind, ckpt_path)
    renderer = Renderer(author.source.tokenizer, data.template_args, {}, author.source.eos_ids)
    prompts, ids = _prompts(module, data, renderer, author)
    sampling, budget = author.sampling, author.sampling.max_new_tokens
    written_by = (
        f"{kind} {author.source.identity}"
        # A run overwrites its last.ckpt, so the path alone does not identify the weights.
        + (f", checkpoint {ckpt_path} of step {whole(ckpt_path).step}" if ckpt_path else "")
        + f", temperature {sampling.temperature}"
        + (f", top_p {sampling.top_p}, top_k {sampling.top_k}" if sampling.is_truncated else "")
        + f", max_new_tokens {budget}, seed {data.seed}"
    )
    rows = [
        (f"{prompt.id}/{sample}", Row(prompt, ids[i], i, kind, seed))
        for i, prompt in enumerate(prompts)
        for sample in range(samples)
        for seed in [derive_seed(WRITTEN_SAMPLE, data.seed, i, sample)]
    ]
    with _full_in_one_line(out), held_file(out), out.open("a+b") as file:
        done = _recover(file, out, written_by, {name: row.prompt for name, row in rows})
        rows = [(name, row) for name, row in rows if name not in done]
        print(f"{out}: {len(done)} rows are there, {len(rows)} are to be written")
        if rows:
            engines = {author.kind: author.engine}
            writer = RolloutWriter(engines, data.verifier, renderer, StepTimer())
            if ckpt_path is not None:
                load_student(module.student, ckpt_path)
            author.engine.start(author.source, max_length=max(map(len, ids)) + budget)
            try:
                if kind is Author.STUDENT:
                    module.student.load()
                    push(module.student, author.engine, version=0)
                _write(file, rows, writer, author, batch_size * samples, written_by)
            finally:
                author.engine.close()


def _author(
    module: DistillationModule, data: RolloutDataModule, kind: Author, ckpt_path: str | None
) -> _Author:
    student = module.student.source
    check_usable(student)
    sampling = samplings_by_author(data.sampling, RolloutMix(), data.teacher)
    if kind is Author.STUDENT:
        if data.engine is None:
            raise UserError("data.engine: got nothing, but responses must be sampled; set one")
        return _Author(kind, student, data.engine, sampling[kind])
    if data.teacher is None:
        raise UserError("data.teacher: got nothing for --author teacher; name its path and engine")
    if ckpt_path is not None:
        raise UserError("--ckpt_path: got one with --author teacher, which has none; leave it out")
    check_usable(data.teacher.source)
    check_same_tokens(student, data.teacher.source, writes=True)
    return _Author(kind, data.teacher.source, data.teacher.engine, sampling[kind])


def _prompts(
    module: DistillationModule, data: RolloutDataModule, renderer: Renderer, author: _Author
) -> tuple[list[Prompt], list[list[int]]]:
    """Return the prompts and their ids, after checks."""
    if data.train is None:
        raise UserError("data.train: got nothing, expected a file of prompts to answer")
    mix = RolloutMix(teacher=1) if author.kind is Author.TEACHER else RolloutMix()
    fits = PromptCheck(module, renderer, author.sampling, mix, data.teacher)
    checks = RowChecks(renderer, data.verifier, fits)
    prompts = data.train.load(checks=checks)
    return prompts, checks.ids_of(prompts)


@contextmanager
def _full_in_one_line(out: Path) -> Iterator[None]:
    """Turn a full disk, which may also show when the file is closed, into a one-line error."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RunStoppedError(
            f"--out: could not write {str(out)!r}: {error.strerror}; make room and run the same "
            "again: complete rows are kept"
        ) from error


def _recover(file: BinaryIO, out: Path, written_by: str, prompts: Mapping[str, Prompt]) -> set[str]:
    """Return the ids of complete rows; remove an incomplete last line from the file.

    An incomplete first line is removed only if it is that of the first row.

    Args:
        file: The file, open for reading and writing.
        out: Its path, for messages.
        written_by: What its rows must be written by.
        prompts: What they must answer, by the id of the row.
    """
    first = _given(*next(iter(prompts.items())))
    beginning = json.dumps(first, ensure_ascii=False).encode()[:-1]  # up to the response
    file.seek(0)
    done, end = set(), 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            if number == 1 and not (line.startswith(beginning) or beginning.startswith(line)):
                raise UserError(
                    f"--out: {out}:1 is incomplete and was not written by this command for these "
                    "prompts; name another file"
                )
            break
        end += len(line)
        row: Any = None
        try:
            row = json.loads(line)
            name, author = str(row["id"]), row["written_by"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--out: {out}:{number} was not written by this command; name another file"
            ) from error
        if author != written_by:
            raise UserError(
                f"--out: {out}:{number} was written by {author!r}, but this would be "
                f"{written_by!r}; name another file"
            )
        prompt = prompts.get(name)
        if prompt is None or _given(name, prompt) != {f: row[f] for f in GIVEN if f in row}:
            now = "has none of this id" if prompt is None else f"has another at {prompt.origin}"
            raise UserError(
                f"--out: {out}:{number} answers a prompt, {name[:80]!r}, that data.train no longer "
                f"has: it {now}; restore prompts and --samples, or name another file"
            )
        done.add(name)
    file.truncate(end)
    return done


def _write(
    file: BinaryIO,
    rows: Sequence[tuple[str, Row]],
    writer: RolloutWriter,
    author: _Author,
    batch_size: int,
    written_by: str,
) -> None:
    """Write responses batch by batch; sync each to disk before the next."""
    began, tokens = monotonic(), 0
    with Progress("generate", len(rows), "response") as bar:
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            rollouts = writer.write([row for _, row in part], {author.kind: author.sampling})
            for (name, _), rollout in zip(part, rollouts, strict=True):
                line = json.dumps(_row(name, rollout, written_by), ensure_ascii=False)
                file.write(line.encode() + b"\n")
                tokens += len(rollout.response_ids)
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(part))
    rate = tokens / (monotonic() - began)
    print(f"wrote {len(rows)} responses, {tokens} tokens, {rate:.0f} tokens/s")


def _row(name: str, rollout: Rollout, written_by: str) -> dict[str, Any]:
    fields = {
        "response": rollout.text,
        "response_ids": rollout.response_ids,
        "stop_reason": rollout.stop_reason,
        "reward": None if math.isnan(rollout.reward) else rollout.reward,
        "written_by": written_by,
    }
    known = {field: value for field, value in fields.items() if value is not None}
    return _given(name, rollout.prompt) | known


def _given(name: str, prompt: Prompt) -> dict[str, Any]:
    """Return the fields of a row that its prompt decides, in order."""
    fields: dict[str, Any] = {field: getattr(prompt, field) for field in GIVEN}
    fields |= {"id": name, "messages": list(prompt.messages)}
    return {field: value for field, value in fields.items() if value is not None}
