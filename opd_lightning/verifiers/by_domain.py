"""Dispatch of responses to one verifier per domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from opd_lightning.errors import UserError
from opd_lightning.verifiers.base import Rewards, Verifier, checked_rewards

if TYPE_CHECKING:
    from opd_lightning.types import Prompt


class ByDomainVerifier(Verifier):
    """Verifier that dispatches by `Prompt.domain`, as runs with several skills need it.

    The scores of the domains are logged as the parts `reward/<domain>`.

    Args:
        verifiers: One per domain.
        default: Verifier of all other domains. None refuses their prompts before training.
    """

    def __init__(self, verifiers: dict[str, Verifier], default: Verifier | None = None) -> None:
        if not verifiers:
            raise UserError("ByDomainVerifier.verifiers: got none, expected one per domain")
        self.verifiers = verifiers
        self.default = default

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return self.score(prompts, responses).totals

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Rewards:
        def score(verifier: Verifier, mine: list[Prompt], texts: list[str]) -> list[float]:
            return checked_rewards(verifier, mine, verifier.verify(mine, texts))

        totals = self._each(score, prompts, responses)
        parts = {domain: [math.nan] * len(totals) for domain in self.verifiers}
        for i, prompt in enumerate(prompts):
            if prompt.domain in parts:
                parts[prompt.domain][i] = totals[i]
        return Rewards(totals, parts)

    def feedback(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[str | None]:
        return self._each(
            lambda verifier, mine, texts: verifier.feedback(mine, texts), prompts, responses
        )

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            self._of(prompt).check([prompt])

    def _of(self, prompt: Prompt) -> Verifier:
        verifier = self.verifiers.get(prompt.domain, self.default)
        if verifier is None:
            raise UserError(
                f"{prompt.origin or prompt.id}: no verifier for domain {prompt.domain!r}; the "
                f"known ones are {', '.join(sorted(self.verifiers))}; add it, or a default"
            )
        return verifier

    def _each(
        self,
        call: Callable[[Verifier, list[Prompt], list[str]], Sequence[Any]],
        prompts: Sequence[Prompt],
        responses: Sequence[str],
    ) -> list[Any]:
        """Return the results of one call per verifier, in the order of the responses."""
        rows: dict[int, list[int]] = {}
        verifiers = [self._of(prompt) for prompt in prompts]
        for i, verifier in enumerate(verifiers):
            rows.setdefault(id(verifier), []).append(i)
        results: list[Any] = [None] * len(responses)
        for mine in rows.values():
            verifier = verifiers[mine[0]]
            answers = call(verifier, [prompts[i] for i in mine], [responses[i] for i in mine])
            for i, answer in zip(mine, answers, strict=True):
                results[i] = answer
        return results
