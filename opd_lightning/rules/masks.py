"""Masks by a token's position, id or entropy."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opd_lightning.losses.schedule import Schedule, value_at
from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.rules.common import check, kept, quantile, rate


def positions(scored: Scored) -> Tensor:
    """Return the number of response tokens before each, `[B, R]`: 0 for the first."""
    return scored.batch.response_mask.cumsum(dim=1) - 1


@dataclass(frozen=True)
class PrefixWindow(Rule):
    """Fast-OPD (2602.15260): keeps only the first tokens of a response.

    It saves time if sampling stops there too, by the rollouts' length limit; a response that is
    cut there is neither truncated nor a failure.

    Rates: kept.

    Args:
        tokens: Length of the prefix, rounded down; `losses.schedule.Staircase` increases it.
    """

    tokens: float | Schedule

    def __post_init__(self) -> None:
        fixed = not isinstance(self.tokens, Schedule)
        check(self, "tokens", not fixed or value_at(self.tokens, 0) >= 1, "1 or more")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        length = int(value_at(self.tokens, scored.batch.totals.step))
        keep = positions(scored) < length
        return kept(signal, keep), {"prefix_window/kept": rate(scored, keep)}


@dataclass(frozen=True)
class SkipFirst(Rule):
    """SDFT (2601.19897): drops the first tokens of a response.

    Rates: kept.

    Args:
        tokens: Number of dropped tokens; the authors' code uses 3.
    """

    tokens: int = 3

    def __post_init__(self) -> None:
        check(self, "tokens", self.tokens >= 0, "0 or more")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        keep = positions(scored) >= self.tokens
        return kept(signal, keep), {"skip_first/kept": rate(scored, keep)}


@dataclass(frozen=True)
class TokenMask(Rule):
    """Mask of special tokens (2603.25562).

    If the two models were trained with different chat formats, formatting tokens have log-ratios
    so large that they dominate the loss.

    Rates: kept.

    Args:
        token_ids: Ids to drop, at least one.
    """

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        ok = len(self.token_ids) > 0 and min(self.token_ids) >= 0
        check(self, "token_ids", ok, "at least one token id")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        ids = scored.batch.response_ids
        keep = ~torch.isin(ids, torch.tensor(self.token_ids, device=ids.device))
        return kept(signal, keep), {"token_mask/kept": rate(scored, keep)}


@dataclass(frozen=True)
class TeacherEntropyMask(Rule):
    """Keeps tokens where the teacher is sure, or where it is not.

    Some implementations of EOPD drop the teacher's signal at high teacher entropy, which is this
    rule; EOPD itself (2603.07079) adds a term there, `EntropyGatedForwardKL`.

    Rates: kept.

    Args:
        threshold: Entropy of the teacher's full distribution, nats.
        keep: "below" keeps tokens up to the threshold, "above" the others.
    """

    threshold: float = 0.8
    keep: Literal["below", "above"] = "below"

    needs = ("teacher",)
    reads_entropy = True

    def __post_init__(self) -> None:
        check(self, "threshold", 0 <= self.threshold < float("inf"), "a finite number of 0 or more")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        sure = scored.teacher.entropy <= self.threshold
        keep = sure if self.keep == "below" else ~sure
        return kept(signal, keep), {"teacher_entropy_mask/kept": rate(scored, keep)}


@dataclass(frozen=True)
class HighEntropyMask(Rule):
    """Keeps the tokens of the step at which the student is least sure (2506.01939).

    The threshold is a quantile of the student's entropy over all tokens of the step that take part.
    The formula and the share are known at second hand.

    Rates: kept.

    Args:
        share: Share of tokens to keep, in (0, 1]. The authors of the paper above keep 0.2 under
            RL; TIP (2604.14084) keeps 0.5 under distillation.
    """

    share: float = 0.2

    step_wide = True

    def __post_init__(self) -> None:
        check(self, "share", 0 < self.share <= 1, "a number in (0, 1]")

    def observe(self, signal: Signal, scored: Scored) -> Tensor:
        """Return student entropies in nats, `[N, 1]`."""
        return scored.student.entropy[signal.mask][:, None].double()

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        assert observed is not None, "step-wide"
        keep = scored.student.entropy >= quantile(observed[:, 0], 1 - self.share)
        return kept(signal, keep), {"high_entropy_mask/kept": rate(scored, keep)}
