"""Scores of responses by reasoning-gym's own scorers, in worker processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from opd_lightning.errors import UserError
from opd_lightning.verifiers.base import Verifier
from opd_lightning.verifiers.workers import Workers, as_score

if TYPE_CHECKING:
    # Not at run time: the workers import this module and need neither torch nor its memory.
    from opd_lightning.types import Prompt


class ReasoningGymVerifier(Verifier):
    """Verifier of the prompts of `ReasoningGymPrompts`: each task's scorer, 0 to 1.

    The answer is what stands in the last `<answer>` tags of a response; without them it scores 0.
    Many scorers give part of 1 to an answer that is nearly right.

    Args:
        max_workers: Number of worker processes.
        timeout_seconds: Time limit for one response. A response that takes longer, or that the
            scorer fails on, scores 0.
        step_seconds: Time limit for all responses of a call. Those that are not checked by then
            have no reward.
    """

    def __init__(
        self, *, max_workers: int = 2, timeout_seconds: float = 5.0, step_seconds: float = 300.0
    ) -> None:
        if find_spec("reasoning_gym") is None:
            raise UserError(
                "ReasoningGymVerifier: reasoning-gym is not installed; pip install "
                "'opd-lightning[reasoning-gym]'"
            )
        self.workers = Workers(
            "ReasoningGymVerifier",
            prepare_worker,
            count=max_workers,
            timeout_seconds=timeout_seconds,
            step_seconds=step_seconds,
        )

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the scorers' values; NaN if not checked."""
        pairs = zip(prompts, responses, strict=True)
        items = [(prompt.answer or "", text) for prompt, text in pairs]
        return [as_score(found) for found in self.workers.map(score, items)]

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError, before training, unless every prompt is of `ReasoningGymPrompts`."""
        for prompt in prompts:
            try:
                known = {"task", "settings", "entry"} <= json.loads(prompt.answer or "").keys()
            except (ValueError, AttributeError, RecursionError):
                known = False
            if not known:
                raise UserError(
                    f"{prompt.origin or prompt.id}: ReasoningGymVerifier needs the entry of a task "
                    "as 'answer'; let ReasoningGymPrompts make the prompts"
                )

    def close(self) -> None:
        """Stop the workers; the next `verify` starts new ones."""
        self.workers.close()


def prepare_worker() -> None:
    """Import the library before the time limit of a worker's first response starts."""
    import reasoning_gym  # noqa: F401


def score(answer: str, response: str) -> float:
    """Return the score of a response to the entry in `answer`; runs in a worker."""
    from reasoning_gym.utils import extract_answer

    given = extract_answer(response)
    if given is None:
        return 0.0
    question = json.loads(answer)
    task = _task(question["task"], json.dumps(question["settings"]))
    return float(task.score_answer(given, question["entry"]))


@lru_cache(maxsize=256)
def _task(name: str, settings: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(settings))
