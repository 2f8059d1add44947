"""Divergences between next-token distributions over the whole vocabulary, one value per token.

Each is a frozen dataclass, so that a configuration can name it, and a callable of two `[..., V]`
log-softmaxes. S is the student's distribution, T the teacher's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from opd_lightning.errors import UserError


class Divergence(ABC):
    """Base of divergences between the next-token distributions of student and teacher."""

    @abstractmethod
    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """Map `[..., V]`, `[..., V]` to `[...]` nats, with a gradient to the student only."""


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """`KL(S || T)`: mode-seeking; infinite where T is 0 and S is not."""

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return reverse_kl(student_logprobs, teacher_logprobs)


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """`KL(T || S)`: soft-label cross entropy minus T's entropy; mode-covering.

    Its gradient is `-sum_v T grad log S`.
    """

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return kl(teacher_logprobs, student_logprobs)


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence, as TRL's `generalized_jsd_loss` (GKD, 2306.13649).

        M = (1 - beta) S + beta T,   JSD = beta KL(T || M) + (1 - beta) KL(S || M)

    At beta 0 it is defined as `KL(T || S)`, at 1 as `KL(S || T)`. The formula itself vanishes there
    (`JSD / beta -> KL(T || S)`), so the scale is discontinuous at both ends. At 0.5 it is symmetric
    and at most log 2. SDPO's and SDFT's alpha is this beta; other authors weight S by beta.

    Args:
        beta: Weight of the teacher in the mixture, from 0 to 1.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise UserError(f"JSD: beta is {self.beta}, expected a number from 0 to 1")

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        if self.beta == 0:
            return kl(teacher_logprobs, student_logprobs)
        if self.beta == 1:
            return kl(student_logprobs, teacher_logprobs)
        middle = _log_mixture(student_logprobs, teacher_logprobs, self.beta)
        from_teacher = kl(teacher_logprobs, middle)
        return self.beta * from_teacher + (1 - self.beta) * kl(student_logprobs, middle)


@dataclass(frozen=True)
class SkewedForwardKL(Divergence):
    """`KL(T || alpha T + (1 - alpha) S)` (DistiLLM, 2402.03898).

    Finite for any S: no token's log-ratio exceeds `-log alpha`. Alpha 0 is `ForwardKL`.

    Args:
        alpha: Weight of the teacher in the mixture, from 0 to below 1.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_skew(self)

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        mixture = _log_mixture(student_logprobs, teacher_logprobs, self.alpha)
        return kl(teacher_logprobs, mixture)


@dataclass(frozen=True)
class SkewedReverseKL(Divergence):
    """`KL(S || alpha S + (1 - alpha) T)` (DistiLLM, 2402.03898).

    Finite for any T: no token's log-ratio exceeds `-log alpha`. Alpha 0 is `ReverseKL`.

    Args:
        alpha: Weight of the student in the mixture, from 0 to below 1.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _check_skew(self)

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        mixture = _log_mixture(student_logprobs, teacher_logprobs, 1 - self.alpha)
        return kl(student_logprobs, mixture)


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """`sum_v |S(v) - T(v)| / 2` (f-DISTILL, 2307.15190): symmetric, from 0 to 1.

    That it is one of the paper's divergences is known at second hand.
    """

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return (student_logprobs.exp() - teacher_logprobs.exp()).abs().sum(dim=-1) / 2


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """Both KLs, weighted by where the distributions differ (AKL, 2404.02657; official code).

        h KL(T || S) + (1 - h) KL(S || T),   h = sum_head |S - T| / sum |S - T|

    The head is the most probable tokens of the teacher, at least one, whose mass is at most `head`.
    h has no gradient; it is 1/2 where the distributions are equal.

    Args:
        head: Mass of the head, in [0, 1].
    """

    head: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.head <= 1:
            raise UserError(f"AdaptiveKL: head is {self.head}, expected a number from 0 to 1")

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        weight = self._head_weight(student_logprobs.detach(), teacher_logprobs.detach())
        forward = kl(teacher_logprobs, student_logprobs)
        return weight * forward + (1 - weight) * kl(student_logprobs, teacher_logprobs)

    def _head_weight(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """Return h, `[...]`."""
        teacher, order = teacher_logprobs.exp().sort(dim=-1, descending=True)
        gap = (student_logprobs.exp().gather(-1, order) - teacher).abs()
        in_head = teacher.cumsum(dim=-1) <= self.head
        in_head[..., 0] = True
        total = gap.sum(dim=-1)
        return torch.where(total > 0, (gap * in_head).sum(dim=-1) / total, 0.5)


def reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Compute `KL(S || T) = sum_v S(v) (log S(v) - log T(v))`, `[..., V] -> [...]`, nats.

    Both arguments are log-softmaxes over the whole vocabulary. The gradient flows through both
    factors of S; it is `sum_v S (log S - log T) grad log S`.
    """
    return kl(student_logprobs, teacher_logprobs)


def kl(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    """Compute `sum_v p(v) (log p(v) - log q(v))`, `[..., V] -> [...]` nats, with gradients to both.

    Tokens with p = 0 (log-prob -inf) add 0. Nothing is renormalised: on a part of the vocabulary
    the sum may be negative.
    """
    return (p_logprobs.exp() * log_quotient(p_logprobs, q_logprobs)).sum(dim=-1)


def log_quotient(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    """Return `log p - log q`, `[..., V]`; 0 where p is 0, so that `p log(p / q)` is 0 there."""
    # Filled before the multiplication: 0 * inf is NaN, in the value and in the gradient.
    return (p_logprobs - q_logprobs).masked_fill_(p_logprobs == -torch.inf, 0.0)


def _log_mixture(student_logprobs: Tensor, teacher_logprobs: Tensor, weight: float) -> Tensor:
    """Return `log((1 - weight) S + weight T)`, `[..., V]`."""
    if weight == 0:
        return student_logprobs
    if weight == 1:
        return teacher_logprobs
    # logaddexp of two -inf has no gradient; a finite teacher log-prob keeps the gradient 0.
    teacher_logprobs = teacher_logprobs.clamp(min=torch.finfo(teacher_logprobs.dtype).min)
    return torch.logaddexp(
        student_logprobs + math.log1p(-weight), teacher_logprobs + math.log(weight)
    )


def _check_skew(divergence: SkewedForwardKL | SkewedReverseKL) -> None:
    if not 0 <= divergence.alpha < 1:
        name = type(divergence).__name__
        raise UserError(f"{name}: alpha is {divergence.alpha}, expected a number in [0, 1)")
