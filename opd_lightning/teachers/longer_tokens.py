"""A teacher's log-prob of a text prefix, summed over longer tokens that extend beyond it.

A token also implies that the text does not continue as a longer one ("1": not "10"), which a
student with shorter tokens decides only later. The student's log-prob of its tokens so far must be
compared with the teacher's log-prob of all texts that begin with these tokens when encoded by the
student's tokenizer. For a group that ends after the teacher's tokens t_1 .. t_j that is

    log A_j = log P(t_1 .. t_j) + c_j
    c_j     = log(1 + sum_{i <= j} P(V_ij | t_<i) / P(t_i .. t_j | t_<i))

V_ij are the tokens that begin with the bytes of t_i .. t_j, are longer, and in which the student's
tokenizer has a token boundary there: the text may reach the group's end within one of them. A
group's log-prob is log A at its end minus log A at its start, that is its tokens' log-probs + c -
c of the previous group, so the sums up to any group telescope; after the end of sequence c is 0.
Two models with the same distribution of texts then agree on every group, for every sample.

Exact if texts that share their first bytes share their first tokens, except the one that crosses
the boundary, as with tokenizers that take the longest match. Texts that BPE splits differently
before the boundary ("ab", but "a" "bc") would need another forward pass of the teacher and are
ignored. Other encodings than the tokenizer's own are ignored, too. The student's boundaries are
those of the longer token alone, without its context. With the teacher's own tokenizer c is 0.

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
    """Run of tokens up to the end of a group, and the longer tokens that begin with its bytes."""

    length: int
    longer: Tensor  # [M] int64, never empty


class LongerTokens:
    """A teacher's vocabulary sorted by bytes, so that tokens with a common prefix are adjacent.

    Args:
        spelt: Bytes of the teacher's tokens by id, without special tokens.
        student: Source of the tokenizer that determines the student's boundaries within them.
    """

    def __init__(self, spelt: Mapping[int, bytes], student: ModelSource) -> None:
        ordered = sorted((word, i) for i, word in spelt.items())
        self._words = [word for word, _ in ordered]
        self._ids = [i for _, i in ordered]
        self._ends = ends_within(student, self._words)
        self._known: dict[bytes, Tensor] = {}

    def spans(self, tokens: Sequence[bytes], ends: Container[int]) -> list[list[Span]]:
        """Return, for every token, the spans that start there and end a group, shortest first."""
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
        """Return longer tokens with a student boundary after `text`; None: no token is longer."""
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
    """Return the log-probs of `targets [N]` and c after each of them: `[N]` each, in nats.

    Args:
        states: The teacher's states.
        targets: The teacher's tokens.
        spans: For each target, the spans that start there.
    """

    def masses(logprobs: Tensor, _: None, rows: Tensor) -> Tensor:
        """Return log-probs `[n, K]` of the longer tokens of every span, float64."""
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
    rows = torch.arange(len(spans))  # on the CPU, so that tolist does not synchronise
    scores = score(states, targets, comparisons={"mass": Comparison(None, masses, [rows])})
    logprobs = scores.student.logprobs
    marks = [(i, k, i + s.length - 1) for i, here in enumerate(spans) for k, s in enumerate(here)]
    start, k, end = torch.tensor(marks, dtype=torch.long, device=targets.device).view(-1, 3).T
    so_far = logprobs.double().cumsum(0)
    path = so_far[end] - so_far[start] + logprobs[start]
    odds = (scores.values["mass"][start, k] - path).exp()
    return logprobs, odds.new_zeros(len(spans)).index_add(0, end, odds).log1p()
