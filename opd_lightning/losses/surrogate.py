"""Losses whose gradient is a policy gradient."""

from torch import Tensor


def policy_gradient(student_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Per-token loss `-sg[A_t] rho_t` with `rho_t = exp(log pi - sg[log pi])`, `[B, R]`.

    Strictly on-policy: rho is 1 in value and its gradient is `grad log pi`, so the loss reads as
    the negative mean advantage. Advantages are detached here, whoever made them; they are not
    whitened, baselined or clipped.
    """
    ratio = (student_logprobs - student_logprobs.detach()).exp()
    return -advantages.detach() * ratio
