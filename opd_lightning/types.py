"""Data types of the pipeline: prompts, rollouts, batches and token scores.

Axes: B rollouts of a micro-batch, R response tokens (padded), L prompt + response tokens
(padded), K top-k, N response tokens of a micro-batch without padding.

*Response space* is `[B, R]`: row = rollout, column = response token. Every per-token quantity
has this shape, under whichever prompt (view) it was computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple, Self, TypedDict

import torch
from torch import Tensor


class Message(TypedDict):
    """One turn of a chat; role is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of a prompt file.

    Example: Prompt(id="sums-7", messages=({"role": "user", "content": "2+2="},), answer="4")
    """

    id: str
    messages: tuple[Message, ...]  # the policy generates the next assistant turn
    answer: str | None = None  # the reference answer, for verifiers
    response: str | None = None  # a recorded response, for supervised training
    response_ids: tuple[int, ...] | None = None  # its token ids, EOS included; used instead of it
    privileged: str | None = None  # text that only a teacher may be given
    domain: str = "default"  # group name for per-domain metrics and teachers
    origin: str = ""  # "file:line" it was read from, for error messages


class StopReason(StrEnum):
    """Reason why a response ended."""

    EOS = "eos"  # the model sampled an end-of-sequence token, the last response token
    LENGTH = "length"  # the token limit was reached; there is no EOS

    def is_truncated(self) -> bool:
        return self is StopReason.LENGTH


class Author(StrEnum):
    """Origin of a response."""

    STUDENT = "student"  # the student, from the prompt it is trained under: strictly on-policy
    GUIDED = "guided"  # the student, with the privileged text in its prompt
    TEACHER = "teacher"  # the teacher's own engine
    RECORDED = "recorded"  # read from the prompt file

    def is_demonstrator(self) -> bool:
        """Return whether the response was not sampled from the student."""
        return self in (Author.TEACHER, Author.RECORDED)


class Completion(NamedTuple):
    """Response of an engine to one request."""

    response_ids: list[int]  # [T] sampled ids, EOS included
    logprobs: list[float]  # [T] log-probs under the sampling distribution, nats
    stop_reason: StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One response with its prompt, author and reward."""

    prompt: Prompt
    prompt_ids: list[int]  # [P] the student's own prompt, which the loss is computed under
    views: Mapping[str, list[int] | None]  # other prompts by view name; None: it has none
    group: int  # position of the prompt in the run's order; samples of a prompt share it
    response_ids: list[int]  # [T] the ids the sampler wrote; never re-tokenised
    behaviour_logprobs: list[float]  # [T] the sampler's log-probs; NaN if not sampled
    stop_reason: StopReason
    text: str  # response decoded without special tokens
    reward: float  # verifier's score in [0, 1]; NaN without one
    group_mean: float  # mean known reward of this prompt's samples; NaN for fewer than two
    group_std: float  # their population standard deviation; NaN for fewer than two
    author: Author
    dropped: bool  # generated and verified, but excluded from training
    policy_version: int  # number of optimiser steps that made the weights it was sampled with
    # With defaults, because checkpoints of earlier versions hold rollouts without them.
    unverified: bool = False  # there is a verifier, but it gave no score
    long_views: tuple[str, ...] = ()  # late views left out because they exceed the context
    # Scores that the reward was summed from, by name; the same names in all rollouts of a run.
    reward_parts: Mapping[str, float] = field(default_factory=dict)


class Totals(NamedTuple):
    """Counts of response tokens and of rollouts, by which losses are divided."""

    tokens: int
    sequences: int

    def plus(self, other: Totals) -> Totals:
        return Totals(self.tokens + other.tokens, self.sequences + other.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """Loss normalisers of one optimiser step, over all micro-batches and ranks."""

    step: int  # index of the optimiser step, from 0
    written: Totals  # responses of the student, guided or not
    demonstrated: Totals  # responses of a teacher, or recorded

    @property
    def all(self) -> Totals:
        return self.written.plus(self.demonstrated)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if is_dataclass(value) and hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _move(item, device) for key, item in value.items()}
    return value


class _Movable:
    """Base of frozen dataclasses that Lightning can move between devices."""

    __slots__ = ()

    def to(self, device: torch.device, **_: Any) -> Self:
        moved = {f.name: _move(getattr(self, f.name), device) for f in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, slots=True, kw_only=True)
class View(_Movable):
    """Rollouts of a micro-batch under one kind of prompt: prompt, response, then padding."""

    input_ids: Tensor  # [B, L] int64, pad id where attention_mask is 0
    attention_mask: Tensor  # [B, L] int64, 1 on prompt and response
    # [B] int64; response token t of row b is input_ids[b, prompt_lengths[b] + t]
    prompt_lengths: Tensor
    available: Tensor  # [B] bool; False where the row has no such prompt and holds the student's

    def predicting_positions(self, response_mask: Tensor, starts: Tensor | None = None) -> Tensor:
        """Return flat indices `[N]` of the positions that predict response tokens.

        Row-major over `response_mask [B, R]`, so results scatter back with the same mask. A token
        is predicted by the position before it.

        Args:
            response_mask: `[B, R]` bool.
            starts: `[B]` index of each row's first token; None for rows of `[B, L]`.
        """
        rows, columns = response_mask.nonzero(as_tuple=True)
        first = rows * self.input_ids.shape[1] if starts is None else starts[rows]
        return first + self.prompt_lengths[rows] - 1 + columns


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch(_Movable):
    """A micro-batch of rollouts, padded once in `data/collate.py`.

    Example, two responses [7, 2] and [5, 6, 2] (2 is EOS, 0 is the pad id):
        response_ids  = [[7, 2, 0], [5, 6, 2]]
        response_mask = [[1, 1, 0], [1, 1, 1]]
    """

    views: Mapping[str, View]  # by view name; the response ids are the same in every view
    response_ids: Tensor  # [B, R] int64, pad id where the mask is False
    response_mask: Tensor  # [B, R] bool, True on response tokens, EOS included
    behaviour_logprobs: Tensor  # [B, R] float32 nats, 0 where the mask is False, NaN if unknown
    rewards: Tensor  # [B] float32 in [0, 1], NaN without a score
    group_mean: Tensor  # [B] float32, mean of the group's known rewards, NaN for fewer than two
    group_std: Tensor  # [B] float32, population standard deviation of the same, likewise
    truncated: Tensor  # [B] bool, True where the response reached the token limit
    groups: Tensor  # [B] int64, equal for rows of one prompt
    on_policy: Tensor  # [B] bool, sampled from the student under the student's prompt
    demonstrated: Tensor  # [B] bool, not sampled from the student
    temperature: float  # the sampler's; student's and teachers' logits are divided by it
    totals: StepTotals  # loss normalisers of the optimiser step
    rollouts: tuple[Rollout, ...]  # one per row, for logs
    top_p: float = 1.0  # the student's sampler's; losses read the whole distribution
    top_k: int = 0  # likewise
    # Repeats a rollout, without response tokens, because other ranks have more micro-batches.
    is_filler: bool = False

    def unflatten(self, values: Tensor) -> Tensor:
        """Scatter `values [N, ...]`, in the order of the mask, to `[B, R, ...]`; 0 elsewhere."""
        full = values.new_zeros((*self.response_mask.shape, *values.shape[1:]))
        return full.masked_scatter(_expand(self.response_mask, full), values)

    def select(self, rows: Sequence[int]) -> Self:
        """Select rows; padding and totals stay those of the whole batch."""
        index = torch.tensor(rows, device=self.response_ids.device)
        taken: dict[str, Any] = {
            f.name: value[index]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        views = {
            name: replace(view, **{f.name: getattr(view, f.name)[index] for f in fields(view)})
            for name, view in self.views.items()
        }
        rollouts = tuple(self.rollouts[i] for i in rows)
        return replace(self, views=views, rollouts=rollouts, **taken)


class WholeStep(list[RolloutBatch]):
    """The micro-batches of an optimiser step, if their number differs from step to step."""


def _expand(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *([1] * (like.dim() - mask.dim()))).expand_as(like)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """Scores of the sampled tokens under one model, in response space.

    Only the `logprobs` of the student carry a gradient.
    """

    logprobs: Tensor  # [B, R] float32 nats, 0 where the mask is False
    entropy: Tensor  # [B, R] float32 nats of the full next-token distribution; NaN if unknown
    top_ids: Tensor  # [B, R, K] int64, most likely first; 0 where the mask is False; K may be 0
    top_logprobs: Tensor  # [B, R, K] float32 nats, of top_ids; 0 where the mask is False
    # [B, R] bool, from a model with another tokenizer: True at the last token of a group, which
    # holds the log-prob of the group. Tokens after the last end have no score. None: no groups.
    ends: Tensor | None = None
    # [B, R] int64, with `ends`: at an end, the group's number of tokens in that model's tokenizer.
    group_tokens: Tensor | None = None
    # [B, R] float32 nats, <= 0, detached: log mass of the tokens that a truncated sampler could
    # draw from this model. None: all of them.
    log_mass: Tensor | None = None

    @property
    def sampled_logprobs(self) -> Tensor:
        """Log-probs `[B, R]` under the sampler's distribution, truncated or not; detached."""
        logprobs = self.logprobs.detach()
        return logprobs if self.log_mass is None else logprobs - self.log_mass

    @classmethod
    def unflatten(cls, flat: Iterable[Tensor], batch: RolloutBatch) -> Self:
        """Build from log-probs `[N]`, entropy `[N]`, top ids and their log-probs `[N, K]`.

        All are in the order of the response mask.
        """
        names = ("logprobs", "entropy", "top_ids", "top_logprobs")
        return cls(**{n: batch.unflatten(x) for n, x in zip(names, flat, strict=True)})

    def detach(self) -> Self:
        return replace(self, logprobs=self.logprobs.detach())
