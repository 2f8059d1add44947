"""Teacher scores of recorded responses, read from disk."""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.models.head import TopLogprobs
from opd_lightning.models.source import ModelSource
from opd_lightning.teachers.base import (
    RecordedQuestion,
    Teacher,
    TopKTeacher,
    provides_top_k,
)
from opd_lightning.teachers.score_store import Description, RowScores, ScoreStore, exists, row_key
from opd_lightning.types import Prompt, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.models.student import Student


class CachedTeacher(TopKTeacher):
    """Cached scores of another teacher for the recorded responses of the prompt file.

    `opd cache-teacher` computes them once; `opd fit` reads them and never loads `teacher`. For
    several domains, give `ByDomainTeacher` a cached teacher for each.

    Args:
        cache: Folder of the scores.
        teacher: Teacher to cache: frozen, with its own model folder.
    """

    answers_live = False

    def __init__(self, cache: str, teacher: Teacher) -> None:
        if not provides_top_k(teacher) or teacher.source is None or not teacher.answers_live:
            raise UserError(
                f"CachedTeacher.teacher: got a {type(teacher).__name__}, expected a teacher that "
                "has a model folder of its own and never changes, such as FrozenTeacher"
            )
        self.folder = Path(os.path.expanduser(cache))
        self.teacher = teacher
        self.provides_entropy = teacher.provides_entropy
        # Reading needs only the tokenizer; the teacher's own source may need servers.
        source = teacher.source
        self.source = ModelSource(
            source.path,
            trust_remote_code=source.trust_remote_code,
            role=source.role,
            chat_template=source.chat_template,
            eos_tokens=source.eos_tokens,
        )
        self.store: ScoreStore | None = None
        self.description: Description | None = None
        self.unknown: dict[bytes, RecordedQuestion] | None = None

    def collect_unknown(self) -> None:
        """Collect queries without a cached score from now on, instead of refusing them."""
        self.unknown = {}
        self.source = self.teacher.source

    # Before the run -----------------------------------------------------------------------

    def check_prompt(self, prompt: Prompt) -> None:
        if self.unknown is not None:
            self.teacher.check_prompt(prompt)

    def check(self, prompts: Sequence[Prompt], temperature: float) -> None:
        assert self.teacher.source is not None
        expected = Description(
            teacher=self.teacher.source.identity, temperature=temperature, top_k=0
        )
        self.description = expected
        if self.unknown is not None:
            self.teacher.check(prompts, temperature)
        if not exists(self.folder) and (self.unknown is not None or not prompts):
            return  # without prompts, as of a domain that no row has, nothing is read
        self.store = ScoreStore(self.folder)
        found = self.store.description
        for what in ("teacher", "temperature"):
            theirs, ours = getattr(found, what), getattr(expected, what)
            if theirs != ours:
                raise UserError(
                    f"cache {str(self.folder)!r} was made with {what} {theirs}, but this run has "
                    f"{ours} ({self.teacher.source.path!r}); name another folder and run `opd "
                    "cache-teacher` again"
                )
        self.description = found

    def check_question(self, question: RecordedQuestion) -> None:
        assert self.description is not None
        if self.store is None:
            self.description = replace(
                self.description, top_k=max(self.description.top_k, question.top_k)
            )
        elif question.top_k > self.description.top_k:
            raise UserError(
                f"cache {str(self.folder)!r} holds the {self.description.top_k} likeliest tokens, "
                f"but {question.top_k} are asked for; lower model.init_args.overlap_top_k or "
                "TopK's k, or name another folder and run `opd cache-teacher` again"
            )
        key = row_key(question.prompt_ids, question.response_ids)
        if self.store is not None and key in self.store:
            return
        if self.unknown is None:
            raise UserError(
                f"{question.prompt.origin}: not in the cache {str(self.folder)!r}; run `opd "
                "cache-teacher` again"
            )
        # An array takes four bytes per token, a list up to 36.
        response_ids = array("i", question.response_ids)
        self.unknown.setdefault(key, question._replace(response_ids=response_ids))

    def load(self, device: torch.device, student: Student) -> None:
        """Do nothing: scores are read from disk."""

    # In training --------------------------------------------------------------------------

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        return self.score_top(batch, view, top_k=top_k)[0]

    def score_top(
        self, batch: RolloutBatch, view: str, *, top_k: int, ids: Tensor | None = None
    ) -> tuple[TokenScores, TopLogprobs]:
        assert ids is None, "only the teacher's top tokens are known: checked at set-up"
        assert self.store is not None, "checked at set-up"
        rows = []
        for rollout in batch.rollouts:
            prompt_ids = rollout.prompt_ids if view == "student" else rollout.views[view]
            if not rollout.dropped:
                key = row_key(prompt_ids or rollout.prompt_ids, rollout.response_ids)
                rows.append(self.store.read(key, top_k))
        flat, wide = torch.zeros(0), torch.zeros(0, top_k)
        nothing = RowScores(flat, flat, wide, wide)
        device = batch.response_ids.device
        logprobs, entropy, top_ids, top_logprobs = (
            torch.cat(part).to(device) for part in zip(*(rows or [nothing]), strict=True)
        )
        known = TopLogprobs(top_ids.long(), top_logprobs)
        return TokenScores.unflatten((logprobs, entropy, known.ids, top_logprobs), batch), known
