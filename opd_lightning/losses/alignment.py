"""Comparing models with different tokenizers, which share nothing but the text.

`tokenization.align` groups the tokens of both; here the groups are compared (ULD, 2402.12030; TRL's
GOLD trainer).

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
    """Another model's log-probs for comparing it with the student in groups of tokens, `[B, R]`.

        l'_t = l_S,t + sum over t's group of (l - l_S)

    A group is one action, so each of its tokens carries the whole group's difference: the policy
    gradient `-(l' - l_S) grad log pi` then adds up to the action's, where shares would be biased.
    The differences between any two models treated so are those of their groups too. A group of
    one token is unchanged; the tokens after the last end are the student's.

    Args:
        student: Log-probs, `[B, R]` nats.
        other: The same of the other model; only their sums over groups are read.
        ends: bool, True at the last token of every group.
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
    """One distribution per group, `[n, V]` -> `[G, V]` log-probs; groups of one are unchanged.

    Args:
        logprobs: Row k predicts token k.
        token_ids: `[n]`, the tokens of the response.
        groups: One side of `tokenization.align`.
        strategy: "bayesian" takes the last position's distribution times the probability of the
            tokens before it: by the chain rule, the probability of the group with any last token.
            "observed" takes the first position's distribution times the probability of the tokens
            that followed, which is right for the tokens of the response alone: after another
            first token, those that followed have another probability. (TRL's "observed" also
            reads its logits one position late; here both strategies take the same rows.)

    Returns:
        Log-probs whose sum over the vocabulary is below 1 for groups of several tokens.
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
    """Universal logit distillation: `sum |sorted S - sorted T|`, `[G, V_S]`, `[G, V_T]` -> `[G]`.

    Probabilities are sorted and the shorter list is filled up with zeros, so nothing depends on
    which token has which probability (2402.12030).
    """
    size = max(student_probs.shape[-1], teacher_probs.shape[-1])
    student, teacher = (
        pad(probs.sort(dim=-1, descending=True).values, (0, size - probs.shape[-1]))
        for probs in (student_probs, teacher_probs)
    )
    return (student - teacher).abs().sum(dim=-1)


def shared_tokens(student: Mapping[str, int], teacher: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Ids of the tokens with the same string in both vocabularies, `[M]` each, paired."""
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
    """TRL GOLD's hybrid loss, `[G, V_S]`, `[G, V_T]` -> `[G]`, with a gradient to the student.

        w divergence(S, T on shared tokens) + (1 - w) ULD(S, T on the others)

    w is the share of the teacher's vocabulary that is shared. Probabilities of shared tokens are
    compared as they are, not renormalised.

    Args:
        student_logprobs: Merged log-probs.
        teacher_logprobs: Merged log-probs of the same groups.
        shared: See `shared_tokens`.
        divergence: TRL uses `JSD` with beta 0.5.
    """
    student_ids, teacher_ids = shared
    weight = len(teacher_ids) / teacher_logprobs.shape[-1]
    matched = divergence(student_logprobs[:, student_ids], teacher_logprobs[:, teacher_ids])
    # Shared tokens without mass: they sort last, as zeros do.
    rest = uld(
        student_logprobs.exp().index_fill(-1, student_ids, 0.0),
        teacher_logprobs.exp().index_fill(-1, teacher_ids, 0.0),
    )
    return weight * matched + (1 - weight) * rest
