"""Token advantages, all written in d_t = log pi_T(y_t) - log pi_theta(y_t)."""

import torch
from torch import Tensor


def log_ratio(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """d_t, `[B, R]` nats, detached: positive = the teacher likes the sampled token more.

    As an advantage it is the sampled-token reverse KL of Thinking Machines' recipe and of G-OPD
    at scale 1: `E[-d grad log pi_theta]` is the gradient of `KL(pi_theta || pi_T)` per prefix.
    """
    return (teacher_logprobs - student_logprobs).detach()


def return_to_go(signal: Tensor, mask: Tensor, discount: float) -> Tensor:
    """`A_t = sum_{k >= t} discount^(k - t) signal_k` over unmasked tokens, `[B, R]`.

    Discount 0 keeps the immediate token (the recipes' default); 1 gives the gradient of the
    sequence-level reverse KL; values between are biased for both and trade variance.
    """
    signal = torch.where(mask, signal, 0.0)
    if discount == 0:
        return signal
    running = torch.zeros_like(signal[:, 0])
    columns = []
    for column in reversed(signal.unbind(dim=1)):
        running = column + discount * running
        columns.append(running)
    return torch.where(mask, torch.stack(columns[::-1], dim=1), 0.0)
