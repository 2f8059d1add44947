"""Writing of responses to prompts: generation, decoding and verification."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from opd_lightning.data.views import Renderer, ResponseFacts
from opd_lightning.rollouts.base import Engine, Request, Sampling
from opd_lightning.rollouts.checks import checked_completions
from opd_lightning.rollouts.time_limit import TimeLimit
from opd_lightning.timing import StepTimer
from opd_lightning.types import Author, Completion, Prompt, Rollout, StopReason
from opd_lightning.verifiers.base import Verifier, checked_rewards, checked_score

log = logging.getLogger(__name__)

# A response with at least this reward is shown to the others of its group as a `peer`, one with
# less as a `peer_failure`.
PEER_REWARD = 0.5


class Row(NamedTuple):
    """One response to be written."""

    prompt: Prompt
    prompt_ids: list[int]  # under the student's view
    group: int  # the same for all rows of a prompt
    author: Author
    seed: int


@dataclass(eq=False, repr=False)
class RolloutWriter:
    """Writer of responses, which it also decodes and scores.

    Args:
        engines: Engines by author, after `Engines.prepare`; none for recorded responses.
        verifier: Scores responses; None leaves rewards NaN.
        renderer: The student's tokenizer and the views that the method reads.
        timer: Receives the seconds of "generate" and "verify".
        guided_view: View under which guided responses are written.
        only_correct: Drop demonstrations by the teacher that the verifier does not score 1.
        limit: Time limit on one call of an engine.
    """

    engines: Mapping[Author, Engine]
    verifier: Verifier | None
    renderer: Renderer
    timer: StepTimer
    guided_view: str = "privileged"
    only_correct: bool = False
    limit: TimeLimit = field(default_factory=TimeLimit)
    _warned: set[str] = field(default_factory=set, init=False)  # names of views that were too long

    def with_timer(self, timer: StepTimer) -> RolloutWriter:
        """Return a copy of the writer with another timer."""
        other = copy(self)
        other.timer = timer
        return other

    def write(self, rows: Sequence[Row], samplings: Mapping[Author, Sampling]) -> list[Rollout]:
        """Write one rollout per row, in order. One call must contain all rows of a group."""
        completions = self._complete(rows, samplings)
        with self.timer.stage("verify"):
            texts = self.renderer.tokenizer.batch_decode(
                [c.response_ids for c in completions], skip_special_tokens=True
            )
            prompts = [row.prompt for row in rows]
            rewards, parts, feedback = self._score(prompts, texts)
            groups = _groups(rows, rewards)
            views = [
                self._views(
                    row.prompt,
                    self._late(i, rows, groups, rewards, texts)._replace(feedback=feedback[i]),
                    completions[i].response_ids,
                )
                for i, row in enumerate(rows)
            ]
            return [
                Rollout(
                    prompt=row.prompt,
                    prompt_ids=row.prompt_ids,
                    views=views[i].ids,
                    group=row.group,
                    response_ids=completions[i].response_ids,
                    behaviour_logprobs=completions[i].logprobs,
                    stop_reason=completions[i].stop_reason,
                    text=texts[i],
                    reward=float(rewards[i]),
                    group_mean=groups[row.group].mean,
                    group_std=groups[row.group].std,
                    author=row.author,
                    dropped=self._drops(row.author, rewards[i]),
                    policy_version=self._version(row.author),
                    unverified=self.verifier is not None and math.isnan(rewards[i]),
                    long_views=views[i].too_long,
                    reward_parts={name: values[i] for name, values in parts.items()},
                )
                for i, row in enumerate(rows)
            ]

    def _score(
        self, prompts: Sequence[Prompt], texts: Sequence[str]
    ) -> tuple[Sequence[float], Mapping[str, list[float]], Sequence[str | None]]:
        """Return rewards, their parts by name, and feedback; without a verifier NaN and None."""
        feedback: Sequence[str | None] = [None] * len(texts)
        if self.verifier is None:
            return [math.nan] * len(texts), {}, feedback
        scores = checked_score(self.verifier, self.verifier.score(prompts, texts), len(texts))
        rewards = checked_rewards(self.verifier, prompts, scores.totals)
        if self.renderer.reads_feedback:
            feedback = self.verifier.feedback(prompts, texts)
        return rewards, scores.parts, feedback

    def _complete(
        self, rows: Sequence[Row], samplings: Mapping[Author, Sampling]
    ) -> list[Completion]:
        """Generate with one call per engine, guided and plain rows together."""
        found: dict[int, Completion] = {}
        writers: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            if row.author is Author.RECORDED:
                found[i] = self._recorded(row.prompt)
            else:
                writers.setdefault(id(self.engines[row.author]), []).append(i)
        for chosen in writers.values():
            author = rows[chosen[0]].author
            engine = self.engines[author]
            call = f"{type(engine).__name__}.generate of {len(chosen)} responses"
            with self.timer.stage("generate"), self.limit.of(call):
                requests = [Request(self._sampler_ids(rows[i]), rows[i].seed) for i in chosen]
                sampling = samplings[author]
                completions = engine.generate(requests, sampling)
                completions = checked_completions(engine, requests, sampling, completions)
                found.update(zip(chosen, completions, strict=True))
        return [found[i] for i in range(len(rows))]

    def _sampler_ids(self, row: Row) -> list[int]:
        """Return the ids that the sampler reads; the loss always reads `row.prompt_ids`."""
        if row.author is not Author.GUIDED:
            return row.prompt_ids
        ids = self.renderer.view(self.guided_view, row.prompt)
        assert ids is not None, "the guided view depends on the prompt alone: checked at set-up"
        return ids

    def _recorded(self, prompt: Prompt) -> Completion:
        ids = self.renderer.recorded(prompt)
        ended = ids[-1] in self.renderer.eos_ids
        stop_reason = StopReason.EOS if ended else StopReason.LENGTH
        return Completion(ids, [float("nan")] * len(ids), stop_reason)

    def _views(self, prompt: Prompt, late: ResponseFacts, response_ids: Sequence[int]) -> _Views:
        """Render the views of a response, without those that exceed the models' context."""
        ids = {name: self.renderer.view(name, prompt, late) for name in self.renderer.views}
        too_long = tuple(
            name
            for name, seen in ids.items()
            if seen is not None and self.renderer.is_too_long(name, seen, response_ids)
        )
        if new := set(too_long) - self._warned:
            self._warned |= new
            name = min(new)
            log.warning(
                "%s: view %r of %d tokens + a response of %d exceed the context of %d, so this "
                "response has no such view; further ones are counted as response/views_too_long",
                prompt.origin or prompt.id,
                name,
                len(ids[name] or ()),
                len(response_ids),
                self.renderer.context_length,
            )
        return _Views(ids | dict.fromkeys(too_long), too_long)

    def _late(
        self,
        mine: int,
        rows: Sequence[Row],
        groups: Mapping[int, _Group],
        rewards: Sequence[float],
        texts: Sequence[str],
    ) -> ResponseFacts:
        """Return the facts about a response, without the verifier's feedback."""
        others = [i for i in groups[rows[mine].group].members if i != mine]
        return ResponseFacts(
            attempt=texts[mine],
            reward=None if math.isnan(rewards[mine]) else rewards[mine],
            peer=next((texts[i] for i in others if rewards[i] >= PEER_REWARD), None),
            peer_failure=next((texts[i] for i in others if rewards[i] < PEER_REWARD), None),
        )

    def _drops(self, author: Author, reward: float) -> bool:
        return self.only_correct and author is Author.TEACHER and not reward >= 1

    def _version(self, author: Author) -> int:
        return self.engines[author].version if author in self.engines else 0


class _Views(NamedTuple):
    ids: Mapping[str, list[int] | None]  # by name; None: the response has no such view
    too_long: tuple[str, ...]  # names of views left out because of their length


class _Group(NamedTuple):
    members: list[int]  # indices of the student's responses
    mean: float
    std: float


def _groups(rows: Sequence[Row], rewards: Sequence[float]) -> dict[int, _Group]:
    """Compute statistics of the student's known rewards per prompt; NaN for fewer than two."""
    members: dict[int, list[int]] = {row.group: [] for row in rows}
    for i, row in enumerate(rows):
        if not row.author.is_demonstrator():
            members[row.group].append(i)
    groups = {}
    for group, indices in members.items():
        own = np.array([rewards[i] for i in indices if not math.isnan(rewards[i])])
        comparable = len(own) > 1
        mean, std = (own.mean(), own.std()) if comparable else (np.nan, np.nan)
        groups[group] = _Group(indices, float(mean), float(std))
    return groups
