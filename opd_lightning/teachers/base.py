"""Teacher contract: a micro-batch in, scores of its sampled tokens out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

from opd_lightning.losses.alignment import Pairs
from opd_lightning.models.head import (
    Comparison,
    MixedStates,
    States,
    TokenStates,
    TopLogprobs,
    score,
)
from opd_lightning.models.source import ModelSource
from opd_lightning.types import Prompt, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.models.student import Student


class RecordedQuestion(NamedTuple):
    """Query of a run about a recorded response, known before the run starts."""

    prompt: Prompt
    prompt_ids: list[int]  # [P] the prompt under the queried view
    response_ids: Sequence[int]  # [T]
    top_k: int  # number of the teacher's top tokens that are read


class Provides(IntEnum):
    """Kinds of scores that a teacher returns; each level includes the previous ones."""

    SAMPLED_TOKENS = 0  # `Teacher.score`
    TOP_K = 1  # `TopKTeacher.score_top`
    DISTRIBUTIONS = 2  # `DistributionTeacher.states`


class Teacher(ABC):
    """Model that scores sampled tokens without a gradient and without an optimiser.

    `source` is its model folder; None for teachers derived from the student, whose folder they
    share. `answers_live` is False for teachers that score only responses recorded before the run.
    With `has_own_tokenizer`, scores are those of groups of tokens: `TokenScores.ends`.
    `provides_entropy` is True if it returns the entropy of its full distributions, else NaN.
    """

    provides: Provides = Provides.SAMPLED_TOKENS
    provides_entropy: bool = True
    source: ModelSource | None = None
    answers_live: bool = True
    has_own_tokenizer: bool = False
    domains: Sequence[str] = ()  # domains with a separate teacher, whose figures are logged

    @abstractmethod
    def load(self, device: torch.device, student: Student) -> None:
        """Load on `device`; called once, after all checks and after the student's load."""

    @abstractmethod
    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        """Return scores of the response tokens under one of `batch.views`."""

    # Optional hooks.

    def check_model(self, student: Student) -> None:  # noqa: B027
        """Raise UserError, before weights load, if its model cannot be loaded in this process."""

    def check(self, prompts: Sequence[Prompt], temperature: float) -> None:  # noqa: B027
        """Raise UserError, before training, if it cannot score `prompts` at `temperature`."""

    def check_prompt(self, prompt: Prompt) -> None:  # noqa: B027
        """Raise UserError if it cannot read `prompt`; called before `check`, for every row."""

    def check_question(self, question: RecordedQuestion) -> None:  # noqa: B027
        """Raise UserError if it cannot answer `question`; called after `check`, for every row."""

    def prefetch(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> None:  # noqa: B027
        """Start to score in the background; `score` is called with the same arguments later."""

    def release(self) -> None:  # noqa: B027
        """Release memory; `score` is not called until the next step."""

    def close(self) -> None:  # noqa: B027
        """Release all resources at the end of the run."""

    @property
    def is_collective(self) -> bool:
        """Return whether the model is sharded, so that all ranks must call `score` equally often.

        Other kinds are complete in every process.
        """
        return False

    def parts(self) -> list[Teacher]:
        """Return the teachers that it consists of; by default itself only."""
        return [self]

    def responsible(self, prompt: Prompt) -> Teacher:
        """Return the part that scores responses to `prompt`; by default itself."""
        return self


class TopKTeacher(Teacher):
    """Teacher that returns log-probs of some tokens of its distributions.

    With `scores_given_ids` these may be any tokens, otherwise only its top k.
    """

    provides = Provides.TOP_K
    scores_given_ids: bool = False

    @abstractmethod
    def score_top(
        self, batch: RolloutBatch, view: str, *, top_k: int, ids: Tensor | None = None
    ) -> tuple[TokenScores, TopLogprobs]:
        """Return scores with `top_k` top ids, and log-probs at `ids [N, K]` (None: the top ids).

        `ids` and the log-probs are in the order of the response mask.
        """


class DistributionTeacher(TopKTeacher):
    """Teacher in this process, whose full next-token distributions can be read."""

    provides = Provides.DISTRIBUTIONS
    scores_given_ids = True

    @abstractmethod
    def states(self, batch: RolloutBatch, view: str) -> States:
        """Return the hidden states that predict the response tokens, with the head."""

    def score_top(
        self, batch: RolloutBatch, view: str, *, top_k: int, ids: Tensor | None = None
    ) -> tuple[TokenScores, TopLogprobs]:
        given = {} if ids is None else {"given": Comparison(None, _at, [ids])}
        targets = batch.response_ids[batch.response_mask]
        states = self.states(batch, view)
        assert isinstance(states, TokenStates), "teachers with several models override this method"
        with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):
            found = score(states, targets, top_k=top_k, comparisons=given)
        own = found.student
        known = (
            TopLogprobs(own.top_ids, own.top_logprobs)
            if ids is None
            else TopLogprobs(ids, found.values["given"])
        )
        return TokenScores.unflatten(own, batch), known


class Groups(NamedTuple):
    """Distributions of a teacher with another tokenizer, for groups of the student's tokens."""

    scores: TokenScores  # as of `Teacher.score`
    # One part: rows are the student's tokens that end a group, states those that predict the
    # group's last token of the teacher.
    states: MixedStates
    given: Tensor  # [N] nats: log-prob of the group's earlier tokens, where a group ends
    pairs: Pairs  # of the vocabularies, on the device of the states


class GroupTeacher(Teacher):
    """Teacher with another tokenizer, whose distributions at the ends of groups can be read."""

    has_own_tokenizer = True

    @abstractmethod
    def groups(self, batch: RolloutBatch, view: str) -> Groups:
        """Return the distributions at the ends of groups, with all that `score` returns."""


def _at(logprobs: Tensor, _: Tensor | None, ids: Tensor) -> Tensor:
    return logprobs.gather(1, ids)


def provides_top_k(teacher: Teacher) -> TypeGuard[TopKTeacher]:
    """Return whether a teacher returns log-probs of top tokens."""
    return teacher.provides >= Provides.TOP_K


def provides_distributions(teacher: Teacher) -> TypeGuard[DistributionTeacher]:
    """Return whether a teacher returns full distributions."""
    return teacher.provides >= Provides.DISTRIBUTIONS


class Ask(NamedTuple):
    """Query: scores of the response by `teacher` under `view`."""

    teacher: Teacher
    view: str
