"""Divergences between next-token distributions over the whole vocabulary, one value per token.

Each is a frozen dataclass, so that a configuration can name it, and a callable of two `[..., V]`
log-softmaxes. S is the student's distribution, T the teacher's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd_lightning.errors import RunStoppedError, UserError


class Divergence(ABC):
    """Base of divergences between the next-token distributions of student and teacher."""

    def at(self, step: int) -> Divergence:
        """Return the divergence of an optimiser step: itself, unless it has a schedule."""
        return self

    @abstractmethod
    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """Map `[..., V]`, `[..., V]` to `[...]` nats, with a gradient to the student only."""


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """`KL(S || T)`: mode-seeking; infinite where T is 0 and S is not.

    Its gradient is `sum_v S (log S - log T) grad log S`.
    """

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return kl(student_logprobs, teacher_logprobs)


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
        clip: Largest contribution of one token of the vocabulary to the sum, nats; above it the
            contribution has no gradient. OPSD's code (2601.18734) had 0.05. None for no bound.
    """

    beta: float = 0.5
    clip: float | None = None

    def __post_init__(self) -> None:
        _check_share(self)
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"JSD: clip is {self.clip}, expected more than 0, or null")

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        pairs = self._weighted_pairs(student_logprobs, teacher_logprobs)
        if self.clip is None:
            return torch.stack([weight * kl(p, q) for weight, p, q in pairs]).sum(dim=0)
        terms = torch.stack([weight * kl_terms(p, q) for weight, p, q in pairs]).sum(dim=0)
        return terms.clamp(max=self.clip).sum(dim=-1)

    def _weighted_pairs(
        self, student_logprobs: Tensor, teacher_logprobs: Tensor
    ) -> list[tuple[float, Tensor, Tensor]]:
        """Return the KLs that the divergence is the sum of: weight, and both `[..., V]`."""
        if self.beta == 0:
            return [(1.0, teacher_logprobs, student_logprobs)]
        if self.beta == 1:
            return [(1.0, student_logprobs, teacher_logprobs)]
        middle = _log_mixture(student_logprobs, teacher_logprobs, self.beta)
        return [
            (self.beta, teacher_logprobs, middle),
            (1 - self.beta, student_logprobs, middle),
        ]


@dataclass(frozen=True)
class MixedKL(Divergence):
    """`(1 - beta) KL(T || S) + beta KL(S || T)`: both directions, as in NeMo-RL's distillation.

    Unlike `JSD` it compares with no mixture and is continuous in beta.

    Args:
        beta: Weight of the reverse KL, from 0 to 1.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        _check_share(self)

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        forward = kl(teacher_logprobs, student_logprobs)
        return (1 - self.beta) * forward + self.beta * kl(student_logprobs, teacher_logprobs)


@dataclass(frozen=True)
class TokenwiseKL(Divergence):
    """Both KLs, weighted for each token of the vocabulary (ToDi, 2505.16297; official code).

        sum_v w(v) T(v) log(T(v) / S(v)) + (1 - w(v)) S(v) log(S(v) / T(v)),
        w(v) = sigmoid(log(T(v) / S(v)))

    w has no gradient. The forward part counts where the student is too low, the reverse part where
    it is too high.
    """

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        ratio = log_quotient(teacher_logprobs, student_logprobs).detach()
        forward = ratio.sigmoid() * kl_terms(teacher_logprobs, student_logprobs)
        reverse = (-ratio).sigmoid() * kl_terms(student_logprobs, teacher_logprobs)
        return (forward + reverse).sum(dim=-1)


@dataclass(frozen=True)
class AlphaBetaDivergence(Divergence):
    """alpha-beta divergence (ABKD, 2505.04560; official code).

        -1 / (alpha beta) sum_v [T^alpha S^beta - (alpha T^(alpha + beta) + beta S^(alpha + beta))
                                 / (alpha + beta)]

    At beta 0 and at alpha 0 the code has, where the formula divides by 0,

        sum_v T^alpha log(T / S) + (S^alpha - T^alpha) / alpha                      beta 0
        sum_v S^beta log(S / T) + (T^beta - S^beta) / beta                          alpha 0

    The formula tends to these divided by alpha and by beta, so the scale is discontinuous there
    unless the other parameter is 1: (1, 0) is the forward KL and (0, 1) the reverse KL, as limits.
    (1/2, 1/2) is four times the squared Hellinger distance.

    Args:
        alpha: 0 or more; larger, it attends to tokens that the teacher finds probable.
        beta: 0 or more, not with alpha 0; larger, to tokens that the student finds probable.
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"AlphaBetaDivergence: {name} is {getattr(self, name)}, expected a finite "
                    "number of 0 or more"
                )
        if self.alpha + self.beta == 0:
            raise UserError(
                "AlphaBetaDivergence: alpha and beta are 0, expected one of them to be more"
            )

    def __call__(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        alpha, beta = self.alpha, self.beta
        if beta == 0:
            return _power_kl(teacher_logprobs, student_logprobs, alpha)
        if alpha == 0:
            return _power_kl(student_logprobs, teacher_logprobs, beta)
        both = (alpha * teacher_logprobs + beta * student_logprobs).exp()
        theirs, ours = (((alpha + beta) * x).exp() for x in (teacher_logprobs, student_logprobs))
        mean = (alpha * theirs + beta * ours) / (alpha + beta)
        return (mean - both).sum(dim=-1) / (alpha * beta)


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

    From secondary sources: that it is one of the paper's divergences.
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


def kl(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    """Compute `sum_v p(v) (log p(v) - log q(v))`, `[..., V] -> [...]` nats, with gradients to both.

    Tokens with p = 0 (log-prob -inf) add 0. Nothing is renormalised: on a part of the vocabulary
    the sum may be negative.
    """
    return kl_terms(p_logprobs, q_logprobs).sum(dim=-1)


def kl_terms(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    """Return the summands of `kl`, `[..., V]`."""
    return p_logprobs.exp() * log_quotient(p_logprobs, q_logprobs)


def log_quotient(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    """Return `log p - log q`, `[..., V]`; 0 where p is 0, so that `p log(p / q)` is 0 there."""
    # Filled before the multiplication: 0 * inf is NaN, in the value and in the gradient.
    return (p_logprobs - q_logprobs).masked_fill_(p_logprobs == -torch.inf, 0.0)


def _power_kl(p_logprobs: Tensor, q_logprobs: Tensor, power: float) -> Tensor:
    """Compute `sum_v p^a log(p / q) + (q^a - p^a) / a`, `[..., V] -> [...]`; a is `power`."""
    p, q = (power * p_logprobs).exp(), (power * q_logprobs).exp()
    return (p * log_quotient(p_logprobs, q_logprobs) + (q - p) / power).sum(dim=-1)


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


def _check_share(divergence: JSD | MixedKL) -> None:
    if not 0 <= divergence.beta <= 1:
        name = type(divergence).__name__
        raise UserError(f"{name}: beta is {divergence.beta}, expected a number from 0 to 1")


def _check_skew(divergence: SkewedForwardKL | SkewedReverseKL) -> None:
    if not 0 <= divergence.alpha < 1:
        name = type(divergence).__name__
        raise UserError(f"{name}: alpha is {divergence.alpha}, expected a number in [0, 1)")


def checked_values(function: object, values: Any, count: int) -> Tensor:
    """Return the values `[n, ...]` of a function of distributions of n tokens.

    One number for all would be taken for the value of each.

    Raises:
        RunStoppedError: They are no tensor, or not one for each token.
    """
    if isinstance(values, Tensor) and values.dim() and len(values) == count:
        return values
    name = getattr(function, "__name__", type(function).__name__)
    got = f"the shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    raise RunStoppedError(
        f"{name}: got {got} for {count} tokens, expected [{count}]; sum over the vocabulary alone, "
        "the last dimension"
    )
