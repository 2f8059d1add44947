"""Comparing models with different tokenizers, which share nothing but the text.

The response is decoded and tokenized again for the teacher; tokens are then grouped between the
bytes where both tokenizations end a token (ULD, 2402.12030; TRL's GOLD trainer).

Axes: n tokens, G groups, V a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from opd_lightning.errors import UserError
from opd_lightning.losses.divergence import Divergence

MergeStrategy = Literal["bayesian", "observed"]


class Group(NamedTuple):
    """The shortest runs of tokens, one on each side, that spell the same bytes."""

    student: range
    teacher: range


def align(student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> list[Group]:
    """Groups of token positions that end at the same byte, in order, covering every token.

    Args:
        student_tokens: The bytes of each token of the response. A character of several bytes may
            be split among tokens. Tokens without bytes, such as an end of sequence, are left out.
        teacher_tokens: The same text in the teacher's tokens.

    Raises:
        UserError: The two do not spell the same bytes, or a token has none.
    """
    text, other = b"".join(student_tokens), b"".join(teacher_tokens)
    if text != other:
        raise UserError(
            f"align: the student's tokens spell {_shorten(text)} and the teacher's "
            f"{_shorten(other)}, expected the same bytes"
        )
    if not all(student_tokens) or not all(teacher_tokens):
        raise UserError("align: a token has no bytes, expected special tokens to be left out")
    # The byte where a token ends -> the number of tokens up to there.
    ends = {byte: i for i, byte in enumerate(accumulate(map(len, student_tokens)), 1)}
    teacher_ends = {byte: i for i, byte in enumerate(accumulate(map(len, teacher_tokens)), 1)}
    groups, start, teacher_start = [], 0, 0
    for byte, end in ends.items():
        if byte in teacher_ends:
            teacher_end = teacher_ends[byte]
            groups.append(Group(range(start, end), range(teacher_start, teacher_end)))
            start, teacher_start = end, teacher_end
    return groups


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
        groups: One side of `align`.
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


def _shorten(text: bytes) -> str:
    return repr(text if len(text) <= 60 else text[:57] + b"...")
