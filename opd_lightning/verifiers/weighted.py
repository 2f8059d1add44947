"""Weighted sums of verifiers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.verifiers.base import Rewards, Verifier, check_scale, checked_numbers

if TYPE_CHECKING:
    from opd_lightning.types import Prompt


@dataclass(frozen=True, kw_only=True)
class Part:
    """A summand of a reward.

    Args:
        verifier: Scores the responses.
        weight: Factor, 0 or more; those of all parts have to sum to 1.
        scale: Scores that count as 0 and as 1, for a verifier with another range: [-1, 1] maps -1
            to 0 and 1 to 1; [1, 0] turns a penalty into a score. A score outside ends the run.
    """

    verifier: Verifier
    weight: float = 1.0
    scale: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise UserError(f"Part.weight: got {self.weight}, expected a number of 0 or more")
        check_scale("Part", *self.scale)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the scores, mapped to [0, 1]; NaN for a response that was not checked."""
        zero, one = self.scale
        given = checked_numbers(
            self.verifier, prompts, self.verifier.verify(prompts, responses), "a number"
        )
        scores = [(score - zero) / (one - zero) for score in given]
        for prompt, raw, score in zip(prompts, given, scores, strict=True):
            if score < 0 or score > 1:
                raise RunStoppedError(
                    f"{prompt.origin or prompt.id}: {type(self.verifier).__name__} gave a response "
                    f"the score {raw:.6g}, expected {min(self.scale):g} to {max(self.scale):g}; "
                    "set the scale of its part"
                )
        return scores


class WeightedVerifier(Verifier):
    """Verifier that adds the scores of several, such as correctness, format and length.

    The parts are logged as `reward/<name>`, before weighting. A response that one part with a
    weight above 0 could not check has no reward.

    Args:
        parts: Summands by name. A weight of 0 logs a score without rewarding it.
    """

    def __init__(self, parts: dict[str, Part]) -> None:
        self.total = math.fsum(part.weight for part in parts.values())
        if not math.isclose(self.total, 1, rel_tol=0, abs_tol=1e-6):
            raise UserError(
                f"WeightedVerifier.parts: got weights that sum to {self.total:g}, expected 1, so "
                "that rewards stay in [0, 1]; change them"
            )
        self.parts = parts

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return self.score(prompts, responses).totals

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Rewards:
        scores = {name: part.score(prompts, responses) for name, part in self.parts.items()}
        weights = {name: part.weight for name, part in self.parts.items() if part.weight}
        totals = [
            # Divided, so that full scores make exactly 1 with weights such as three of 0.3333333.
            math.fsum(weight * scores[name][i] for name, weight in weights.items()) / self.total
            if not any(math.isnan(scores[name][i]) for name in weights)
            else math.nan
            for i in range(len(responses))
        ]
        return Rewards(totals, scores)

    def feedback(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[str | None]:
        """Return the parts' feedback, a line each; None where no part has any."""
        texts = [part.verifier.feedback(prompts, responses) for part in self.parts.values()]
        return ["\n".join(filter(None, given)) or None for given in zip(*texts, strict=True)]

    def answers(self, responses: Sequence[str]) -> Sequence[str | None] | None:
        """Return the answers of the first part that extracts any."""
        found = (part.verifier.answers(responses) for part in self.parts.values())
        return next((answers for answers in found if answers is not None), None)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for part in self.parts.values():
            part.verifier.check(prompts)
