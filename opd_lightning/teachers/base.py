"""The teacher contract: a micro-batch in, scores of its sampled tokens out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from opd_lightning.models.head import TokenStates, TopLogprobs
from opd_lightning.models.source import ModelSource
from opd_lightning.types import Prompt, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.models.student import Student


class RecordedQuestion(NamedTuple):
    """What a run will ask about a recorded response; known before it starts."""

    prompt: Prompt
    prompt_ids: list[int]  # [P] the prompt under the view that is asked about
    response_ids: Sequence[int]  # [T]
    top_k: int  # how many of its likeliest tokens it will be asked for


class Teacher(ABC):
    """Scores sampled tokens without a gradient. It owns no optimiser.

    `source` is the model folder it comes from; None for one that is made of the student, whose
    folder it shares. `answers_live` says whether it can be asked about responses that are not
    written yet when the run starts. One that `has_own_tokenizer` speaks of groups of tokens:
    `TokenScores.ends`.
    """

    source: ModelSource | None = None
    answers_live: bool = True
    has_own_tokenizer: bool = False

    @abstractmethod
    def load(self, device: torch.device, student: Student) -> None:
        """Make ready on `device`; called once, after every check and after the student's load."""

    @abstractmethod
    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        """Scores of the response tokens under one of `batch.views`."""

    # Most teachers have nothing to do at these moments.

    def check(self, prompts: Sequence[Prompt], temperature: float) -> None:  # noqa: B027
        """Raise UserError, before training, if it cannot score these at this temperature."""

    def check_question(self, question: RecordedQuestion) -> None:  # noqa: B027
        """Raise UserError if it cannot answer this; called after `check`, for every row."""

    def expect(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> None:  # noqa: B027
        """`score` will be called with this during the step: whoever can may begin."""

    def rest(self) -> None:  # noqa: B027
        """Nothing is asked until the next step: give memory back."""

    def close(self) -> None:  # noqa: B027
        """The run is over."""

    @property
    def is_collective(self) -> bool:
        """Whether asking takes all ranks, because each holds a part of the model.

        Every rank must then ask equally often. Other kinds are in every process as a whole.
        """
        return False

    def parts(self) -> list[Teacher]:
        """Itself, or the teachers it is made of."""
        return [self]

    def responsible(self, prompt: Prompt) -> Teacher:
        """Itself, or the one of its parts that scores responses to this prompt."""
        return self


class TopKTeacher(Teacher):
    """A teacher elsewhere: it tells log-probs of some tokens, not its whole distribution.

    `scores_given_ids` says whether these may be any tokens, or its own likeliest alone;
    `tells_entropy` whether it knows the entropy of the whole.
    """

    scores_given_ids: bool = False
    tells_entropy: bool = True

    @abstractmethod
    def score_top(
        self, batch: RolloutBatch, view: str, *, top_k: int, ids: Tensor | None = None
    ) -> tuple[TokenScores, TopLogprobs]:
        """Scores with `top_k` top ids, and log-probs at `ids [N, K]`, or at these top ids if None.

        `ids` and the log-probs are in the order of the response mask.
        """


class DistributionTeacher(Teacher):
    """A teacher in this process: its whole next-token distribution can be read."""

    @abstractmethod
    def states(self, batch: RolloutBatch, view: str) -> TokenStates:
        """Hidden states that predict the response tokens, with the head to read them."""


class Ask(NamedTuple):
    """A question: what does this teacher say about the response under this view?"""

    teacher: Teacher
    view: str
