"""The one place that multiplies by the vocabulary matrix, in chunks of response tokens.

No `[B, L, V]` tensor exists: prompts never reach the head, and logits live for one chunk, in the
forward pass and (recomputed) in the backward pass. A chunk is what one matrix product makes; what
is read from it (log-softmax, entropy, divergences) is read a few rows at a time, so that the
temporaries of a divergence cost cache, not memory.

Axes: N response tokens of a micro-batch, n tokens of a chunk or block, H hidden size,
V vocabulary, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Logits of one chunk: 2**25 float32 values are 128 MiB (220 tokens at a vocabulary of 152,064).
# Larger ones gain little speed: the products of 220 rows already run near the peak.
MAX_CHUNK_ELEMENTS = 2**25
# Logits, of the student and its teachers, that wait for the backward pass instead of being
# computed again: a fixed amount, which spares small micro-batches the fourth matrix product.
MAX_KEPT_ELEMENTS = 2**26
# Logits that are turned into log-probs at a time: 2**21 float32 values are 8 MiB, a cache's worth.
MAX_BLOCK_ELEMENTS = 2**21
_LOG_OF_NOTHING = -1e4  # its exp() is 0: stands in for -inf, whose product with 0 is NaN

Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A model's output projection and what the model does to its logits afterwards."""

    project: Callable[[Tensor], Tensor]  # hidden [n, H] -> raw logits [n, V]
    vocab_size: int
    temperature: float  # of the sampler; both sides of a comparison use the same one
    scale: float = 1.0  # some architectures multiply their logits
    softcap: float | None = None  # others squash them: softcap * tanh(logits / softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, H]` -> float32 (float64 stays) `[n, V]`, divided by the temperature."""
        return self.finish(self.project(hidden))

    def finish(self, raw: Tensor) -> Tensor:
        """Projected `[n, V]` -> logits: float32 (float64 stays), divided by the temperature."""
        logits = _precise(raw)
        if self.softcap is not None:
            capped = torch.tanh(logits * (self.scale / self.softcap))
            return capped * (self.softcap / self.temperature)
        factor = self.scale / self.temperature
        return logits if factor == 1.0 else logits * factor


@dataclass(frozen=True, slots=True)
class TokenStates:
    """Where a model predicts the response tokens, and the head to read its predictions with."""

    hidden: Tensor  # [N, H]
    head: Head


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """A distribution of which only the K best tokens are known; the rest counts as impossible."""

    ids: Tensor  # [N, K] int64
    logprobs: Tensor  # [N, K] float32 nats of the full softmax


Distribution = TokenStates | Tensor | TopLogprobs  # a Tensor is full log-probs [N, V]


class Comparison(NamedTuple):
    """A value per token, read from the student's full log-softmax and perhaps a teacher's."""

    teacher: Distribution | None  # None: `function` reads the student alone
    # (student log-probs [n, V], teacher log-probs [n, V] or None) -> [n]; row by row, because
    # how many rows it is shown at a time is nobody's business.
    function: Callable[[Tensor, Tensor | None], Tensor]


class FlatScores(NamedTuple):
    """Scores of the N sampled tokens of a micro-batch, before they go back to `[B, R]`."""

    logprobs: Tensor  # [N] float32 nats; the student's carries the gradient
    entropy: Tensor  # [N] float32 nats, detached
    top_ids: Tensor  # [N, K] int64, most likely first


class HeadScores(NamedTuple):
    """What one pass over the heads found."""

    student: FlatScores
    teachers: dict[str, FlatScores]  # by comparison, of those that have a teacher; detached
    values: dict[str, Tensor]  # by comparison, [N]; carries the gradient to the student


def score(
    states: TokenStates,
    targets: Tensor,
    *,
    top_k: int = 0,
    comparisons: Mapping[str, Comparison] | None = None,
) -> HeadScores:
    """One pass over the student's head and its teachers': scores of `targets [N]`, and values.

    Gradients reach the student's hidden states and head only, from log-probs and values alike.
    Comparisons with the same teacher object share its logits.
    """
    plan = _Plan(states.head, targets, top_k, dict(comparisons or {}))
    project = states.head.project
    if _is_plain_linear(project):
        outputs = _LinearHead.apply(  # type: ignore[no-untyped-call]
            plan, torch.is_grad_enabled(), states.hidden, project.weight, project.bias
        )
    else:
        outputs = _any_head(plan, states.hidden)
    return plan.name(outputs)


def score_tokens(states: TokenStates, targets: Tensor, *, top_k: int) -> FlatScores:
    """`score` without comparisons."""
    return score(states, targets, top_k=top_k).student


def score_divergence(
    student: TokenStates,
    teacher: TokenStates,
    targets: Tensor,
    divergence: Divergence,
    *,
    top_k: int,
) -> tuple[FlatScores, FlatScores, Tensor]:
    """`score` with one comparison: student scores, teacher scores and the divergence `[N]`."""
    comparison = Comparison(teacher, divergence)  # type: ignore[arg-type]
    scores = score(student, targets, top_k=top_k, comparisons={"": comparison})
    return scores.student, scores.teachers[""], scores.values[""]


class _Plan:
    """What to read from the logits, and how to pull gradients back to them, chunk by chunk."""

    def __init__(
        self, head: Head, targets: Tensor, top_k: int, comparisons: dict[str, Comparison]
    ) -> None:
        self.head, self.targets, self.top_k = head, targets, top_k
        self.comparisons = comparisons
        teachers = {id(c.teacher): c.teacher for c in comparisons.values() if c.teacher is not None}
        self.teachers: list[Distribution] = list(teachers.values())
        self.places = {key: place for place, key in enumerate(teachers)}

    def chunks(self) -> Iterator[tuple[slice, bool]]:
        """(rows of a chunk, whether its logits may wait for the backward pass)."""
        total, vocab = self.targets.shape[0], self.head.vocab_size
        size = max(1, MAX_CHUNK_ELEMENTS // vocab)
        with_logits = 1 + sum(isinstance(t, TokenStates) for t in self.teachers)
        for start in range(0, max(total, 1), size):  # one chunk, if an empty one, always
            rows = slice(start, min(start + size, total))
            yield rows, rows.stop * vocab * with_logits <= MAX_KEPT_ELEMENTS

    def teacher_rows(self, rows: slice) -> list[Tensor]:
        """Of each teacher what one chunk needs `[n, ...]`: raw logits, if it is a model."""
        # A teacher answers in its own dtype, whatever the student is trained in.
        with torch.no_grad(), torch.autocast(self.targets.device.type, enabled=False):
            return [_rows_of(teacher, rows) for teacher in self.teachers]

    def read(self, raw: Tensor, theirs: list[Tensor], rows: slice) -> list[Tensor]:
        """All outputs of one chunk, in the order that `name` expects."""
        parts = []
        with torch.no_grad(), torch.autocast(raw.device.type, enabled=False):
            for block in _blocks(raw):
                here = slice(rows.start + block.start, rows.start + block.stop)
                ours, others, graded = self._read_block(raw[block], theirs, block, rows)
                scores = [_describe(x, self.targets[here], self.top_k) for x in (ours, *others)]
                parts.append([*graded, *(x for s in scores for x in s)])
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def pull_back(
        self, raw: Tensor, theirs: list[Tensor], rows: slice, upstream: list[Tensor | None]
    ) -> Tensor:
        """Gradient `[n, V]` of the chunk's raw logits, in their dtype, written over them.

        `upstream`: gradients `[n]` of the log-prob and of each comparison's value.
        """
        with torch.enable_grad(), torch.autocast(raw.device.type, enabled=False):
            for block in _blocks(raw):
                leaf = _precise(raw[block].detach()).requires_grad_()
                graded = self._read_block(leaf, theirs, block, rows)[2]
                pairs = zip(graded, upstream, strict=True)
                used = [(x, up[block]) for x, up in pairs if up is not None and x.requires_grad]
                if used:
                    values, gradients = zip(*used, strict=True)
                    raw[block] = torch.autograd.grad(values, leaf, gradients)[0]
                else:
                    raw[block] = 0.0
        return raw

    def name(self, outputs: tuple[Tensor, ...] | list[Tensor]) -> HeadScores:
        """Sort the outputs of `read` into the fields they belong to."""
        values = dict(zip(self.comparisons, outputs[1:], strict=False))
        plain = outputs[1 + len(values) :]
        scores = [FlatScores(*plain[i : i + 3]) for i in range(0, len(plain), 3)]
        teachers = {
            name: scores[1 + self.places[id(c.teacher)]]
            for name, c in self.comparisons.items()
            if c.teacher is not None
        }
        return HeadScores(scores[0]._replace(logprobs=outputs[0]), teachers, values)

    def _read_block(
        self, raw: Tensor, theirs: list[Tensor], block: slice, rows: slice
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(student log-probs, each teacher's `[n, V]`, [log-prob of the target, *values] `[n]`)."""
        here = slice(rows.start + block.start, rows.start + block.stop)
        ours = self.head.finish(raw).log_softmax(dim=-1)
        with torch.no_grad():
            others = [
                _full_logprobs(teacher, x[block], here, ours)
                for teacher, x in zip(self.teachers, theirs, strict=True)
            ]
        values = [
            c.function(ours, None if c.teacher is None else others[self.places[id(c.teacher)]])
            for c in self.comparisons.values()
        ]
        return ours, others, [_pick(ours, self.targets[here]), *values]


class _LinearHead(torch.autograd.Function):
    """`read` behind a plain linear layer, whose weight gradient needs one buffer, not one a chunk.

    Inputs: plan, whether gradients are on, hidden `[N, H]`, weight `[V, H]`, bias `[V]` or None.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, grad: bool, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.plan, ctx.dtype = plan, _arithmetic(hidden)
        ctx.set_materialize_grads(False)
        parts, waiting = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = [x if x is None else x.to(ctx.dtype or x.dtype) for x in (weight, bias)]
            for rows, fits in plan.chunks():
                raw = nn.functional.linear(hidden[rows].to(ctx.dtype or hidden.dtype), *inputs)
                theirs = plan.teacher_rows(rows)
                parts.append(plan.read(raw, theirs, rows))
                if grad and fits:
                    waiting += [raw, *theirs]
        ctx.save_for_backward(hidden, weight, bias, *waiting)
        outputs = [torch.cat(column) for column in zip(*parts, strict=True)]
        ctx.mark_non_differentiable(*outputs[1 + len(plan.comparisons) :])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        hidden, weight, bias, *waiting = ctx.saved_tensors
        dtype = ctx.dtype or hidden.dtype
        matrix, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[2:])
        width = 1 + len(plan.teachers)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, _ in plan.chunks():
                states = hidden[rows].to(dtype)
                if waiting:
                    (raw, *theirs), waiting = waiting[:width], waiting[width:]
                    raw = raw.clone()  # the graph may be walked again
                else:
                    raw = nn.functional.linear(states, matrix, shift)
                    theirs = plan.teacher_rows(rows)
                ups = [x if x is None else x[rows] for x in upstream[: 1 + len(plan.comparisons)]]
                gradients.add(rows, plan.pull_back(raw, theirs, rows, ups), states, matrix)
        return None, None, *gradients.finished()


class _Gradients:
    """Where the gradients of hidden states, weight and bias add up over chunks."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]
    ) -> None:
        self.like = (hidden, weight, bias)
        # Sums over many chunks, in float32 whatever the weights are in; rows are written once.
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=_sum_dtype(weight)) if needed[1] else None
        self.bias = None
        if bias is not None and needed[2]:
            self.bias = torch.zeros_like(bias, dtype=_sum_dtype(bias))

    def add(self, rows: slice, logits: Tensor, states: Tensor, matrix: Tensor) -> None:
        """One chunk's: gradient of its logits `[n, V]`, its states `[n, H]`, weight `[V, H]`."""
        if self.hidden is not None:
            self.hidden[rows] = logits @ matrix
        if self.bias is not None:
            self.bias += logits.sum(dim=0, dtype=self.bias.dtype)
        if self.weight is None:
            return
        if self.weight.dtype == logits.dtype:
            self.weight.addmm_(logits.t(), states)
            return
        # A product in low precision, a slice of the vocabulary at a time: no second [V, H].
        for part, total in zip(logits.split(8192, 1), self.weight.split(8192), strict=True):
            total += part.t() @ states

    def finished(self) -> list[Tensor | None]:
        """In the inputs' dtypes."""
        found = (self.hidden, self.weight, self.bias)
        return [
            x if x is None or like is None else x.to(like.dtype)
            for x, like in zip(found, self.like, strict=True)
        ]


class _ReadLogits(torch.autograd.Function):
    """`read` of one chunk of logits, whoever made them, with its temporaries block by block."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, rows: slice, raw: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.rows = plan, rows
        ctx.set_materialize_grads(False)
        theirs = plan.teacher_rows(rows)
        ctx.save_for_backward(raw, *theirs)
        outputs = plan.read(raw, theirs, rows)
        ctx.mark_non_differentiable(*outputs[1 + len(plan.comparisons) :])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        raw, *theirs = ctx.saved_tensors
        ups = list(upstream[: 1 + len(ctx.plan.comparisons)])
        return None, None, ctx.plan.pull_back(raw.clone(), theirs, ctx.rows, ups)


def _any_head(plan: _Plan, hidden: Tensor) -> list[Tensor]:
    """Autograd through any projection (an adapter, a sharded or hooked layer), chunk by chunk."""

    def read_chunk(states: Tensor, rows: slice) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = _ReadLogits.apply(plan, rows, plan.head.project(states))  # type: ignore[no-untyped-call]
        return outputs

    parts = [
        read_chunk(hidden[rows], rows)
        if fits
        else checkpoint(read_chunk, hidden[rows], rows, use_reentrant=False)
        for rows, fits in plan.chunks()
    ]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _is_plain_linear(project: Any) -> TypeGuard[nn.Linear]:
    """Nothing but `hidden @ weight.T + bias`: no adapter, no hooks, no sharded weight."""
    return (
        type(project) is nn.Linear
        and type(project.weight) in (Tensor, nn.Parameter)
        and "forward" not in vars(project)
        and not (project._forward_hooks or project._forward_pre_hooks)
        and not (project._backward_hooks or project._backward_pre_hooks)
    )


def _arithmetic(hidden: Tensor) -> torch.dtype | None:
    """What autocast would multiply in; None: whatever the inputs are in."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(raw: Tensor) -> Iterator[slice]:
    size = max(1, MAX_BLOCK_ELEMENTS // raw.shape[1])
    for start in range(0, max(raw.shape[0], 1), size):
        yield slice(start, min(start + size, raw.shape[0]))


def _rows_of(teacher: Distribution, rows: slice) -> Tensor:
    if isinstance(teacher, TokenStates):
        return teacher.head.project(teacher.hidden[rows])
    return teacher.logprobs[rows] if isinstance(teacher, TopLogprobs) else teacher[rows]


def _full_logprobs(teacher: Distribution, x: Tensor, here: slice, like: Tensor) -> Tensor:
    """Log-probs `[n, V]` from a block of `_rows_of`; `here` is where it lies among the N rows."""
    if isinstance(teacher, TokenStates):
        return teacher.head.finish(x).log_softmax(dim=-1)
    if isinstance(teacher, TopLogprobs):
        return torch.full_like(like, -torch.inf).scatter_(1, teacher.ids[here], x.to(like.dtype))
    return _precise(x)


def _pick(logprobs: Tensor, targets: Tensor) -> Tensor:
    return logprobs.gather(-1, targets[:, None]).squeeze(-1)


def _describe(logprobs: Tensor, targets: Tensor, top_k: int) -> FlatScores:
    entropy = -(logprobs.exp().mul_(logprobs.clamp_min(_LOG_OF_NOTHING))).sum(dim=-1)
    top_ids = logprobs.topk(min(top_k, logprobs.shape[-1]), dim=-1).indices
    return FlatScores(_pick(logprobs, targets), entropy, top_ids)
