"""Losses between models with different tokenizers (ULD, 2402.12030; TRL's GOLD trainer).

They compare the groups of tokens that `tokenization.align` forms.

Axes: B rollouts, R response tokens (padded), n tokens of one response, G groups, V a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from opd_lightning.losses.divergence import Divergence

MergeStrategy = Literal["bayesian", "observed"]


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


def merge(
    logprobs: Tensor,
    token_ids: Tensor,
    groups: Sequence[range],
    strategy: MergeStrategy = "bayesian",
) -> Tensor:
    """Merge `[n, V]` log-probs to one row a group, `[G, V]`; groups of one token are unchanged.

    Args:
        logprobs: Row k predicts token k.
        token_ids: `[n]`, the tokens of the response.
        groups: Student's or teacher's ranges of `tokenization.align`.
        strategy: "bayesian" takes the last position's distribution times the probability of the
            tokens before it: by the chain rule, the probability of the group with any last token.
            "observed" takes the first position's distribution times the probability of the tokens
            that followed. It is exact for the tokens of the response only: after another first
            token they would have another probability. (TRL's "observed" also reads its logits one
            position late; here both strategies use the same rows.)

    Returns:
        Log-probs; those of a group of several tokens have a total probability below 1.
    """
    chosen = logprobs.gather(-1, token_ids[:, None]).squeeze(-1)
    end = -1 if strategy == "bayesian" else 0
    base = torch.tensor([group[end] for group in groups], dtype=torch.long).to(chosen.device)
    sizes = torch.tensor([len(group) for group in groups], dtype=torch.long).to(chosen.device)
    group_of_token = torch.arange(len(groups), device=chosen.device).repeat_interleave(sizes)
    given = chosen.index_fill(0, base, 0.0)
    factor = chosen.new_zeros(len(groups)).index_add(0, group_of_token, given)
    return logprobs[base] + factor[:, None]


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


def shared_tokens(student: Mapping[str, int], teacher: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Return paired ids, `[M]` each, of the tokens with the same string in both vocabularies."""
    names = sorted(student.keys() & teacher.keys(), key=teacher.__getitem__)
    return (
        torch.tensor([student[name] for name in names], dtype=torch.long),
        torch.tensor([teacher[name] for name in names], dtype=torch.long),
    )


def hybrid_uld(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    shared: tuple[Tensor, Tensor],
    divergence: Divergence,
) -> Tensor:
    """Compute TRL GOLD's hybrid loss, `[G, V_S]`, `[G, V_T]` -> `[G]`; gradient to the student.

        w divergence(S, T on shared tokens) + (1 - w) ULD(S, T on the others)

    w is the fraction of the teacher's vocabulary that is shared. Probabilities of shared tokens
    are compared without renormalisation.

    Args:
        student_logprobs: Merged log-probs.
        teacher_logprobs: Merged log-probs of the same groups.
        shared: See `shared_tokens`.
        divergence: TRL uses `JSD` with beta 0.5.
    """
    student_ids, teacher_ids = shared
    weight = len(teacher_ids) / teacher_logprobs.shape[-1]
    matched = divergence(student_logprobs[:, student_ids], teacher_logprobs[:, teacher_ids])
    # Shared tokens get probability 0, so that they sort last, next to the padding.
    rest = uld(
        student_logprobs.exp().index_fill(-1, student_ids, 0.0),
        teacher_logprobs.exp().index_fill(-1, teacher_ids, 0.0),
    )
    return weight * matched + (1 - weight) * rest
