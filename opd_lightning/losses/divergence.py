"""Divergences between next-token distributions, one value per token."""

from torch import Tensor


def reverse_kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """`KL(student || teacher) = sum_v S(v) (log S(v) - log T(v))`, `[..., V] -> [...]`, nats.

    Both arguments are log-softmaxed over the whole vocabulary. The gradient flows through both
    student factors; it is `sum_v S (log S - log T) grad log S`.
    """
    return (student_logprobs.exp() * (student_logprobs - teacher_logprobs)).sum(dim=-1)
