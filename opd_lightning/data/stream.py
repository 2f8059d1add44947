"""The training stream: sized, resumable, on rollouts of a verified policy version."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from opd_lightning.checkpoints import restoring
from opd_lightning.data.best_of import keep_best, tied_best
from opd_lightning.data.collate import collate, count
from opd_lightning.data.engines import Engines
from opd_lightning.data.micro_batches import micro_batches_within, split_by_cost
from opd_lightning.data.mix import RolloutMix
from opd_lightning.data.order import TAKEN, PromptOrder
from opd_lightning.data.prefetch import from_plain, to_plain
from opd_lightning.data.writer import RolloutWriter, Row
from opd_lightning.errors import StaleRolloutsError, UserError
from opd_lightning.processes import Ranks
from opd_lightning.rollouts.base import Sampling
from opd_lightning.seeding import TRAINING_SAMPLE, derive_seed
from opd_lightning.timing import StepTimer
from opd_lightning.types import Author, Prompt, Rollout, RolloutBatch, StepTotals, Totals, WholeStep


@dataclass(eq=False, repr=False)
class TrainingStream:
    """Micro-batches of rollouts, `micro_batches` per optimiser step.

    The cost of a micro-batch is its number of positions, packed or padded as the student reads it
    (`packed()`). With `max_tokens`, a step is split into the fewest micro-batches of at most
    `max_tokens` positions, and yielded as one item. The number varies by step and is the same on
    all ranks.

    All rollouts of a step are generated at once. The stream has a length, so Lightning does not
    prefetch, and a step is requested after the previous optimiser step: rollouts are strictly
    on-policy. With `max_staleness` 1 the rollouts of the next step are generated while the current
    step trains, with the weights at its start.

    A step's prompts and seeds depend on (seed, step) alone, and the step is the optimiser's: the
    stream stores no position. A checkpoint taken anywhere in a step resumes at its beginning.
    It contains what cannot be generated again: rollouts by weights that no longer exist.
    """

    prompts: Sequence[Prompt]
    prompt_ids: Sequence[list[int]]
    _: KW_ONLY
    order: PromptOrder
    writer: RolloutWriter
    samplings: Mapping[Author, Sampling]
    before_step: Callable[[int], None]  # called before anything is generated for a step
    mix_at: Callable[[int], RolloutMix]  # a step's mix of authors
    prepare: Callable[[list[RolloutBatch]], None]  # gets all of a step before the first is yielded
    likelihoods: Callable[[list[RolloutBatch]], list[float]]  # the student's mean log-probs, nats
    now: Callable[[], int]  # number of optimiser steps made
    limit: Callable[[], float]  # most items of an epoch
    engines: Engines
    max_staleness: int
    prompts_per_step: int
    samples_per_prompt: int
    teacher_samples: int  # the teacher's responses to a prompt
    keep_best: bool  # whether one of them is kept
    micro_batches: int
    max_tokens: int | None
    packed: Callable[[], bool]
    seed: int
    ranks: Ranks
    pad_id: int
    timer: StepTimer
    # A step and its rollouts.
    _in_training: tuple[int, list[Rollout]] = field(default=(-1, []), init=False)

    def __len__(self) -> int:
        """Return the number of items in an epoch (about one pass over the prompts)."""
        return max(1, len(self.prompts) // self.prompts_per_step) * self.micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Return the layout of a step, and the rollouts of the next step on all ranks.

        Rollouts are included only if older weights wrote them. They are missing if the prefetch
        failed.
        """
        step = self.now()
        state: dict[str, Any] = {"step": step, **self._layout(step)}
        if self.max_staleness:
            begun, rollouts = self._in_training
            mine = rollouts if begun == step else self.engines.prefetch.peek(step, self.timer)
            every = self.ranks.gather(mine if mine is None else to_plain(mine))
            if None not in every:
                state["rollouts"] = [row for rows in every for row in rows]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise UserError if the layout of a step differs; restore prefetched rollouts."""
        with restoring("the place in the data"):
            here = self._layout(state.get("step", 0))
            for name in [*here, *(name for name in state if name.startswith(TAKEN))]:
                if state.get(name) != here.get(name):
                    raise UserError(
                        f"resume: {name} was {state.get(name)} in the checkpoint and is "
                        f"{here.get(name)} now, so steps would hold other rollouts; set it back, "
                        "or start a new run from an exported student"
                    )
            if "rollouts" in state:
                mine = set(self._positions(state["step"]))
                rows = [row for row in state["rollouts"] if row["group"] in mine]
                self.engines.prefetch.restore(state["step"], from_plain(rows, self._prompt_at))

    def _layout(self, step: int) -> dict[str, int]:
        """Return the values that define the content of the steps before `step`."""
        return {
            "accumulate_grad_batches": self.micro_batches,
            "prompts_per_step": self.prompts_per_step,
            "samples_per_prompt": self.samples_per_prompt,
            **({"teacher_samples": self.teacher_samples} if self.teacher_samples > 1 else {}),
            "prompts": len(self.prompts),
            "seed": self.seed,
            "max_staleness": self.max_staleness,
            **self.order.record(step),
        }

    def __iter__(self) -> Iterator[RolloutBatch | WholeStep]:
        """Yield the rest of the current epoch."""
        first = self.now()
        epoch = int(min(len(self), self.limit()) // self.micro_batches)
        for step in range(first, (first // epoch + 1) * epoch):
            self.before_step(step)
            self.timer.next_step()
            rollouts = self.engines.prefetch.take(step, self.timer)
            if rollouts is None:
                rows = self._ready_rows(step)
                rollouts = self.writer.write(rows, self.samplings)
            check_versions(rollouts, step, self.max_staleness)
            self._in_training = step, rollouts  # all of them: a resumed step chooses again
            if self.max_staleness:
                self._prefetch(step + 1)
            else:
                self.engines.sleep()
            if self.keep_best:
                rollouts = self._with_best(step, rollouts)
            with self.timer.stage("collate"):
                batches = self._collate(step, rollouts)
            self.prepare(batches)
            if self.max_tokens is None:
                yield from batches
            else:
                yield WholeStep(batches)

    def _prefetch(self, step: int) -> None:
        """Push to the engines, and hand them to the prefetch thread."""
        rows = self._ready_rows(step)
        background = self.writer.with_timer(StepTimer())
        self.engines.prefetch.start(step, lambda: background.write(rows, self.samplings))

    def _with_best(self, step: int, rollouts: list[Rollout]) -> list[Rollout]:
        """Drop all but the best of the teacher's responses to each prompt."""
        ties = [place for tied in tied_best(rollouts).values() if len(tied) > 1 for place in tied]
        likelihood: dict[int, float] = {}
        if any(self.ranks.gather(len(ties))):  # the student may be sharded: all ranks take part
            # Without the teachers' views, and with what `only_correct` drops.
            asked = [replace(rollouts[place], views={}, dropped=False) for place in ties]
            place_of = {id(one): place for one, place in zip(asked, ties, strict=True)}
            batches = self._collate(step, asked or [replace(rollouts[-1], dropped=True)])
            with self.timer.stage("student"):
                scores = self.likelihoods(batches)
            read = [rollout for batch in batches for rollout in batch.rollouts]
            for rollout, score in zip(read, scores, strict=True):
                if (place := place_of.get(id(rollout))) is not None:
                    likelihood[place] = score
        return keep_best(rollouts, likelihood)

    def _collate(self, step: int, rollouts: list[Rollout]) -> list[RolloutBatch]:
        written, demonstrated = (
            Totals(*(self.ranks.sum(n) for n in count(rollouts, demonstrated=kind)))
            for kind in (False, True)
        )
        totals = StepTotals(step=step, written=written, demonstrated=demonstrated)

        def collated(part: Sequence[Rollout]) -> RolloutBatch:
            sampling = self.samplings[Author.STUDENT]
            return collate(
                part,
                totals=totals,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                pad_id=self.pad_id,
            )

        parts = self.micro_batches
        if self.max_tokens is not None:
            needed = micro_batches_within(rollouts, self.max_tokens, packed=self.packed())
            parts = max(self.ranks.gather(needed))
        split = split_by_cost(rollouts, min(parts, len(rollouts)), packed=self.packed())
        batches = [collated(part) for part in split]
        if missing := parts - len(batches):
            # All ranks take part in the collectives of every micro-batch.
            nothing = replace(split[-1][-1], dropped=True)
            batches += [replace(collated([nothing]), is_filler=True)] * missing
        return batches

    def _positions(self, step: int) -> range:
        """Return this rank's slice of the step's prompts, by position in the prompt order."""
        share = self.prompts_per_step // self.ranks.world_size
        first = step * self.prompts_per_step + self.ranks.rank * share
        return range(first, first + share)

    def _prompt_at(self, position: int) -> tuple[Prompt, list[int]]:
        (chosen,) = self.order.take(position, 1)
        return self.prompts[chosen], self.prompt_ids[chosen]

    def authors(self, mix: RolloutMix, step: int) -> list[list[Author]]:
        """Return the authors of the responses to every prompt of a step, over all ranks."""
        return mix.authors(
            self.seed,
            step,
            self.prompts_per_step,
            self.samples_per_prompt,
            self.teacher_samples,
        )

    def _ready_rows(self, step: int) -> list[Row]:
        """Return this rank's rows of a step, all samples of its prompts, with engines prepared."""
        mix = self.mix_at(step)
        authors = self.authors(mix, step)
        rows = [
            Row(
                *self._prompt_at(position),
                position,
                author,
                derive_seed(TRAINING_SAMPLE, self.seed, step, position, sample),
            )
            for position in self._positions(step)
            for sample, author in enumerate(authors[position - step * self.prompts_per_step])
        ]
        # Authors of all ranks: gathering sharded weights is a collective, and so is the start of
        # an engine that communicates with those of other ranks.
        self.engines.prepare(author for names in authors for author in names)
        return rows


def check_versions(rollouts: Sequence[Rollout], step: int, max_staleness: int) -> None:
    """Raise StaleRolloutsError if the student's rollouts are too old, or too new, for `step`."""
    for rollout in rollouts:
        version = rollout.policy_version
        if not rollout.author.is_demonstrator() and not step - max_staleness <= version <= step:
            raise StaleRolloutsError(step, version, max_staleness)
