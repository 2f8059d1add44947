"""Comparison with a model of another tokenizer, in groups of tokens with the same text.

A group is compared where its last token is predicted. The distributions there are multiplied by the
probability of the group's earlier tokens, which gives the probability of the group with any last
token (TRL's "bayesian"):

    f(S_k + c_S, T_j + c_T),   c = sum of the model's log-probs of the group's earlier tokens

in log-probs, k and j being the rows of the group's last tokens. c_S consists of rows of other
chunks of the student's head. Its value is computed first, by the head without a gradient, from the
rows of earlier tokens alone; its gradient is added to the value afterwards, as
`f' (c_S - sg[c_S])`, where f' is the derivative of f by c_S at its value. So the gradient is exact.

Axes: N response tokens of a micro-batch, n of a block, G groups, V_S and V_T the vocabularies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from opd_lightning.models.head import (
    Comparison,
    Divergence,
    HeadScores,
    MixedStates,
    TokenStates,
    score,
)


class GroupComparison(NamedTuple):
    """Value per group, at the token that ends it; 0 at other tokens."""

    # One part, whose rows are the student's tokens that end a group and whose states predict the
    # group's last token of the teacher.
    teacher: MixedStates
    function: Divergence  # log-probs [G, V_S], [G, V_T] -> [G]
    ends: Tensor  # [N] int64: number of the student's token that ends the group; -1: no group
    given: Tensor  # [N] c_T, nats; read where a group ends

    @property
    def _earlier(self) -> Tensor:
        """Tokens that do not end their group, `[N]` bool."""
        return (self.ends >= 0) & (self.ends != torch.arange(len(self.ends)).to(self.ends.device))

    def comparisons(self, name: str, states: TokenStates, targets: Tensor) -> dict[str, Comparison]:
        """Return comparisons for `head.score`: of f and, if it is needed, of its derivative."""
        rows = self._earlier.nonzero()[:, 0]
        logprobs = self.given.new_zeros(0)
        if len(rows):
            with torch.no_grad():
                earlier = TokenStates(states.hidden[rows], states.head)
                logprobs = score(earlier, targets[rows]).student.logprobs
        ours = self._sums(logprobs, rows)
        is_end = self.ends == torch.arange(len(self.ends)).to(self.ends.device)
        found = {name: self._comparison(self._value, is_end, ours)}
        if len(rows) and torch.is_grad_enabled():
            has_several = torch.zeros_like(is_end).index_fill(0, self.ends[rows], True)
            found[_derivative(name)] = self._comparison(self._derivative, has_several, ours)
        return found

    def complete(self, name: str, scores: HeadScores) -> HeadScores:
        """Return the scores with the gradient of c_S in the value."""
        values = dict(scores.values)
        derivative = values.pop(_derivative(name), None)
        if derivative is not None:
            rows = self._earlier.nonzero()[:, 0]
            ours = self._sums(scores.student.logprobs[rows], rows)
            values[name] = values[name] + derivative.detach() * (ours - ours.detach())
        return scores._replace(values=values)

    def _sums(self, logprobs: Tensor, rows: Tensor) -> Tensor:
        """Return sums `[N]` of log-probs by the tokens that end the groups of `rows`."""
        return logprobs.new_zeros(len(self.ends)).index_add(0, self.ends[rows], logprobs)

    def _comparison(self, function: Divergence, rows: Tensor, ours: Tensor) -> Comparison:
        return Comparison(self.teacher, function, [rows, ours, self.given], describes=False)

    def _value(
        self, student: Tensor, teacher: Tensor, is_end: Tensor, ours: Tensor, theirs: Tensor
    ) -> Tensor:
        rows = is_end.nonzero()[:, 0]
        values = student.new_zeros(len(student))
        if not len(rows):
            return values
        merged, other = student[rows] + ours[rows, None], teacher[rows] + theirs[rows, None]
        return values.index_put((rows,), self.function(merged, other))

    @torch.no_grad()
    def _derivative(
        self, student: Tensor, teacher: Tensor, has_several: Tensor, ours: Tensor, theirs: Tensor
    ) -> Tensor:
        """Return f' by forward differentiation, `[n]`; 0 at groups of one token."""
        rows = has_several.nonzero()[:, 0]
        values = student.new_zeros(len(student))
        if not len(rows):
            return values
        merged = student.detach()[rows] + ours[rows, None]
        other = teacher[rows] + theirs[rows, None]
        # Forward mode: inside a checkpoint, a backward pass would compute the checkpoint again.
        # `forward_ad` is disabled inside of autograd functions, `func.jvp` is not.
        found = jvp(
            lambda moved: self.function(moved, other), (merged,), (torch.ones_like(merged),)
        )
        return values.index_put((rows,), found[1])


def _derivative(name: str) -> str:
    return f"{name}, derivative"
