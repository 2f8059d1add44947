"""Masks by a token's position, id, likelihood or entropy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from opd_lightning.losses.divergence import JSD, kl
from opd_lightning.losses.schedule import Schedule, value_at
from opd_lightning.rules.base import Compare, Rates, Rule, Scored, Signal
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
class LikelihoodMask(Rule):
    """Keeps tokens by their probability under the student (2510.00526; official code).

    Meant for `SFT`: the authors keep tokens from a probability on, or up to one.

    Rates: kept.

    Args:
        least: Smallest probability that is kept, in [0, 1].
        most: Largest probability that is kept, in [0, 1].
    """

    least: float = 0.0
    most: float = 1.0

    def __post_init__(self) -> None:
        check(self, "least", 0 <= self.least <= self.most, f"from 0 to most ({self.most})")
        check(self, "most", self.most <= 1, "at most 1")

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        likelihood = scored.student.logprobs.exp()
        keep = (likelihood >= self.least) & (likelihood <= self.most)
        return kept(signal, keep), {"likelihood_mask/kept": rate(scored, keep)}


@dataclass(frozen=True)
class HighEntropyMask(Rule):
    """Keeps the tokens of the step at which the student is least sure (2506.01939).

    The threshold is a quantile of the student's entropy over all selected tokens of the step.
    From secondary sources: the formula and the share.

    Rates: kept.

    Args:
        share: Share of tokens to keep, in (0, 1]. The authors of the paper above keep 0.2 under
            RL; TIP (2604.14084) keeps 0.5 under distillation.
    """

    share: float = 0.2

    rate_name: ClassVar[str] = "high_entropy_mask/kept"
    step_wide = True

    def __post_init__(self) -> None:
        check(self, "share", 0 < self.share <= 1, "a number in (0, 1]")

    def _values(self, scored: Scored) -> Tensor:
        """Return the values to compare, `[B, R]`: the highest are kept."""
        return scored.student.entropy

    def observe(self, signal: Signal, scored: Scored) -> Tensor:
        """Return the values of the selected tokens, `[N, 1]`."""
        return self._values(scored)[signal.mask][:, None].double()

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        assert observed is not None, "step-wide"
        keep = self._values(scored) >= quantile(observed[:, 0], 1 - self.share)
        return kept(signal, keep), {self.rate_name: rate(scored, keep)}


@dataclass(frozen=True)
class TokenImportanceMask(HighEntropyMask):
    """TIP (2604.14084): keeps tokens of high student entropy, or far from the teacher.

        s = h + delta - h delta,   h = H(S) / log V,   delta = JSD_0.5(S, T) / log 2

    From secondary sources: the score. From the authors' code: the scales of its parts. It reads
    full distributions: needs a teacher in this process.

    Rates: kept.

    Args:
        share: Share of tokens to keep, in (0, 1]; the authors keep 0.5.
    """

    share: float = 0.5

    rate_name: ClassVar[str] = "token_importance_mask/kept"
    comparison: ClassVar[str] = "token_importance"  # key in `Scored.values`: s, in [0, 1]

    def comparisons(self) -> Mapping[str, Compare]:
        return {self.comparison: Compare("teacher", token_importance)}

    def _values(self, scored: Scored) -> Tensor:
        return scored.values[self.comparison]


def token_importance(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """Return TIP's score from two log-softmaxes, `[..., V]`, `[..., V]` -> `[...]`; detached."""
    student, teacher = student_logprobs.detach(), teacher_logprobs.detach()
    unsure = relative_entropy(student)
    apart = JSD()(student, teacher) / math.log(2)
    return unsure + apart - unsure * apart


def relative_entropy(logprobs: Tensor, _: Tensor | None = None) -> Tensor:
    """Return `H / log V` of log-softmaxes, `[..., V] -> [...]`, from 0 to 1; detached."""
    given = logprobs.detach()
    return kl(given, torch.zeros_like(given)) / -math.log(given.shape[-1])
