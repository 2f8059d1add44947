"""Losses between models with different tokenizers (ULD, 2402.12030; TRL's GOLD trainer).

They compare the groups of tokens that `tokenization.align` forms.

Axes: B rollouts, R response tokens (padded), G groups, V a vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from opd_lightning.errors import UserError
from opd_lightning.losses.divergence import JSD, Divergence


def in_groups(student: Tensor, other: Tensor, ends: Tensor) -> Tensor:
    """Return another model's log-probs in the student's tokens, compared group by group, `[B, R]`.

        l'_t = l_S,t + sum over t's group of (l - l_S)

    A group is one action, so each of its tokens carries the difference of the whole group: the
    policy gradient `-(l' - l_S) grad log pi` then sums to that of the action; dividing the
    difference among the tokens would bias it. Differences between two models treated this way are
    those of their groups. Groups of one token keep the other model's value; tokens after the last
    end have the student's.

    Args:
        student: Log-probs, `[B, R]` nats.
        other: Log-probs of the other model, `[B, R]`; only their sums over groups are read.
        ends: `[B, R]` bool, True at the last token of every group.
    """
    number = ends.cumsum(dim=1) - ends.long()
    zeros = torch.zeros_like(student)
    sums = zeros.scatter_add(1, number, other - student).gather(1, number)
    sizes = zeros.scatter_add(1, number, torch.ones_like(student)).gather(1, number)
    belongs = number < ends.sum(dim=1, keepdim=True)
    grouped = torch.where(belongs, student + sums, student)
    return torch.where(ends & (sizes == 1), other, grouped)


def group_ends(ends: Tensor) -> Tensor:
    """Return the column of the token that ends every token's group, `[B, R]` int64; R: no group.

    Args:
        ends: `[B, R]` bool, True at the last token of every group.
    """
    size = ends.shape[1]
    columns = torch.where(ends, torch.arange(size, device=ends.device), size)
    return columns.flip(1).cummin(dim=1).values.flip(1) if size else columns


def uld(student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    """Compute the ULD loss `sum |sorted S - sorted T|`, `[G, V_S]`, `[G, V_T]` -> `[G]`.

    Probabilities are sorted and the smaller vocabulary is padded with zeros, so the loss does not
    depend on which token has which probability (universal logit distillation, 2402.12030).
    """
    size = max(student_probs.shape[-1], teacher_probs.shape[-1])
    student, teacher = (
        pad(probs.sort(dim=-1, descending=True).values, (0, size - probs.shape[-1]))
        for probs in (student_probs, teacher_probs)
    )
    return (student - teacher).abs().sum(dim=-1)


class Pairs(NamedTuple):
    """Tokens of two vocabularies that stand for the same text, and the others of both."""

    student: Tensor  # [M] int64
    teacher: Tensor  # [M] int64, in the same order
    student_rest: Tensor  # [V_S - M] int64
    teacher_rest: Tensor  # [V_T - M] int64
    share: float  # pairs / tokens of the teacher's vocabulary, from 0 to 1

    @classmethod
    def of(
        cls, student: Tensor, teacher: Tensor, sizes: tuple[int, int], known: int | None = None
    ) -> Self:
        """Return the pairs of ids `[M]`, `[M]`.

        Args:
            student: The student's ids, each at most once.
            teacher: The teacher's.
            sizes: Rows of both heads, which may be more than their vocabularies.
            known: Tokens of the teacher's vocabulary; None takes the size of its head, as TRL does.
        """
        rests = [
            torch.ones(size, dtype=torch.bool).index_fill(0, ids, False).nonzero()[:, 0]
            for ids, size in zip((student, teacher), sizes, strict=True)
        ]
        return cls(student, teacher, rests[0], rests[1], len(teacher) / (known or sizes[1]))

    def to(self, device: torch.device) -> Self:
        *ids, share = self
        ours, theirs, our_rest, their_rest = (x.to(device) for x in ids)
        return type(self)(ours, theirs, our_rest, their_rest, share)


def hybrid_uld(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    pairs: Pairs,
    divergence: Divergence,
    weight: float | None = None,
) -> Tensor:
    """Compute TRL GOLD's hybrid loss, `[G, V_S]`, `[G, V_T]` -> `[G]`; gradient to the student.

        w divergence(S, T on pairs) + (1 - w) ULD(S, T on the others)

    Probabilities of paired tokens are compared without renormalisation.

    Args:
        student_logprobs: Merged log-probs.
        teacher_logprobs: Merged log-probs of the same groups.
        pairs: The paired tokens.
        divergence: TRL uses `JSD` with beta 0.5.
        weight: w; None takes `pairs.share`.
    """
    weight = pairs.share if weight is None else weight
    loss = student_logprobs.new_zeros(len(student_logprobs))
    if weight > 0:
        ours, theirs = student_logprobs[:, pairs.student], teacher_logprobs[:, pairs.teacher]
        loss = loss + weight * divergence(ours, theirs)
    if weight < 1:
        ours = student_logprobs[:, pairs.student_rest]
        theirs = teacher_logprobs[:, pairs.teacher_rest]
        loss = loss + (1 - weight) * uld(ours.exp(), theirs.exp())
    return loss


@dataclass(frozen=True)
class HybridULD(Divergence):
    """GOLD's divergence of models whose vocabularies may differ; without `hybrid` it is ULD's.

    Args:
        divergence: Divergence on paired tokens.
        hybrid: Compare paired tokens by `divergence`. If False, all probabilities are sorted.
        weight: Weight w of the paired tokens, see `hybrid_uld`.
    """

    divergence: Divergence = JSD()  # noqa: RUF009 - frozen
    hybrid: bool = True
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise UserError(f"HybridULD: weight is {self.weight}, expected a number from 0 to 1")
        if self.weight is not None and not self.hybrid:
            raise UserError(
                f"HybridULD: weight is {self.weight}, which nothing reads without hybrid; leave "
                "it out"
            )

    def at(self, step: int) -> HybridULD:
        return replace(self, divergence=self.divergence.at(step))

    def __call__(
        self, student_logprobs: Tensor, teacher_logprobs: Tensor, pairs: Pairs | None = None
    ) -> Tensor:
        """Map `[G, V_S]`, `[G, V_T]` to `[G]`; `pairs` None means the same tokens on both sides."""
        if not self.hybrid:
            return uld(student_logprobs.exp(), teacher_logprobs.exp())
        if pairs is None:
            weight = 1.0 if self.weight is None else self.weight
            return weight * self.divergence(student_logprobs, teacher_logprobs)
        return hybrid_uld(student_logprobs, teacher_logprobs, pairs, self.divergence, self.weight)
