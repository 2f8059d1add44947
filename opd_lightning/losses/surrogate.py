"""Policy-gradient losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.errors import UserError


@dataclass(frozen=True)
class Surrogate:
    """PPO's token loss `max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high))` (1707.06347).

    Args:
        ratio_to: Denominator of rho. "trainer": the student's probability, detached, so rho is 1 in
            value and clipping has no effect while each batch of rollouts is used for one step
            (verl, G-OPD). "sampler": the engine's probability, the full untruncated ratio of
            Thinking Machines' recipe; rows not sampled from the student under its own prompt use
            "trainer".
        clip_low: Clip the ratio at 1 - clip_low; verl uses 0.2. None: no lower clip.
        clip_high: Clip the ratio at 1 + clip_high. None: no upper clip.
        dual_clip: Bound the loss of a negative advantage by dual_clip * -A (1912.09729); verl uses
            3.0. None: no bound.
    """

    ratio_to: Literal["trainer", "sampler"] = "trainer"
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip_low is not None and not 0 <= self.clip_low <= 1:
            raise UserError(f"Surrogate: clip_low is {self.clip_low}, expected a number in [0, 1]")
        if self.clip_high is not None and not self.clip_high >= 0:
            raise UserError(f"Surrogate: clip_high is {self.clip_high}, expected 0 or more")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise UserError(f"Surrogate: dual_clip is {self.dual_clip}, expected more than 1")

    def __call__(
        self,
        student_logprobs: Tensor,
        advantages: Tensor,
        behaviour_logprobs: Tensor,
        on_policy: Tensor,
    ) -> Tensor:
        """Compute the loss of every response token.

        Args:
            student_logprobs: `[B, R]` nats, with a gradient.
            advantages: `[B, R]`; detached here.
            behaviour_logprobs: `[B, R]` nats, the engine's; NaN if not sampled.
            on_policy: `[B]` bool, rows sampled from the student under its own prompt.

        Returns:
            `[B, R]`, with a gradient to the student only.
        """
        advantages = advantages.detach()
        old = student_logprobs.detach()
        if self.ratio_to == "sampler":
            # Before the difference: a NaN discarded after it would still have a NaN gradient.
            old = torch.where(on_policy[:, None], behaviour_logprobs, old)
        ratio = (student_logprobs - old).exp()
        loss = -advantages * ratio
        if self.clip_low is not None or self.clip_high is not None:
            low = None if self.clip_low is None else 1 - self.clip_low
            high = None if self.clip_high is None else 1 + self.clip_high
            loss = torch.maximum(loss, -advantages * ratio.clamp(low, high))
        if self.dual_clip is not None:
            bounded = torch.minimum(loss, -advantages * self.dual_clip)
            loss = torch.where(advantages < 0, bounded, loss)
        return loss
