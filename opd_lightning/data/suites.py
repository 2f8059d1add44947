"""What `opd validate`, `opd test` and validation during `opd fit` measure."""

from __future__ import annotations

from dataclasses import dataclass

from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.rollouts.base import Sampling
from opd_lightning.verifiers.base import Verifier


@dataclass(frozen=True, kw_only=True)
class EvaluationSuite:
    """Prompts to be answered and scored at validation.

    Args:
        prompts: Where the prompts are.
        samples: Responses per prompt.
        batch_size: Prompts per call of the engine.
        sampling: How to draw them; None takes the training sampling.
        verifier: Scores them; None takes the DataModule's.
    """

    prompts: PromptSource
    samples: int = 1
    batch_size: int = 256
    sampling: Sampling | None = None
    verifier: Verifier | None = None

    def __post_init__(self) -> None:
        for name, value in (("samples", self.samples), ("batch_size", self.batch_size)):
            if value < 1:
                raise UserError(f"{name} of a suite: got {value}, expected at least 1")
