"""Estimators of `KL(student || other)` from sampled tokens (Schulman, "Approximating KL", 2020).

All are functions of `d = log other(y) - log student(y)` at tokens y that the student sampled.
The quantity that a value estimates differs from the one whose gradient its gradient estimates.
Values are not clamped and grow with d without bound.
"""

from __future__ import annotations

from typing import Literal, assert_never

from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "abs"]


def estimate_kl(student_logprobs: Tensor, other_logprobs: Tensor, kind: Estimator) -> Tensor:
    """Estimate the KL per token, `[B, R]`, `[B, R]` -> `[B, R]` nats; gradient to the student."""
    match kind:
        case "k1":
            return k1(student_logprobs, other_logprobs)
        case "k2":
            return k2(student_logprobs, other_logprobs)
        case "k3":
            return k3(student_logprobs, other_logprobs)
        case "abs":
            return absolute(student_logprobs, other_logprobs)
    assert_never(kind)


def k1(student_logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Return `-d`, `[B, R]`: an unbiased estimate of either sign.

    Its gradient `grad log student` has expectation zero and does not contain the other model, so
    methods refuse it as a loss. As the advantage `d` of a policy gradient it gives
    `grad KL(student || other)`.
    """
    return student_logprobs - other_logprobs


def k2(student_logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Return `d^2 / 2`, `[B, R]`: equal to the KL in expectation to second order only.

    Its gradient has the expectation `E[-d grad log student] = grad KL(student || other)`.
    """
    return (student_logprobs - other_logprobs).square() / 2


def k3(student_logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Return `exp(d) - 1 - d`, `[B, R]`: an unbiased estimate, at least 0, of low variance.

    Its gradient has the expectation `E[(1 - exp(d)) grad log student] = grad KL(other || student)`:
    that of the *forward* KL.
    """
    d = other_logprobs - student_logprobs
    return d.expm1() - d


def absolute(student_logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Return `|d|`, `[B, R]`: not a KL estimate; the gradient does not depend on the size of d.

    Its gradient has the expectation `E[-sign(d) grad log student]`, that of the L1 distance
    `sum_v |student(v) - other(v)|`.
    """
    return (student_logprobs - other_logprobs).abs()
