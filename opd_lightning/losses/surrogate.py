"""Losses whose gradient is a policy gradient."""

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
        ratio_to: What rho divides the student's probability by. "trainer": its own, detached, so
            rho is 1 in value and no clip acts while every batch of rollouts makes one step (verl,
            G-OPD). "sampler": the engine's, the full untruncated ratio of Thinking Machines'
            recipe; rows that the student did not sample under its own prompt keep "trainer".
        clip_low: How far below 1 a ratio may still be rewarded; verl's 0.2. None: any distance.
        clip_high: The same above 1.
        dual_clip: Bounds the loss of a negative advantage at this many times -A (1912.09729);
            verl's 3.0. None: no bound.
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
        """The loss of every response token.

        Args:
            student_logprobs: `[B, R]` nats, with a graph.
            advantages: `[B, R]`; detached here.
            behaviour_logprobs: `[B, R]` nats, the engine's; NaN where nobody sampled.
            on_policy: `[B]` bool, rows that the student sampled under its own prompt.

        Returns:
            `[B, R]`, with a gradient to the student alone.
        """
        advantages = advantages.detach()
        old = student_logprobs.detach()
        if self.ratio_to == "sampler":
            # Before the difference: a NaN that is thrown away later still has a NaN gradient.
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
