"""Divergences on the top-k tokens instead of the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.divergence import (
    JSD,
    Divergence,
    ForwardKL,
    MixedKL,
    ReverseKL,
    kl,
    log_quotient,
)


@dataclass(frozen=True)
class TopK(Divergence):
    """Divergence between S and T on a support K of top-k tokens, chosen per position.

    Published choices, of the reverse KL unless stated otherwise:

        SG-TopK (2605.11182)     k 20, intersection, none, stop-gradient
        MOPD (2606.30406)        k 64, teacher, none, corrected
        Revisit-OPD (2603.25562) k 32, teacher, renormalise
        Rethinking-OPD (2604.13016) k 16, student, none, per-candidate
        SDPO (2601.20802)        k 100, student, tail, jsd with beta 0.5
        EOPD (2603.07079)        k 16, teacher, teacher, forward
        verl forward_kl_topk     k 32, teacher, none, forward, clamp
        NeMo-RL's distillation   k 64, teacher, renormalise, mixed

    `normalise: none` with `gradient: plain` and the reverse KL is biased and provided for study
    only. Its gradient is `sum_K S (log(S / T) + 1) grad log S`, which raises a token only if
    `T(v) > e S(v)` and does not vanish at S = T. The value can be negative, and training with it
    collapses (2605.11182).

    Args:
        k: Number of top tokens of each model; at least the vocabulary size means all tokens.
        support: The student's top k, the teacher's, their intersection or their union. The
            divergence on an empty intersection is 0.
        normalise: "none" sums over K without normalising; "renormalise" scales both sides to sum
            to 1 on K and ignores the mass outside; "teacher" scales the teacher only; "tail" adds
            the mass outside K as one more token, which bounds the full divergence from below.
        divergence: "reverse" is `S log(S / T)`, "forward" `T log(T / S)`, "jsd" see `JSD`, "mixed"
            see `MixedKL`.
        gradient: Of the reverse KL. "plain" differentiates both factors; "stop-gradient" is
            `S sg[log(S / T)]`; "corrected" is `S log(S / T) - S + T`, a loss of at least 0 with
            the same gradient, `sum_K S log(S / T) grad log S`. If both sides sum to 1, these three
            gradients are equal. "per-candidate" is a policy gradient of every token of K with the
            advantage `-w log(S / T)`, w the student renormalised on K: the gradient of
            "stop-gradient" divided by the student's mass on K.
        beta: Beta of `JSD` or `MixedKL`, for "jsd" and "mixed" only; None uses its default.
        clamp: Raise negative sums to 0, as verl does; their gradient is then 0.
    """

    k: int
    support: Literal["student", "teacher", "intersection", "union"]
    normalise: Literal["none", "renormalise", "teacher", "tail"]
    divergence: Literal["reverse", "forward", "jsd", "mixed"] = "reverse"
    gradient: Literal["plain", "stop-gradient", "corrected", "per-candidate"] = "plain"
    beta: float | None = None
    clamp: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"TopK: k is {self.k}, expected at least 1")
        if self.k == 1 and self.normalise == "renormalise" and self.support != "union":
            raise UserError(
                "TopK: normalise is 'renormalise' with k 1, but one token renormalised has "
                "probability 1 on both sides and teaches nothing; expected k of at least 2"
            )
        if self.gradient != "plain" and self.divergence != "reverse":
            raise UserError(
                f"TopK: gradient is {self.gradient!r} with divergence {self.divergence!r}, "
                "expected gradient 'plain' or divergence 'reverse'"
            )
        if self.gradient in ("corrected", "per-candidate") and self.normalise != "none":
            raise UserError(
                f"TopK: gradient is {self.gradient!r} with normalise {self.normalise!r}, where "
                "sums are 1 already; expected gradient 'plain' or normalise 'none'"
            )
        if self.normalise == "teacher" and self.divergence != "forward":
            raise UserError(
                f"TopK: normalise is 'teacher' with divergence {self.divergence!r}, whose optimum "
                "needs both sides on one scale; expected divergence 'forward'"
            )
        if self.clamp and (self.normalise, self.gradient) != ("none", "plain"):
            raise UserError(
                f"TopK: clamp is true with normalise {self.normalise!r} and gradient "
                f"{self.gradient!r}, expected normalise 'none' and gradient 'plain'"
            )
        if self.beta is not None and self.divergence not in ("jsd", "mixed"):
            raise UserError(
                f"TopK: beta is {self.beta} with divergence {self.divergence!r}, expected it with "
                "'jsd' or 'mixed' only"
            )
        self._inner()  # raises if beta is out of range

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        ids, kept = self._choose(student_logprobs.detach(), teacher_logprobs.detach())
        student, teacher = student_logprobs.gather(-1, ids), teacher_logprobs.gather(-1, ids)
        match self.normalise:
            case "none":
                pass
            case "renormalise":
                student = student - _log_mass(student, kept)
                teacher = teacher - _log_mass(teacher, kept)
            case "teacher":
                teacher = teacher - _log_mass(teacher, kept)
            case "tail":
                student = torch.cat([student, _log_tail(student, kept)], dim=-1)
                teacher = torch.cat([teacher, _log_tail(teacher, kept)], dim=-1)
                kept = torch.cat([kept, torch.ones_like(kept[..., :1])], dim=-1)
            case _:
                assert_never(self.normalise)
        # Unused slots get probability 1 on both sides, which adds 0 to value and gradient.
        value = self._compare(student.where(kept, 0.0), teacher.where(kept, 0.0), kept)
        return value.clamp(min=0) if self.clamp else value

    def _choose(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Return token ids of the support, `[..., m]`, and a mask of the m slots in use."""
        k = min(self.k, student_logprobs.shape[-1])
        if self.support == "student":
            ids = student_logprobs.topk(k).indices
            return ids, torch.ones_like(ids, dtype=torch.bool)
        top_t = teacher_logprobs.topk(k).indices
        all_kept = torch.ones_like(top_t, dtype=torch.bool)
        if self.support == "teacher":
            return top_t, all_kept
        top_s = student_logprobs.topk(k).indices
        in_top_s = torch.zeros_like(student_logprobs, dtype=torch.bool).scatter_(-1, top_s, True)
        shared = in_top_s.gather(-1, top_t)
        if self.support == "intersection":
            return top_t, shared
        return torch.cat([top_s, top_t], dim=-1), torch.cat([all_kept, ~shared], dim=-1)

    def _compare(self, student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
        """Map `[..., m]` log-probs on the support, and a mask of the slots in use, to `[...]`."""
        match self.gradient:
            case "plain":
                return self._inner()(student, teacher)
            case "stop-gradient":
                return (student.exp() * log_quotient(student, teacher).detach()).sum(dim=-1)
            case "corrected":
                return kl(student, teacher) + (teacher.exp() - student.exp()).sum(dim=-1)
            case "per-candidate":
                share = (student - _log_mass(student, kept)).exp().where(kept, 0.0)
                cost = (share * log_quotient(student, teacher)).detach()
                return (cost * log_quotient(student, student.detach()).exp()).sum(dim=-1)
        assert_never(self.gradient)

    def _inner(self) -> Divergence:
        match self.divergence:
            case "reverse":
                return ReverseKL()
            case "forward":
                return ForwardKL()
            case "jsd":
                return JSD() if self.beta is None else JSD(self.beta)
            case "mixed":
                return MixedKL() if self.beta is None else MixedKL(self.beta)
        assert_never(self.divergence)


def _log_mass(logprobs: Tensor, kept: Tensor) -> Tensor:
    """Return `log sum_kept p`, `[..., m] -> [..., 1]`."""
    return logprobs.where(kept, -torch.inf).logsumexp(dim=-1, keepdim=True)


def _log_tail(logprobs: Tensor, kept: Tensor) -> Tensor:
    """Return `log(1 - sum_kept p)`, `[..., m] -> [..., 1]`; a tail is at least one epsilon."""
    below_one = -torch.finfo(logprobs.dtype).eps
    return torch.log(-torch.expm1(_log_mass(logprobs, kept).clamp(max=below_one)))
