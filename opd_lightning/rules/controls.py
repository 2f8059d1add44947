"""Controls: rules that act at random, for comparison with those that decide."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.rules.common import check, kept, rate, uniform_draws, with_advantage


@dataclass(frozen=True)
class RandomGate(Rule):
    """Control of a gate: acts on tokens, or rollouts, that are chosen at random.

    A gate that helps should help more than this one at the gate's own rate. The choice follows from
    the seed, the step, the prompt's place in the run and the response, so that it does not depend
    on micro-batches, ranks or restarts.

    Rates: chosen.

    Args:
        share: Probability with which a token, or a rollout, is chosen, in [0, 1].
        others: Of those not chosen: "drop" takes them out of the loss, "plain" gives them the
            advantage d_t, as `SignGate` gives it without consensus.
        per: "token" draws for each token, "rollout" once for a whole rollout.
        seed: Seed of the choice; gates with the same seed choose alike.
    """

    share: float
    others: Literal["drop", "plain"] = "drop"
    per: Literal["token", "rollout"] = "token"
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, "share", 0 <= self.share <= 1, "a number in [0, 1]")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("teacher",) if self.others == "plain" else ()

    @property
    def shapes_advantage(self) -> bool:  # type: ignore[override]
        return self.others == "plain"

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        chosen = uniform_draws(scored.batch, self.seed, per=self.per) < self.share
        rates = {"random_gate/chosen": rate(scored, chosen)}
        if self.others == "drop":
            return kept(signal, chosen), rates
        mixed = torch.where(chosen, signal.advantage, scored.log_ratio)
        return with_advantage(signal, mixed), rates
