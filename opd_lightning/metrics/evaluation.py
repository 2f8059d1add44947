"""Scores of an evaluation suite, exact over ranks, with confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from opd_lightning.metrics.bootstrap import interval
from opd_lightning.metrics.pass_at_k import pass_at_k
from opd_lightning.types import Rollout


class SuiteScores(Metric):
    """avg@n, pass@k and majority vote over a suite's prompts, all with `samples` responses.

    A response is correct, for pass@k, if its score is 1. What is kept has a place for every prompt
    (a rollout's `group`) and zeros where another rank has it: sums over ranks put it together, and
    results do not depend on how many ranks there are.

    Args:
        domains: Domain of each prompt, in the suite's order.
        samples: Responses per prompt.
        pass_at: The k of pass@k, from 1 to `samples`.
    """

    judged_by: ClassVar = "score"  # of what `compute` finds: more is better
    full_state_update = False
    score: Tensor  # [P, samples] float64, as are the others
    length: Tensor
    truncated: Tensor
    vote: Tensor  # [P], and the next
    votes: Tensor

    def __init__(
        self, domains: Sequence[str], samples: int = 1, pass_at: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.domains = list(domains)
        self.pass_at = list(pass_at)
        by_sample, by_prompt = (len(domains), samples), (len(domains),)
        for name, shape in [
            *((name, by_sample) for name in ("score", "length", "truncated")),
            *((name, by_prompt) for name in ("vote", "votes")),
        ]:
            zeros = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(
        self, rollouts: Sequence[Rollout], answers: Sequence[str | None] | None = None
    ) -> None:
        """All samples of each prompt together; `answers` are what they came to, if known."""
        groups: dict[int, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault(rollout.group, []).append(i)
        for prompt, rows in groups.items():
            for sample, i in enumerate(rows):
                self.score[prompt, sample] = rollouts[i].reward
                self.length[prompt, sample] = len(rollouts[i].response_ids)
                self.truncated[prompt, sample] = rollouts[i].stop_reason.is_truncated()
            if answers is not None:
                voters = [(answers[i], rollouts[i].reward) for i in rows]
                self.vote[prompt] = majority_score(voters)
                self.votes[prompt] = 1

    def compute(self) -> dict[str, Tensor]:
        """Means over prompts of what is known, by name.

        `score` is avg@n, with its 95 % interval from `score_low` to `score_high`; `score/<domain>`
        comes if there are several; pass@k is `pass_at_<k>`, the vote `majority`.
        """
        result = self._figures(range(len(self.domains)))
        if "score" in result:
            average = self.score.mean(dim=1)
            for domain, rows in self._rows_by_domain().items():
                result[f"score/{domain}"] = average[rows].mean()
        return result

    def compute_by_domain(self) -> dict[str, dict[str, Tensor]]:
        """The figures of `compute` for each domain alone; empty if there is but one.

        All ranks must call it.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return {domain: self._figures(rows) for domain, rows in self._rows_by_domain().items()}

    def _rows_by_domain(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {domain: [] for domain in sorted(set(self.domains))}
        for i, domain in enumerate(self.domains):
            rows[domain].append(i)
        return rows if len(rows) > 1 else {}

    def _figures(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        rows = list(prompts)
        score, votes = self.score[rows], self.votes[rows]
        result = {"length": self.length[rows].mean(), "truncated": self.truncated[rows].mean()}
        if score.isnan().any():  # no verifier
            return result
        average = score.mean(dim=1)
        result["score"] = average.mean()
        result["score_low"], result["score_high"] = interval(average)
        for k in self.pass_at:
            result[f"pass_at_{k}"] = pass_at_k(score >= 1, k).mean()
        if votes.any():
            result["majority"] = self.vote[rows][votes > 0].mean()
        return result


def majority_score(voters: Sequence[tuple[str | None, float]]) -> float:
    """Expected score of the commonest answer among (answer, score) pairs, ties broken by lot.

    Responses without an answer do not vote; 0 if nobody does. Equal answers that were scored
    differently count with their mean.
    """
    counts = Counter(answer for answer, _ in voters if answer is not None)
    if not counts:
        return 0.0
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    scores = [[score for other, score in voters if other == answer] for answer in winners]
    return sum(sum(one) / len(one) for one in scores) / len(winners)
