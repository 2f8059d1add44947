"""Metrics of the three kinds of suite, exact over ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opd_lightning.evaluation.base import Scores
from opd_lightning.evaluation.statistics import interval, pass_at_k
from opd_lightning.metrics.sums import Sums
from opd_lightning.types import Rollout, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.evaluation.harness.loaded_task import LoadedTask


class SuiteScores(Scores):
    """avg@n, pass@k and majority vote over a suite's prompts, all with `samples` responses.

    For pass@k, a response is correct if its score is 1. A response that the verifier could not
    check counts as 0, and in `unverified`. States have an entry for every prompt (a rollout's
    `group`), which is zero on ranks that do not measure it: a sum over ranks completes them, and
    results do not depend on the number of ranks. Prompts that no rank measures, as with
    `trainer.limit_val_batches`, are left out of all figures.

    Args:
        domains: Domain of each prompt, in the suite's order.
        samples: Responses per prompt.
        pass_at: Values of k for pass@k, from 1 to `samples`.
    """

    score: Tensor  # [P, samples] float64, as are the three below
    length: Tensor
    truncated: Tensor
    unverified: Tensor
    vote: Tensor  # [P] float64, as are the two below
    votes: Tensor
    measured: Tensor

    def __init__(
        self, domains: Sequence[str], samples: int = 1, pass_at: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.domains = list(domains)
        self.pass_at = list(pass_at)
        by_sample, by_prompt = (len(domains), samples), (len(domains),)
        for name, shape in [
            *((name, by_sample) for name in ("score", "length", "truncated", "unverified")),
            *((name, by_prompt) for name in ("vote", "votes", "measured")),
        ]:
            zeros = torch.zeros(shape, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(
        self, rollouts: Sequence[Rollout], answers: Sequence[str | None] | None = None
    ) -> None:
        """Add all samples of each prompt at once; `answers` are extracted answers, if known."""
        groups: dict[int, list[int]] = {}
        for i, rollout in enumerate(rollouts):
            groups.setdefault(rollout.group, []).append(i)
        for prompt, rows in groups.items():
            self.measured[prompt] = 1
            for sample, i in enumerate(rows):
                self.score[prompt, sample] = _score(rollouts[i])
                self.unverified[prompt, sample] = rollouts[i].unverified
                self.length[prompt, sample] = len(rollouts[i].response_ids)
                self.truncated[prompt, sample] = rollouts[i].stop_reason.is_truncated()
            if answers is not None:
                voters = [(answers[i], _score(rollouts[i])) for i in rows]
                self.vote[prompt] = majority_score(voters)
                self.votes[prompt] = 1

    def compute(self) -> dict[str, Tensor]:
        """Compute means over the measured prompts of the known figures, by name.

        `score` is avg@n, with its 95 % interval from `score_low` to `score_high`; `score/<domain>`
        is added if there are several; pass@k is `pass_at_<k>`, the majority vote `majority`.
        `unverified`, the share of responses that could not be checked, is there only if there are;
        `measured`, the number of measured prompts, only if there are others.
        """
        result = self._figures(range(len(self.domains)))
        if "score" in result:
            for domain, figures in self._by_domain().items():
                result[f"score/{domain}"] = figures["score"]
        return result

    def compute_by_domain(self) -> dict[str, dict[str, Tensor]]:
        """Compute the figures of `compute` for each domain; empty if there is only one.

        All ranks must call it.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._by_domain()

    def _by_domain(self) -> dict[str, dict[str, Tensor]]:
        """Return the figures of every domain with a measured prompt, if there are several."""
        rows: dict[str, list[int]] = {domain: [] for domain in sorted(set(self.domains))}
        for i, domain in enumerate(self.domains):
            rows[domain].append(i)
        found = {domain: self._figures(its) for domain, its in rows.items() if len(rows) > 1}
        return {domain: figures for domain, figures in found.items() if figures}

    def _figures(self, prompts: Sequence[int]) -> dict[str, Tensor]:
        measured = self.measured.tolist()
        rows = [i for i in prompts if measured[i]]
        if not rows:
            return {}
        score, votes = self.score[rows], self.votes[rows]
        result = {"length": self.length[rows].mean(), "truncated": self.truncated[rows].mean()}
        if len(rows) < len(prompts):
            result["measured"] = self.measured[rows].sum()
        if score.isnan().any():  # no verifier
            return result
        average = score.mean(dim=1)
        result["score"] = average.mean()
        result["score_low"], result["score_high"] = interval(score)
        if self.unverified[rows].any():
            result["unverified"] = self.unverified[rows].mean()
        for k in self.pass_at:
            result[f"pass_at_{k}"] = pass_at_k(score >= 1, k).mean()
        if votes.any():
            result["majority"] = self.vote[rows][votes > 0].mean()
        return result


def _score(rollout: Rollout) -> float:
    """Return the reward; 0 if the verifier could not check the response, NaN without one."""
    return 0.0 if rollout.unverified else rollout.reward


def majority_score(voters: Sequence[tuple[str | None, float]]) -> float:
    """Return the expected score of the most frequent answer of (answer, score) pairs.

    Ties are broken at random, in expectation. Responses without an answer do not vote; without
    any vote the score is 0. Equal answers with different scores count with their mean.
    """
    counts = Counter(answer for answer, _ in voters if answer is not None)
    if not counts:
        return 0.0
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    scores = [[score for other, score in voters if other == answer] for answer in winners]
    return sum(sum(one) / len(one) for one in scores) / len(winners)


class LikelihoodScores(Sums, Scores):
    """Perplexity and KL(start || student) over the tokens of all texts, weighted equally."""

    names = ("tokens", "logprobs", "divergence")

    def __init__(self, compares: bool) -> None:
        super().__init__()
        self.compares = compares  # with the start

    def update(self, logprobs: Tensor, divergence: Tensor) -> None:
        """Add log-probs `[N]` of a batch's tokens, and KL(start || student) at their positions.

        Both in nats; N may be 0. Without a start the divergence is 0.
        """
        self._add(tokens=len(logprobs), logprobs=logprobs.double(), divergence=divergence.double())

    def compute(self) -> dict[str, Tensor]:
        """Compute `log_likelihood` (mean, nats per token), `perplexity` and, if compared, `kl`."""
        sums = self._totals()
        mean = sums["logprobs"] / sums["tokens"]
        result = {"log_likelihood": mean, "perplexity": torch.exp(-mean)}
        if self.compares:
            result["kl"] = sums["divergence"] / sums["tokens"]
        return result


class TaskScores(Scores):
    """Figures that lm-evaluation-harness computes from the student's answers to a task.

    States have an entry for every request, which is zero on ranks that do not answer it: a sum over
    ranks completes them, and every rank grades all answers. The id of a rollout's prompt is the
    index of its request among the task's likelihood or generation requests.
    """

    read: Tensor  # [likelihood requests, 2] float64: nats; 1 if greedy decoding gives the text
    written: Tensor  # [generation requests, 1 + longest] int32: number of tokens, token ids

    def __init__(self, task: LoadedTask) -> None:
        super().__init__()
        self.task = task
        longest = max((w.sampling.max_new_tokens for w in task.generation_requests), default=0)
        read = torch.zeros(len(task.likelihood_requests), 2, dtype=torch.float64)
        written = torch.zeros(len(task.generation_requests), 1 + longest, dtype=torch.int32)
        self.add_state("read", read, dist_reduce_fx="sum")
        self.add_state("written", written, dist_reduce_fx="sum")

    def update(self, rollouts: Sequence[Rollout], likelihoods: Tensor | None = None) -> None:
        """Add generated answers, or `likelihoods [B, 2]` of texts that were read."""
        for row, rollout in enumerate(rollouts):
            index, ids = int(rollout.prompt.id), rollout.response_ids
            if likelihoods is None:
                line = torch.tensor([len(ids), *ids], dtype=torch.int32)
                self.written[index, : len(line)] = line
            elif not rollout.dropped:
                self.read[index] = likelihoods[row]

    def compute(self) -> dict[str, Tensor]:
        """Grade the answers; see `LoadedTask.grade`."""
        likelihoods = [(nats, greedy > 0) for nats, greedy in self.read.tolist()]
        written = [line[1 : 1 + line[0]] for line in self.written.tolist()]
        graded = self.task.grade(likelihoods, written)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in graded.items()}


def likelihoods_of(texts: RolloutBatch, tokens: TokenScores) -> Tensor:
    """Return `[B, 2]` float64 as in `TaskScores.read`, of texts with known top-1 token ids."""
    mask = texts.response_mask
    greedy = (tokens.top_ids[..., 0] == texts.response_ids) | ~mask
    nats = tokens.logprobs.detach().double().sum(dim=1)
    return torch.stack([nats, greedy.all(dim=1).double()], dim=1)
