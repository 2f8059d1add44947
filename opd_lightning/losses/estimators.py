"""Estimators of `KL(student || other)` from sampled tokens (Schulman, "Approximating KL", 2020).

Both are functions of `d = log other(y) - log student(y)` at tokens y that the student sampled.
The quantity that a value estimates differs from the one whose gradient its gradient estimates.
Values are not clamped and grow with d without bound. The third estimate, `-d`, has a gradient of
expectation 0, so it is no loss.
"""

from __future__ import annotations

from torch import Tensor


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
