"""Dispatch of prompts to one teacher per domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.teachers.base import Teacher
from opd_lightning.types import Prompt, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.models.student import Student


class ByDomainTeacher(Teacher):
    """Teacher that dispatches by `Prompt.domain` (G-OPD's multi-teacher runs; MOPD, 2606.30406).

    Args:
        teachers: One per domain. A prompt of another domain is refused before training.
    """

    def __init__(self, teachers: dict[str, Teacher]) -> None:
        if not teachers:
            raise UserError("ByDomainTeacher.teachers: got none, expected one per domain")
        self.teachers = teachers

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
        answers = []
        domain_rows = self._rows(batch)
        for domain, teacher in self.teachers.items():
            rows = domain_rows.get(domain, [])
            if rows or teacher.is_collective:
                # Other ranks may have rows of this domain, and need this rank to score them.
                part = batch.select(rows or [0])
                answers.append((rows, teacher.score(part, view, top_k=top_k)))
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
            for name, value in parts.items():
                full = value.new_zeros((len(batch.rollouts), *value.shape[1:]))
                whole.setdefault(name, full)[rows] = value[: len(rows)]
        return TokenScores(**whole)

    def _rows(self, batch: RolloutBatch) -> dict[str, list[int]]:
        """Return the rows of the micro-batch by domain."""
        domains = [rollout.prompt.domain for rollout in batch.rollouts]
        return {
            domain: [i for i, name in enumerate(domains) if name == domain]
            for domain in sorted(set(domains))
        }
