"""A verifier that errs: the lab's exact match with a share of its scores turned over."""

from __future__ import annotations

import random
from collections.abc import Sequence

from opd_lightning.lab.arithmetic import ANSWER_PATTERN
from opd_lightning.types import Prompt
from opd_lightning.verifiers import ExactMatch


class Noisy(ExactMatch):
    """Verifier of the lab's sums that turns over the score of some responses.

    Which ones follows from prompt and response, so that it does not depend on their order.

    Args:
        rate: Probability of a wrong score, in [0, 1].
    """

    def __init__(self, rate: float) -> None:
        super().__init__(ANSWER_PATTERN)
        self.rate = rate

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the scores, of which about `rate` are wrong."""
        scores = super().verify(prompts, responses)
        pairs = zip(prompts, responses, strict=True)
        errs = [random.Random(f"{p.id}\0{text}").random() < self.rate for p, text in pairs]
        return [1 - score if err else score for score, err in zip(scores, errs, strict=True)]
