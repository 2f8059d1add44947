"""A teacher's log-prob of a text up to some byte, where longer tokens might have gone on.

A token also tells that the text does not continue as a longer one ("1" that it is not "10"), which
a student with shorter tokens decides only later. What the student's log-prob of its tokens so far
must be compared with is the teacher's log-prob of every text that begins with these tokens when the
student's tokenizer cuts it. Where a group ends behind the teacher's tokens t_1 .. t_j that is

    log A_j = log P(t_1 .. t_j) + c_j
    c_j     = log(1 + sum_{i <= j} P(V_ij | t_<i) / P(t_i .. t_j | t_<i))

V_ij are the tokens that begin with the bytes of t_i .. t_j, are longer, and in which the student
would end a token there: the text may reach the group's end within one of them. A group's log-prob
is log A at its end minus log A at its start, that is its tokens' log-probs + c - c of the group
before, so the sums up to any group telescope; behind the end of sequence c is 0. Two models with
one distribution of texts then agree on every group: no difference, whatever was sampled.

Exact if texts that share their first bytes share their first tokens, all but the one that crosses:
so it is where a tokenizer takes the longest match. A text that BPE would have cut otherwise already
before ("ab", but "a" "bc") needs another pass of the teacher: it is left out, and so is every text
in tokens that are not its tokenizer's. The student's cut is that of the longer token alone, without
what stands around it. With the teacher's own tokenizer no token is cut: c is 0.

Axes: N tokens of a micro-batch's responses, n of a block, K spans that start at one token, V the
vocabulary.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opd_lightning.models.head import Comparison, TokenStates, score
from opd_lightning.models.source import ModelSource
from opd_lightning.models.tokenization import ends_within


class Span(NamedTuple):
    """Tokens up to the end of a group, and the longer ones that might stand in their place."""

    length: int
    longer: Tensor  # [M] int64, never empty


class LongerTokens:
    """A teacher's vocabulary in the order of its bytes: what begins alike stands together.

    Args:
        spelt: The bytes of its tokens by id, without those that are no text.
        student: Whose tokenizer says where the student would end a token within them.
    """

    def __init__(self, spelt: Mapping[int, bytes], student: ModelSource) -> None:
        ordered = sorted((word, i) for i, word in spelt.items())
        self._words = [word for word, _ in ordered]
        self._ids = [i for _, i in ordered]
        self._ends = ends_within(student, self._words)
        self._known: dict[bytes, Tensor] = {}

    def spans(self, tokens: Sequence[bytes], ends: Container[int]) -> list[list[Span]]:
        """For every token, the spans that start there and end a group, shortest first."""
        found: list[list[Span]] = [[] for _ in tokens]
        for start, spans in enumerate(found):
            text = b""
            for end in range(start, len(tokens)):
                text += tokens[end]
                longer = self.longer(text)
                if longer is None:
                    break
                if end in ends and len(longer):
                    spans.append(Span(end + 1 - start, longer))
        return found

    def longer(self, text: bytes) -> Tensor | None:
        """Ids of the longer tokens in which the student would stop here; None: none are longer."""
        if text not in self._known:
            size = len(text)
            first = bisect_right(self._words, text)
            stop = bisect_right(self._words, text, first, key=lambda word: word[:size])
            if first == stop:
                return None
            rows = range(first, stop)
            self._known[text] = torch.tensor(
                [self._ids[row] for row in rows if self._ends[row] >> size & 1], dtype=torch.long
            )
        return self._known[text]


def score_with_surplus(
    states: TokenStates, targets: Tensor, spans: Sequence[Sequence[Span]]
) -> tuple[Tensor, Tensor]:
    """Log-probs of `targets [N]`, and c behind each of them: `[N]` each, in nats.

    Args:
        states: Of the teacher.
        targets: Its tokens.
        spans: For each of them, those that start there.
    """

    def masses(logprobs: Tensor, _: None, rows: Tensor) -> Tensor:
        """Log-probs `[n, K]` of the longer tokens of every span, float64."""
        found = logprobs.new_full((len(rows), most), -torch.inf, dtype=torch.float64)
        here = [(row, k) for row, i in enumerate(rows.tolist()) for k in range(len(spans[i]))]
        if not here:
            return found
        row, k = torch.tensor(here, device=logprobs.device).unbind(1)
        sets = [span.longer for i in rows.tolist() for span in spans[i]]
        sizes = torch.tensor([len(ids) for ids in sets]).to(logprobs.device)
        number = torch.arange(len(sets), device=logprobs.device).repeat_interleave(sizes)
        ids = torch.cat(sets).to(logprobs.device)
        probs = logprobs[row[number], ids].double().exp()
        found[row, k] = probs.new_zeros(len(sets)).index_add(0, number, probs).log()
        return found

    most = max(map(len, spans), default=0)
    rows = torch.arange(len(spans))  # where tolist does not wait for a device
    scores = score(states, targets, comparisons={"mass": Comparison(None, masses, [rows])})
    logprobs = scores.student.logprobs
    marks = [(i, k, i + s.length - 1) for i, here in enumerate(spans) for k, s in enumerate(here)]
    start, k, end = torch.tensor(marks, dtype=torch.long, device=targets.device).view(-1, 3).T
    so_far = logprobs.double().cumsum(0)
    path = so_far[end] - so_far[start] + logprobs[start]
    odds = (scores.values["mass"][start, k] - path).exp()
    return logprobs, odds.new_zeros(len(spans)).index_add(0, end, odds).log1p()
