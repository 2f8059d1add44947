"""From prompts to verified rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opd_lightning.data.views import recorded_response_ids
from opd_lightning.rollouts.base import Engine, Request, Sampling
from opd_lightning.timing import StepTimer
from opd_lightning.types import Completion, Prompt, Rollout, StopReason
from opd_lightning.verifiers.base import Verifier


class RolloutWriter:
    """Writes responses, decodes and scores them.

    Args:
        engine: Samples responses; None takes the prompts' recorded ones.
        push_weights: Brings the engine up to date; called before it writes.
        verifier: Scores responses; None leaves rewards NaN.
        tokenizer: The student's, to decode responses for verifiers and logs.
        timer: Charged for "generate" and "verify".
    """

    def __init__(
        self,
        engine: Engine | None,
        push_weights: Callable[[], None],
        verifier: Verifier | None,
        tokenizer: Any,
        timer: StepTimer,
    ) -> None:
        self.engine = engine
        self.push_weights = push_weights
        self.verifier = verifier
        self.tokenizer = tokenizer
        self.timer = timer

    def write(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[list[int]],
        samples: int,
        sampling: Sampling,
        seed_of: Callable[[int, int], int],
    ) -> list[Rollout]:
        """`samples` rollouts per prompt, those of a prompt next to each other.

        Args:
            prompts: P prompts.
            prompt_ids: Their rendered ids.
            samples: Responses per prompt; one if they are recorded.
            sampling: How to draw them.
            seed_of: (index into prompts, sample index) -> the request's seed.
        """
        rows = [(p, s) for p in range(len(prompts)) for s in range(samples)]
        if self.engine is None:
            completions = [self._recorded(prompts[p]) for p, _ in rows]
        else:
            self.push_weights()
            with self.timer.stage("generate"):
                requests = [Request(prompt_ids[p], seed_of(p, s)) for p, s in rows]
                completions = self.engine.generate(requests, sampling)
        with self.timer.stage("verify"):
            texts = self.tokenizer.batch_decode(
                [c.response_ids for c in completions], skip_special_tokens=True
            )
            rewards = np.full(len(rows), np.nan)
            if self.verifier is not None:
                rewards[:] = self.verifier.verify([prompts[p] for p, _ in rows], texts)
            groups = rewards.reshape(len(prompts), samples)
            mean, std = groups.mean(axis=1), groups.std(axis=1)
            if samples == 1:  # nothing to compare with
                mean[:] = std[:] = np.nan
        return [
            Rollout(
                prompt=prompts[p],
                prompt_ids=prompt_ids[p],
                response_ids=completion.response_ids,
                behaviour_logprobs=completion.logprobs,
                stop_reason=completion.stop_reason,
                text=text,
                reward=float(reward),
                group_mean=float(mean[p]),
                group_std=float(std[p]),
                recorded=self.engine is None,
                policy_version=self.engine.version if self.engine else 0,
            )
            for (p, _), completion, text, reward in zip(
                rows, completions, texts, rewards, strict=True
            )
        ]

    def _recorded(self, prompt: Prompt) -> Completion:
        ids = recorded_response_ids(prompt, self.tokenizer)
        return Completion(ids, [float("nan")] * len(ids), StopReason.EOS)
