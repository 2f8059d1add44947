"""Sizes of an optimiser step in one process, on which memory and time depend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from opd_lightning.run.datamodule import RolloutDataModule


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """Sizes of a step for the process that has most.

    Args:
        rows: Rollouts.
        prompt: Tokens of the longest prompt, under the student's view.
        response: Most tokens of a response, whoever writes it.
        views: Prompts under which a rollout is read.
        parts: Micro-batches of a step, where their number is fixed.
        max_tokens: Most positions of a micro-batch; None where their number is fixed.
    """

    rows: int
    prompt: int
    response: int
    views: int
    parts: int
    max_tokens: int | None

    @classmethod
    def of(
        cls, data: RolloutDataModule, world: int, prompt: int, recorded: int | None = None
    ) -> Self:
        """Return the sizes of a run's step.

        Args:
            data: The run's data.
            world: Processes.
            prompt: Tokens of the longest prompt.
            recorded: Tokens of the longest recorded response; None assumes the training sampling's
                `max_new_tokens`.
        """
        mix, prompts = data.mix, data.prompts_per_step // world
        own = data.sampling.max_new_tokens
        longest = [own] if mix.samples else []
        if mix.reads_records:
            longest.append(own if recorded is None else recorded)
        samples = data.samples_per_prompt if mix.samples else 1
        rows = prompts * (samples + mix.add_recorded)
        if data.teacher is not None and mix.teacher:
            longest.append(data.teacher.sampling_of(data.sampling).max_new_tokens)
            # One process may have all prompts that the demonstrator answers.
            answered = min(prompts, mix.counts(data.prompts_per_step)[0])
            rows += answered * max(0, data.teacher.samples - samples)
        read = data.module.views() | ({mix.guided_view} if mix.guided else set())
        return cls(
            rows=rows,
            prompt=prompt,
            response=max(longest),
            views=1 + len(read),
            parts=data.module.trainer.accumulate_grad_batches,
            max_tokens=data.max_tokens_per_micro_batch,
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest possible sequence."""
        return self.prompt + self.response

    @property
    def rows_per_batch(self) -> int:
        """Rollouts of the largest micro-batch, if all responses have the greatest length."""
        if self.max_tokens is None:
            return -(-self.rows // self.parts)
        return min(self.rows, -(-self.max_tokens // (self.views * self.longest)))

    def micro_batches(self, length: float) -> int:
        """Return the micro-batches of a step of sequences of `length` tokens each."""
        if self.max_tokens is None:
            return self.parts
        return min(self.rows, -(-int(self.rows * self.views * length) // self.max_tokens))
