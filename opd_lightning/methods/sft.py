"""Supervised fine-tuning and sequence-level distillation on given responses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.losses.surrogate import Surrogate
from opd_lightning.rules.base import Rates, Scored, Signal
from opd_lightning.training.composed import ComposedMethod
from opd_lightning.types import TokenScores


class SFT(ComposedMethod):
    """Cross-entropy on responses: `L = -(1/Z) sum_t w_t log pi_theta(y_t)`, w 1 without rules.

    `data.mix.recorded: 1` trains on the responses of the prompt file (SFT); `data.mix.teacher: 1`
    on those of the teacher's engine (SeqKD, 1606.07947), verified with `only_correct`. Rules weigh
    or mask tokens (`LikelihoodWeight`: DFT), terms are added (`TrustRegion`: a penalty to the
    start).
    """

    needs_demonstrations = True

    @property
    def takes_demonstrations(self) -> bool:
        return True

    @property
    def corrects_staleness(self) -> bool:
        return True  # demonstrations do not become stale

    def advantage(self, scored: Scored) -> Tensor:
        """Return 1 for every token: each is raised."""
        return torch.ones_like(scored.student.logprobs)

    def token_loss(
        self, student: TokenScores, signal: Signal, scored: Scored, values: Mapping[str, Tensor]
    ) -> Tensor:
        return -signal.advantage * student.logprobs

    def note_rules(self, scored: Scored, signal: Signal, rates: Rates) -> None:
        super().note_rules(scored, signal, rates)
        self.token_figures = {"logprob": scored.student.logprobs, **rates}

    def check(self) -> None:
        super().check()
        given = {"imitation": self.imitation, "surrogate": self.surrogate}
        for name, default in {"imitation": None, "surrogate": Surrogate()}.items():
            if given[name] != default:
                raise UserError(
                    f"{name}: got {given[name]}, but SFT imitates all responses, without an "
                    "importance ratio; leave it out"
                )
