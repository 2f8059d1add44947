"""`opd cache-teacher`: teacher scores of all recorded responses, written to a cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from time import monotonic

import torch

from opd_lightning.data.collate import collate
from opd_lightning.models.student import Student
from opd_lightning.teachers.base import RecordedQuestion, Teacher
from opd_lightning.teachers.cached import CachedTeacher
from opd_lightning.teachers.score_store import Description, RowScores
from opd_lightning.teachers.score_writer import ScoreWriter
from opd_lightning.terminal.progress import Progress
from opd_lightning.types import Author, Rollout, RolloutBatch, StepTotals, StopReason, Totals

ROUND = 16  # batches prefetched at a time
_Part = list[tuple[bytes, RecordedQuestion]]


def fill(
    cached: CachedTeacher, *, student: Student, device: torch.device, batch_tokens: int
) -> None:
    """Score the responses that are not in the cache, write the scores and print a summary.

    Args:
        cached: Teacher after its checks with `collect_unknown`.
        student: Argument of `Teacher.load`, as in training; its weights are not loaded.
        device: Device of a local teacher.
        batch_tokens: Largest number of tokens of a batch, prompts and padding included. A longer
            row is a batch by itself.
    """
    assert cached.unknown is not None
    assert cached.description is not None
    known = len(cached.store) if cached.store is not None else 0
    tokens = sum(len(q.response_ids) for q in cached.unknown.values())
    print(f"{cached.folder}: {known} rows are there, {len(cached.unknown)} are to be scored")
    if not cached.unknown:
        return
    description, teacher = cached.description, cached.teacher
    began = monotonic()
    try:
        teacher.load(device, student)
        with (
            ScoreWriter(cached.folder, description) as writer,
            Progress("score", tokens, "token") as bar,
        ):
            for parts in _rounds(cached.unknown, batch_tokens):
                batches = [_collate(part, description, student).to(device) for part in parts]
                for batch in batches:
                    teacher.prefetch(batch, "student", top_k=description.top_k)
                for part, batch in zip(parts, batches, strict=True):
                    answers = _ask(teacher, batch, description.top_k)
                    for (key, _), scores in zip(part, answers, strict=True):
                        writer.add(key, scores)
                        bar.update(len(scores.logprobs))
                teacher.release()
    finally:
        teacher.close()
    rate = tokens / (monotonic() - began)
    print(f"scored {len(cached.unknown)} rows, {tokens} response tokens, {rate:.0f} tokens/s")


def _rounds(
    questions: Mapping[bytes, RecordedQuestion], batch_tokens: int
) -> Iterator[list[_Part]]:
    """Yield batches of rows of similar length, at most `ROUND` at a time.

    The longest come first, so that running out of memory shows at once.
    """
    parts: list[_Part] = [[]]
    for key, question in sorted(questions.items(), key=lambda item: -_length(item[1])):
        if parts[-1] and _length(parts[-1][0][1]) * (len(parts[-1]) + 1) > batch_tokens:
            if len(parts) == ROUND:
                yield parts
                parts = []
            parts.append([])
        parts[-1].append((key, question))
    yield parts


def _length(question: RecordedQuestion) -> int:
    return len(question.prompt_ids) + len(question.response_ids)


def _collate(part: _Part, description: Description, student: Student) -> RolloutBatch:
    rollouts = [_rollout(question) for _, question in part]
    totals = Totals(sum(len(r.response_ids) for r in rollouts), len(rollouts))
    return collate(
        rollouts,
        totals=StepTotals(step=0, written=Totals(0, 0), demonstrated=totals),
        temperature=description.temperature,
        pad_id=student.source.pad_id,
    )


def _rollout(question: RecordedQuestion) -> Rollout:
    """Return the question as a rollout without views."""
    return Rollout(
        prompt=question.prompt,
        prompt_ids=question.prompt_ids,
        views={},
        group=0,
        response_ids=list(question.response_ids),
        behaviour_logprobs=[math.nan] * len(question.response_ids),
        stop_reason=StopReason.EOS,
        text="",
        reward=math.nan,
        group_mean=math.nan,
        group_std=math.nan,
        author=Author.RECORDED,
        dropped=False,
        policy_version=0,
    )


@torch.no_grad()
def _ask(teacher: Teacher, batch: RolloutBatch, top_k: int) -> Iterator[RowScores]:
    """Yield the teacher's scores by row, on the CPU."""
    mask = batch.response_mask
    scores = teacher.score(batch, "student", top_k=top_k)
    parts = (scores.logprobs, scores.entropy, scores.top_ids, scores.top_logprobs)
    columns = [part[mask] for part in parts]
    lengths = mask.sum(dim=1).tolist()
    logprobs, entropy, ids, top_logprobs = (column.cpu().split(lengths) for column in columns)
    for row in zip(logprobs, entropy, (part.int() for part in ids), top_logprobs, strict=True):
        yield RowScores(*row)
