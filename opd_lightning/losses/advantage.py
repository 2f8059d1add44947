"""Token advantages in terms of d_t = log pi_T(y_t) - log pi_theta(y_t)."""

import torch
from torch import Tensor

# Of rewards: a group with at most this standard deviation has equal ones, up to rounding.
RESOLUTION = 1e-7


def extrapolated(
    teacher_logprobs: Tensor,
    student_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    scale: float,
) -> Tensor:
    """Return `d_t + (scale - 1) (log pi_T - log pi_ref)`, `[B, R]` nats, detached.

    The advantage of G-OPD (2602.12125). Its expected gradient per prefix is that of the reverse KL
    to a target proportional to `pi_T^scale pi_ref^(1 - scale)`: the reference at 0, the teacher at
    1, beyond the teacher above 1 (ExOPD; the authors use 1.25). At 1 it is exactly d_t, the
    sampled-token reverse KL of Thinking Machines' recipe, and the reference, not read, may be None.
    """
    signal = teacher_logprobs - student_logprobs
    if scale != 1:
        assert reference_logprobs is not None, f"scale {scale} reads the reference"
        signal = signal + (scale - 1) * (teacher_logprobs - reference_logprobs)
    return signal.detach()


def group_advantage(
    rewards: Tensor,
    group_mean: Tensor,
    group_std: Tensor,
    *,
    epsilon: float = 1e-6,
    normalise: bool = True,
) -> Tensor:
    """Return GRPO's `(R - mean) / (std + epsilon)` per prompt, `[B] -> [B, 1]` (2402.03300).

    Exactly 0 where all samples have the same reward, up to the resolution of float32 for rewards in
    [0, 1], for a group of one (NaN statistics), and where the reward is not known (NaN).
    `normalise=False` omits the division (Dr. GRPO, 2503.20783). Epsilon is verl's default.
    """
    advantage = rewards - group_mean
    if normalise:
        advantage = advantage / (group_std + epsilon)
    known = (group_std > RESOLUTION) & ~rewards.isnan()
    return torch.where(known, advantage, 0.0)[:, None]


def return_to_go(signal: Tensor, mask: Tensor, discount: float) -> Tensor:
    """Return `A_t = sum_{k >= t} discount^(k - t) signal_k` over unmasked tokens, `[B, R]`.

    Discount 0 keeps the immediate token only (the recipes' default); 1 gives the gradient of the
    sequence-level reverse KL. Values in between are biased for both and trade variance.
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
