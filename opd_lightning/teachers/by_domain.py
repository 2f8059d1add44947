"""A teacher per domain: each prompt is scored by its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from opd_lightning.errors import UserError
from opd_lightning.teachers.base import Teacher
from opd_lightning.types import Prompt, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.student import Student


class ByDomainTeacher(Teacher):
    """Dispatches by `Prompt.domain` (G-OPD's multi-teacher runs; MOPD, 2606.30406).

    Args:
        teachers: One per domain. A prompt of another domain is refused before training.
    """

    def __init__(self, teachers: dict[str, Teacher]) -> None:
        if not teachers:
            raise UserError("ByDomainTeacher.teachers: got none, expected one per domain")
        self.teachers = teachers

    def parts(self) -> list[Teacher]:
        return [part for teacher in self.teachers.values() for part in teacher.parts()]

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if prompt.domain not in self.teachers:
                raise UserError(
                    f"{prompt.origin or prompt.id}: no teacher for domain {prompt.domain!r}; the "
                    f"known ones are {', '.join(sorted(self.teachers))}"
                )

    def load(self, device: torch.device, student: Student) -> None:
        for teacher in self.teachers.values():
            teacher.load(device, student)

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        domains = [rollout.prompt.domain for rollout in batch.rollouts]
        whole: dict[str, torch.Tensor] = {}
        for domain in sorted(set(domains)):
            rows = [i for i, name in enumerate(domains) if name == domain]
            scores = self.teachers[domain].score(batch.select(rows), view, top_k=top_k)
            for f in fields(scores):
                part = getattr(scores, f.name)
                into = whole.setdefault(f.name, part.new_zeros((len(domains), *part.shape[1:])))
                into[rows] = part
        return TokenScores(**whole)
