"""Dispatch of prompts to one teacher per domain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.models.head import MixedStates, TokenStates, TopLogprobs
from opd_lightning.teachers.base import (
    DistributionTeacher,
    Teacher,
    provides_distributions,
    provides_top_k,
)
from opd_lightning.types import Prompt, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.models.student import Student


class _Share(NamedTuple):
    """Rows of a micro-batch that a teacher scores."""

    teacher: Teacher
    rows: list[int]  # none if the teacher is called for other ranks
    batch: RolloutBatch  # these rows, or one whose scores are not used


class ByDomainTeacher(DistributionTeacher):
    """Teacher that dispatches by `Prompt.domain` (G-OPD's multi-teacher runs; MOPD, 2606.30406).

    It returns what all of its teachers return: log-probs of sampled tokens, of top-k tokens, or
    whole distributions.

    Args:
        teachers: One per domain. A prompt of another domain is refused before training.
    """

    def __init__(self, teachers: dict[str, Teacher]) -> None:
        if not teachers:
            raise UserError("ByDomainTeacher.teachers: got none, expected one per domain")
        self.teachers = teachers
        self.domains = sorted(teachers)
        parts = teachers.values()
        self.provides = min(part.provides for part in parts)
        self.provides_entropy = all(part.provides_entropy for part in parts)
        self.scores_given_ids = all(
            provides_top_k(part) and part.scores_given_ids for part in parts
        )

    @property
    def is_collective(self) -> bool:
        return any(teacher.is_collective for teacher in self.teachers.values())

    def parts(self) -> list[Teacher]:
        return [part for teacher in self.teachers.values() for part in teacher.parts()]

    def responsible(self, prompt: Prompt) -> Teacher:
        return self.teachers[prompt.domain].responsible(prompt)

    def check_prompt(self, prompt: Prompt) -> None:
        self._check_domain(prompt)
        self.teachers[prompt.domain].check_prompt(prompt)

    def _check_domain(self, prompt: Prompt) -> None:
        if prompt.domain not in self.teachers:
            raise UserError(
                f"{prompt.origin or prompt.id}: no teacher for domain {prompt.domain!r}; the "
                f"known ones are {', '.join(sorted(self.teachers))}"
            )

    def check(self, prompts: Sequence[Prompt], temperature: float) -> None:
        for prompt in prompts:
            self._check_domain(prompt)
        for domain, teacher in self.teachers.items():
            teacher.check([prompt for prompt in prompts if prompt.domain == domain], temperature)

    def load(self, device: torch.device, student: Student) -> None:
        for teacher in self.teachers.values():
            teacher.load(device, student)

    def release(self) -> None:
        for teacher in self.teachers.values():
            teacher.release()

    def close(self) -> None:
        for teacher in self.teachers.values():
            teacher.close()

    def prefetch(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> None:
        for domain, rows in self._rows(batch).items():
            self.teachers[domain].prefetch(batch.select(rows), view, top_k=top_k)

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        answers = [
            (rows, teacher.score(part, view, top_k=top_k))
            for teacher, rows, part in self._shares(batch)
        ]
        return _joined(batch, answers)

    def score_top(
        self, batch: RolloutBatch, view: str, *, top_k: int, ids: Tensor | None = None
    ) -> tuple[TokenScores, TopLogprobs]:
        answers, tops = [], []
        for teacher, rows, part in self._shares(batch):
            assert provides_top_k(teacher)  # checked at set-up
            given = None if ids is None else ids[_tokens(batch, rows or [0])]
            scores, top = teacher.score_top(part, view, top_k=top_k, ids=given)
            answers.append((rows, scores))
            tops.append((_tokens(batch, rows), top))
        # Teachers may return different numbers of top tokens: keep the smallest.
        width = min(top.ids.shape[1] for _, top in tops)
        count = int(batch.response_mask.sum())
        first = tops[0][1]
        whole = TopLogprobs(
            first.ids.new_zeros(count, width), first.logprobs.new_zeros(count, width)
        )
        for at, top in tops:
            whole.ids[at] = top.ids[: len(at), :width]
            whole.logprobs[at] = top.logprobs[: len(at), :width]
        return _joined(batch, answers), whole

    def states(self, batch: RolloutBatch, view: str) -> MixedStates:
        parts: list[tuple[Tensor, TokenStates]] = []
        for teacher, rows, part in self._shares(batch):
            assert provides_distributions(teacher)  # checked at set-up
            states, tokens = teacher.states(part, view), _tokens(batch, rows)
            if isinstance(states, TokenStates):
                parts.append((tokens, _first(states, len(tokens))))
                continue
            for index, its in states.parts:
                index = index if rows else index[:0]
                parts.append((tokens[index], _first(its, len(index))))
        return MixedStates(tuple(parts))

    def _shares(self, batch: RolloutBatch) -> Iterator[_Share]:
        """Yield the teachers to call, each with its rows."""
        domain_rows = self._rows(batch)
        for domain, teacher in self.teachers.items():
            rows = domain_rows.get(domain, [])
            if rows or teacher.is_collective:
                # Other ranks may have rows of this domain, and need this rank to score them.
                yield _Share(teacher, rows, batch.select(rows or [0]))

    def _rows(self, batch: RolloutBatch) -> Mapping[str, list[int]]:
        """Return the rows of the micro-batch by domain."""
        domains = [rollout.prompt.domain for rollout in batch.rollouts]
        return {
            domain: [i for i, name in enumerate(domains) if name == domain]
            for domain in sorted(set(domains))
        }


def _first(states: TokenStates, count: int) -> TokenStates:
    return TokenStates(states.hidden[:count], states.head)


def _tokens(batch: RolloutBatch, rows: Sequence[int]) -> Tensor:
    """Return the numbers `[n]` int64, ascending, of the tokens of some rows among all N."""
    mask = batch.response_mask
    numbers = mask.flatten().cumsum(0).reshape(mask.shape) - 1
    return numbers[list(rows)][mask[list(rows)]]


def _joined(
    batch: RolloutBatch, answers: Sequence[tuple[Sequence[int], TokenScores]]
) -> TokenScores:
    """Return the scores of the micro-batch, given those of some rows each."""
    # Teachers may return different numbers of top tokens: keep the smallest.
    ranked = min(scores.top_ids.shape[-1] for _, scores in answers)
    grouped = any(scores.ends is not None for _, scores in answers)
    whole: dict[str, Tensor] = {}
    for rows, scores in answers:
        parts = {
            "logprobs": scores.logprobs,
            "entropy": scores.entropy,
            "top_ids": scores.top_ids[..., :ranked],
            "top_logprobs": scores.top_logprobs[..., :ranked],
        }
        if grouped:
            alone = torch.ones_like(scores.logprobs, dtype=torch.bool)
            parts["ends"] = alone if scores.ends is None else scores.ends
            own = scores.group_tokens
            parts["group_tokens"] = alone.long() if own is None else own
        for name, value in parts.items():
            full = value.new_zeros((len(batch.rollouts), *value.shape[1:]))
            whole.setdefault(name, full)[list(rows)] = value[: len(rows)]
    return TokenScores(**whole)
