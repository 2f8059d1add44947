"""Base class of verifiers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opd_lightning.errors import RunStoppedError, UserError

if TYPE_CHECKING:
    # Not at run time: verifiers' worker processes need neither torch nor its memory.
    from opd_lightning.types import Prompt


@dataclass(frozen=True)
class Rewards:
    """Scores of responses, and what they were summed from."""

    totals: list[float]  # one per response, in [0, 1]; NaN for a response that was not checked
    # Scores of the parts of a sum by name, in [0, 1]; NaN where a part does not apply.
    parts: Mapping[str, list[float]] = field(default_factory=dict)


class Verifier(ABC):
    """Base of verifiers, which score responses against the reference answers of their prompts."""

    @abstractmethod
    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return a score in [0, 1] per (prompt, response text without special tokens) pair.

        NaN for a response that could not be checked for a reason that is not in the response; it
        then has no reward.
        """

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Rewards:
        """Return the scores with their parts, which are logged. Those of `verify` have no parts.

        The names of the parts must be the same in every call.
        """
        return Rewards(self.verify(prompts, responses))

    def feedback(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[str | None]:
        """Return a feedback text for each response, as SDPO uses it; None for no feedback.

        Called after `verify`, with the same arguments, if a view's template reads `feedback`.
        """
        return [None] * len(responses)

    def answers(self, responses: Sequence[str]) -> Sequence[str | None] | None:
        """Return the final answer of each response for a majority vote; equal answers, equal texts.

        None for a response without an answer; None as a whole if the verifier extracts no answers.
        """
        return None

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError, before training, unless every prompt has an answer.

        Verifiers with other requirements, or none, override it.
        """
        for prompt in prompts:
            if not (prompt.answer or "").strip():
                raise UserError(
                    f"{prompt.origin or prompt.id}: {type(self).__name__} needs an 'answer' to "
                    f"compare with, got {prompt.answer!r}; add it to the row or train without a "
                    "verifier"
                )


def check_time_limits(owner: str, **seconds: float) -> None:
    """Raise UserError unless every limit, by the name of its setting, is positive and finite."""
    for name, value in seconds.items():
        if not 0 < value < math.inf:
            raise UserError(f"{owner}: {name!r} must be above 0 and finite, got {value}")


def check_scale(owner: str, zero: float, one: float) -> None:
    """Raise UserError unless the scores that count as 0 and as 1 are finite and differ."""
    if not (math.isfinite(zero) and math.isfinite(one)) or zero == one:
        raise UserError(
            f"{owner}.scale: got [{zero}, {one}], expected two different finite numbers: the "
            "scores that count as 0 and as 1"
        )


def checked_rewards(
    verifier: Verifier, prompts: Sequence[Prompt], rewards: Iterable[float]
) -> list[float]:
    """Return a verifier's rewards; raise `RunStoppedError` unless all are numbers in [0, 1] or NaN.

    Rules, thresholds and figures are defined for that range.
    """
    numbers = checked_numbers(verifier, prompts, rewards, "a number from 0 to 1")
    for prompt, reward in zip(prompts, numbers, strict=True):
        if reward < 0 or reward > 1:
            raise RunStoppedError(
                f"{prompt.origin or prompt.id}: {type(verifier).__name__} gave a response the "
                f"reward {reward:.6g}, expected 0 to 1; scale it in its `verify`"
            )
    return numbers


def checked_numbers(
    verifier: Verifier, prompts: Sequence[Prompt], rewards: Iterable[float], expected: str
) -> list[float]:
    """Return a verifier's rewards of any scale; raise `RunStoppedError` unless all are numbers."""
    name = type(verifier).__name__
    if isinstance(rewards, str) or not isinstance(rewards, Iterable):
        raise RunStoppedError(
            f"{name}.verify: got {rewards!r:.40} for {len(prompts)} responses, expected a list "
            "with a number for each"
        )
    rewards = list(rewards)
    if len(rewards) != len(prompts):
        raise RunStoppedError(
            f"{name}.verify: got {len(rewards)} rewards for {len(prompts)} responses, expected one "
            "for each"
        )
    for prompt, reward in zip(prompts, rewards, strict=True):
        if not _is_number(reward):
            raise RunStoppedError(
                f"{prompt.origin or prompt.id}: {name} gave a response the reward {reward!r:.40}, "
                f"expected {expected}, or NaN if it cannot be checked; return that in its `verify`"
            )
    return rewards


def checked_score(verifier: Verifier, scores: object, count: int) -> Rewards:
    """Return what a verifier's `score` returned for `count` responses.

    Raises:
        RunStoppedError: It is no `Rewards`, or a part has not one number for each response.
    """
    call = f"{type(verifier).__name__}.score"
    if not isinstance(scores, Rewards):
        raise RunStoppedError(
            f"{call}: got {type(scores).__name__}, expected Rewards; return `Rewards(numbers)`, or "
            "override `verify`, which returns the numbers"
        )
    for name, values in scores.parts.items():
        if len(values) != count or not all(map(_is_number, values)):
            raise RunStoppedError(
                f"{call}: got {values!r:.40} as part {name!r}, expected {count} numbers, one for "
                "each response, NaN where the part does not apply"
            )
    return scores


def _is_number(value: object) -> bool:
    """Return whether a value converts to a float: numbers of any library, not texts."""
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return False
    return not isinstance(value, str | bytes)
