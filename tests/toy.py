"""Toy problems with exact answers, float64: a tree of sequences, and scored micro-batches.

The tree holds all sequences of LENGTH tokens over VOCABULARY symbols; a policy is one free row of
logits per prefix, so every expectation is an exact sum over all sequences.
"""

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from opd_lightning.losses.divergence import kl
from opd_lightning.losses.surrogate import Surrogate
from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.types import RolloutBatch, TokenScores

VOCABULARY, LENGTH = 5, 2
PREFIXES = [p for n in range(LENGTH) for p in product(range(VOCABULARY), repeat=n)]
ROW = {prefix: row for row, prefix in enumerate(PREFIXES)}
SEQUENCES = list(product(range(VOCABULARY), repeat=LENGTH))
VISITED = torch.tensor([[ROW[y[:t]] for t in range(LENGTH)] for y in SEQUENCES])  # [S, T]
TOKENS = torch.tensor(SEQUENCES)  # [S, T]
ALL = torch.ones(len(SEQUENCES), LENGTH, dtype=torch.bool)

# The tree ------------------------------------------------------------------------------


def random_logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PREFIXES), VOCABULARY, generator=generator, dtype=torch.float64)


def token_logprobs(logits: Tensor) -> Tensor:
    """Return log pi(y_t | y_<t) of every sequence, [S, T]."""
    return logits.log_softmax(-1)[VISITED, TOKENS]


def sequence_probs(logits: Tensor) -> Tensor:
    return token_logprobs(logits).sum(1).exp()


def finite_difference(function: Callable[[Tensor], Tensor], at: Tensor, h: float = 1e-6) -> Tensor:
    """Return the gradient of the sum of `function(at)`, by central differences."""
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        step = torch.zeros_like(at).view(-1)
        step[i] = h
        step = step.view_as(at)
        gradient.view(-1)[i] = (function(at + step) - function(at - step)).sum() / (2 * h)
    return gradient


def expected_gradient(logits: Tensor, losses: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the exact expectation of the gradient of a sequence's summed token losses."""
    student = logits.clone().requires_grad_()
    probs = sequence_probs(logits)
    total = (probs[:, None] * losses(token_logprobs(student))).sum()
    (gradient,) = torch.autograd.grad(total, student)
    return gradient


def local_reverse_kl(at: Tensor, teacher: Tensor, visits: Tensor) -> Tensor:
    """Return the sum over prefixes of (fixed) visit probability x KL(student || teacher)."""
    return (visits * kl(at.log_softmax(-1), teacher.log_softmax(-1))).sum()


def visit_probabilities(logits: Tensor) -> Tensor:
    probs = sequence_probs(logits)
    return torch.stack([probs[VISITED.eq(row).any(dim=1)].sum() for row in range(len(PREFIXES))])


# Scored micro-batches ------------------------------------------------------------------


def score_of(logprobs: Tensor, entropy: Tensor | None = None) -> TokenScores:
    logprobs = logprobs.detach()
    return TokenScores(
        logprobs=logprobs,
        entropy=torch.zeros_like(logprobs) if entropy is None else entropy,
        top_ids=torch.zeros(*logprobs.shape, 0, dtype=torch.int64),
        top_logprobs=torch.zeros(*logprobs.shape, 0),
    )


def group_statistics(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's group mean and population standard deviation; NaN for a group of one."""
    mean, std = torch.full_like(rewards, torch.nan), torch.full_like(rewards, torch.nan)
    for group in groups.unique():
        rows = groups == group
        if rows.sum() > 1:
            mean[rows] = rewards[rows].mean()
            std[rows] = rewards[rows].std(correction=0)
    return mean, std


def make_scored(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,  # [B, R] bool, response tokens; default all
    rewards: list[float] | None = None,  # default none
    groups: list[int] | None = None,  # default one group
    on_policy: list[bool] | None = None,  # default all
    behaviour: Tensor | None = None,  # [B, R]; default the student's
    entropy: Tensor | None = None,  # [B, R], the student's
    ids: Tensor | None = None,  # [B, R] response ids
    truncated: list[bool] | None = None,  # default none
    values: dict[str, Tensor] | None = None,
    step: int = 0,
    **others: Tensor,  # log-probs by name
) -> Scored:
    """Return a scored micro-batch of log-probs `[B, R]` with the inputs of rules."""
    size = len(student)
    own_groups = torch.tensor(groups or [0] * size)
    own_rewards = torch.tensor(rewards or [torch.nan] * size, dtype=student.dtype)
    mean, std = group_statistics(own_rewards, own_groups)
    batch = SimpleNamespace(
        response_ids=torch.zeros(student.shape, dtype=torch.int64) if ids is None else ids,
        response_mask=torch.ones(student.shape, dtype=torch.bool) if mask is None else mask,
        behaviour_logprobs=student.detach() if behaviour is None else behaviour,
        rewards=own_rewards,
        group_mean=mean,
        group_std=std,
        groups=own_groups,
        truncated=torch.tensor(truncated or [False] * size),
        on_policy=torch.tensor(on_policy or [True] * size),
        totals=SimpleNamespace(step=step),
    )
    return Scored(
        batch=cast(RolloutBatch, batch),
        student=score_of(student, entropy),
        others={name: score_of(x) for name, x in {"teacher": teacher, **others}.items()},
        values=values or {},
    )


def opd_signal(scored: Scored, mask: Tensor | None = None) -> Signal:
    """Return the signal of plain OPD: d_t on the response tokens."""
    mask = scored.batch.response_mask if mask is None else mask
    return Signal(
        advantage=torch.where(mask, scored.log_ratio, 0.0),
        weight=torch.ones_like(scored.log_ratio),
        mask=mask,
    )


def applied(rule: Rule, scored: Scored, signal: Signal | None = None) -> tuple[Signal, Rates]:
    """Apply a rule to a step of a single micro-batch."""
    signal = opd_signal(scored) if signal is None else signal
    is_wide = rule.observes(scored.batch.totals.step)
    observed = rule.observe(signal, scored) if is_wide else None
    return rule.apply(signal, scored, observed)


def surrogate_loss(student: Tensor, signal: Signal) -> Tensor:
    """Return the policy-gradient loss of a signal, per token `[B, R]`."""
    return torch.where(signal.mask, signal.weight * policy_gradient(student, signal.advantage), 0.0)


def expected_rule_gradient(rule: Rule | None, at: Tensor, teacher: Tensor, **fields: Any) -> Tensor:
    """Return the exact gradient of a rule's policy gradient on the tree; None is plain OPD."""

    def losses(ours: Tensor) -> Tensor:
        scored = make_scored(ours.detach(), token_logprobs(teacher), **fields)
        signal = opd_signal(scored) if rule is None else applied(rule, scored)[0]
        return surrogate_loss(ours, signal)

    return expected_gradient(at, losses)


def policy_gradient(student_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Return the default surrogate loss: strictly on-policy, no clip."""
    nobody = torch.zeros(len(student_logprobs), dtype=torch.bool)
    return Surrogate()(student_logprobs, advantages, student_logprobs.detach(), nobody)
