"""The streams that feed training and evaluation: sized, resumable, always current weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from opd_lightning.data.collate import collate, count
from opd_lightning.data.micro_batches import split_balanced
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.order import PromptOrder
from opd_lightning.data.ranks import Ranks
from opd_lightning.data.writer import RolloutWriter, Row
from opd_lightning.errors import UserError
from opd_lightning.rollouts.base import Sampling
from opd_lightning.seeding import EVALUATION_SAMPLE, TRAINING_SAMPLE, derive_seed
from opd_lightning.timing import StepTimer
from opd_lightning.types import Author, Prompt, Rollout, RolloutBatch, StepTotals, Totals


class TrainingStream:
    """Micro-batches of fresh rollouts, `micro_batches` per optimiser step.

    Everything a step needs is generated at once, when its first micro-batch is asked for. The
    stream has a length, so Lightning does not fetch ahead, and that moment comes after the
    previous optimiser step: rollouts are strictly on-policy.

    A step's prompts and seeds depend on (seed, step) alone. The state is the next step's number;
    a checkpoint taken between two steps resumes without a prompt lost or repeated.

    `mix_at(step)` says who writes; `prepare` sees all micro-batches before the first goes out.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[list[int]],
        *,
        writer: RolloutWriter,
        samplings: Mapping[Author, Sampling],
        mix_at: Callable[[int], RolloutMix],
        prepare: Callable[[list[RolloutBatch]], None],
        prompts_per_step: int,
        samples_per_prompt: int,
        micro_batches: int,
        seed: int,
        ranks: Ranks,
        pad_id: int,
        timer: StepTimer,
    ) -> None:
        self.prompts = prompts
        self.prompt_ids = prompt_ids
        self.writer = writer
        self.samplings = samplings
        self.mix_at = mix_at
        self.prepare = prepare
        self.prompts_per_step = prompts_per_step
        self.samples_per_prompt = samples_per_prompt
        self.micro_batches = micro_batches
        self.seed = seed
        self.ranks = ranks
        self.pad_id = pad_id
        self.timer = timer
        self.order = PromptOrder(len(prompts), seed)
        self.steps_per_epoch = max(1, len(prompts) // prompts_per_step)
        self.next_step = 0
        self.handed_out = 0  # micro-batches of next_step that are in the optimiser's gradient

    def __len__(self) -> int:
        """Micro-batches in an epoch (about one pass over the prompts)."""
        return self.steps_per_epoch * self.micro_batches

    def state_dict(self) -> dict[str, int]:
        return {"next_step": self.next_step, "handed_out": self.handed_out, **self._layout()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up the cursor; refuse one that would not mean the same here."""
        for name, here in self._layout().items():
            if state[name] != here:
                raise UserError(
                    f"resume: {name} was {state[name]} in the checkpoint and is {here} now, so "
                    "steps would hold other prompts; set it back, or start a new run from an "
                    "exported student"
                )
        if state["handed_out"]:
            raise UserError(
                f"resume: the checkpoint was taken after {state['handed_out']} of "
                f"{self.micro_batches} micro-batches of a step, whose gradient it does not hold; "
                "take another checkpoint, and save by every_n_train_steps"
            )
        self.next_step = state["next_step"]

    def _layout(self) -> dict[str, int]:
        """What a step's number stands for."""
        return {
            "accumulate_grad_batches": self.micro_batches,
            "prompts_per_step": self.prompts_per_step,
            "samples_per_prompt": self.samples_per_prompt,
            "prompts": len(self.prompts),
            "seed": self.seed,
        }

    def __iter__(self) -> Iterator[RolloutBatch]:
        """The rest of the current epoch."""
        for step in range(self.next_step, self._end_of_epoch()):
            self.timer.next_step()
            rollouts = self._rollouts(step)
            with self.timer.stage("collate"):
                written, demonstrated = (
                    Totals(*(self.ranks.sum(n) for n in count(rollouts, demonstrated=kind)))
                    for kind in (False, True)
                )
                totals = StepTotals(step=step, written=written, demonstrated=demonstrated)
                batches = [
                    collate(
                        part,
                        totals=totals,
                        temperature=self.samplings[Author.STUDENT].temperature,
                        pad_id=self.pad_id,
                    )
                    for part in split_balanced(rollouts, self.micro_batches)
                ]
            self.prepare(batches)
            # The cursor moves before a batch goes out: a checkpoint taken after the last one's
            # optimiser step must already point at the next step.
            for self.handed_out, batch in enumerate(batches[:-1], start=1):
                yield batch
            self.next_step, self.handed_out = step + 1, 0
            yield batches[-1]

    def _end_of_epoch(self) -> int:
        return (self.next_step // self.steps_per_epoch + 1) * self.steps_per_epoch

    def _rollouts(self, step: int) -> list[Rollout]:
        """This rank's rollouts: a slice of the step's prompts, all samples of each."""
        share = self.prompts_per_step // self.ranks.world_size
        first = self.ranks.rank * share
        mix = self.mix_at(step)
        authors = mix.authors(self.seed, step, self.prompts_per_step, self.samples_per_prompt)
        if _samples(authors) and not _samples(authors[first : first + share]):
            self.writer.prepare(Author.STUDENT)  # it takes all ranks to gather sharded weights
        start = step * self.prompts_per_step + first
        rows = [
            Row(
                self.prompts[chosen],
                self.prompt_ids[chosen],
                position,
                author,
                derive_seed(TRAINING_SAMPLE, self.seed, step, position, sample),
            )
            for position, chosen in enumerate(self.order.take(start, share), start)
            for sample, author in enumerate(authors[position - start + first])
        ]
        return self.writer.write(rows, self.samplings)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationBatch:
    """Scored rollouts of an evaluation suite."""

    suite: str
    rollouts: tuple[Rollout, ...]

    def to(self, *_: object, **__: object) -> EvaluationBatch:
        """Nothing here lives on a device."""
        return self


class EvaluationStream:
    """Scored rollouts of a suite's prompts, a batch at a time, from the newest weights."""

    def __init__(
        self,
        suite: str,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[list[int]],
        *,
        writer: RolloutWriter,
        sampling: Sampling,
        samples: int,
        batch_size: int,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self.suite = suite
        self.prompts = prompts
        self.prompt_ids = prompt_ids
        self.writer = writer
        self.sampling = sampling
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.mine = range(ranks.rank, len(prompts), ranks.world_size)
        self.batches = -(-len(prompts) // (ranks.world_size * batch_size))

    def __len__(self) -> int:
        """Batches, as many on every rank; the last may be empty here."""
        return self.batches

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for first in range(0, self.batches * self.batch_size, self.batch_size):
            chosen = self.mine[first : first + self.batch_size]
            rows = [
                Row(
                    self.prompts[i],
                    self.prompt_ids[i],
                    i,
                    Author.STUDENT,
                    # Not the training step: two evaluations of the same weights agree, and
                    # differences between steps are paired.
                    derive_seed(EVALUATION_SAMPLE, self.seed, i, sample),
                )
                for i in chosen
                for sample in range(self.samples)
            ]
            if rows:
                rollouts = self.writer.write(rows, {Author.STUDENT: self.sampling})
            else:
                self.writer.prepare(Author.STUDENT)  # as the other ranks do
                rollouts = []
            yield EvaluationBatch(suite=self.suite, rollouts=tuple(rollouts))


def _samples(authors: Sequence[Sequence[Author]]) -> bool:
    """Whether the student writes any of these responses."""
    return any(not author.is_demonstrator() for row in authors for author in row)
