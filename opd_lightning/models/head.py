"""Output heads; only here is the vocabulary matrix applied, in chunks of response tokens.

A chunk's logits are processed in blocks that fit a cache and recomputed in the backward pass. Where
the loss is a multiple of the sum of a comparison, gradients are computed with the values instead.
Axes: N response tokens of a micro-batch, n of a chunk or block, H hidden size, V vocabulary. That
of a teacher may have another size if its scores of the student's tokens are not requested.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from opd_lightning.losses.divergence import checked_values
from opd_lightning.models.head_gradients import Gradients

# Logits of one chunk: 2**25 float32 values are 128 MiB (220 tokens at a vocabulary of 152,064).
MAX_CHUNK_ELEMENTS = 2**25
MAX_BLOCK_ELEMENTS = 2**21  # logits turned into log-probs at a time, 8 MiB: fits a cache
Divergence = Callable[..., Tensor]  # (student's, teacher's log-probs [n, V]) -> [n]
_Block = tuple[Tensor, dict[int, Tensor], slice]  # raw logits [n, V], those of teacher models, rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Output projection of a model and the transforms of its logits."""

    project: Callable[[Tensor], Tensor]  # hidden [n, H] -> raw logits [n, V]
    vocab_size: int
    temperature: float  # the sampler's; the same for student and teachers
    scale: float = 1.0  # factor of the logits in some architectures
    softcap: float | None = None  # in others: softcap * tanh(logits / softcap)

    def finish(self, raw: Tensor) -> Tensor:
        """Transform raw logits to `[n, V]` at the temperature, in float32 (float64 is kept)."""
        precise = raw.to(torch.promote_types(raw.dtype, torch.float32))
        logits = precise * (self.scale / (self.softcap or self.temperature))
        if self.softcap is None:
            return logits
        return torch.tanh(logits) * (self.softcap / self.temperature)


@dataclass(frozen=True, slots=True)
class TokenStates:
    """Hidden states that predict the response tokens, and the head to apply to them."""

    hidden: Tensor  # [N, H]
    head: Head


@dataclass(frozen=True, slots=True)
class MixedStates:
    """States of several models, each for its own rows; other rows have any log-probs."""

    parts: tuple[tuple[Tensor, TokenStates], ...]  # rows [m] int64, ascending; states of m tokens

    def within(self, rows: slice) -> Iterator[tuple[Tensor, slice, TokenStates]]:
        """Yield for each part its rows, relative to the slice, and their range in the part."""
        for index, states in self.parts:
            ends = torch.searchsorted(index, index.new_tensor([rows.start, rows.stop])).tolist()
            place = slice(*ends)
            yield index[place] - rows.start, place, states


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """Distribution of which only the top K tokens are known; all others count as impossible."""

    ids: Tensor  # [N, K] int64
    logprobs: Tensor  # [N, K] float32 nats of the full softmax


States = TokenStates | MixedStates
Distribution = States | Tensor | TopLogprobs  # a Tensor is full log-probs [N, V]


class Comparison(NamedTuple):
    """Value per token; `function` maps full log-probs `[n, V]` of any rows to `[n, ...]`."""

    teacher: Distribution | None  # None: `function` uses the student only and gets None
    function: Divergence
    given: Sequence[Tensor] = ()  # [N, ...] each; their rows are passed as further arguments
    # Whether the loss is expected to be a multiple of the sum of the values. Gradients are then
    # computed in the forward pass, which saves recomputing both heads. If the loss is not such a
    # multiple, they are computed again in the backward pass.
    is_summed: bool = False
    describes: bool = True  # whether the teacher's scores of the targets are returned as well


class FlatScores(NamedTuple):
    """Scores of the N sampled tokens of a micro-batch, without padding."""

    logprobs: Tensor  # [N] float32 nats; the student's carry the gradient
    entropy: Tensor  # [N] float32 nats, detached
    top_ids: Tensor  # [N, K] int64, most likely first
    top_logprobs: Tensor  # [N, K] float32 nats, of top_ids, detached


class HeadScores(NamedTuple):
    student: FlatScores
    teachers: dict[str, FlatScores]  # by comparison, of its teacher where known; detached
    values: dict[str, Tensor]  # by comparison, [N]; carries the gradient to the student


def score(
    states: TokenStates,
    targets: Tensor,
    *,
    top_k: int = 0,
    comparisons: Mapping[str, Comparison] = {},
) -> HeadScores:
    """Apply the heads of student and teachers once: scores of `targets [N]`, and values.

    Only the student gets gradients. Comparisons with the same teacher object share its logits.
    """
    reader = _Reader(states.head, targets, top_k, *comparisons.values())
    if _is_plain_linear(states.head.project):
        outputs = _LinearHead.apply(reader, states.hidden, states.head.project.weight)
    else:
        outputs = _any_head(reader, states.hidden)
    values = dict(zip(comparisons, outputs[1:], strict=False))
    rest = outputs[1 + len(values) :]
    student, *others = (FlatScores(*rest[i : i + 4]) for i in range(0, len(rest), 4))
    known = dict(zip(reader.described, others, strict=True))
    teachers = {k: known[id(c.teacher)] for k, c in comparisons.items() if id(c.teacher) in known}
    return HeadScores(student._replace(logprobs=outputs[0]), teachers, values)


class _Reader:
    """Computation of scores and comparisons from blocks of logits."""

    def __init__(self, head: Head, targets: Tensor, top_k: int, *comparisons: Comparison) -> None:
        self.head, self.targets, self.top_k, self.comparisons = head, targets, top_k, comparisons
        self.teachers = {id(c.teacher): c.teacher for c in comparisons if c.teacher is not None}
        described = (id(c.teacher) for c in comparisons if c.describes and c.teacher is not None)
        self.described = list(dict.fromkeys(described))
        self.widest = max([head.vocab_size, *map(_width, self.teachers.values())])
        # Place of the output of `read` that the loss is expected to sum.
        summed = (i for i, c in enumerate(comparisons, 1) if c.is_summed)
        self.summed = next(summed, None) if torch.is_grad_enabled() else None

    def slices(self, rows: slice, elements: int) -> Iterator[slice]:
        """Split `rows` into slices of at most `elements` logits; no rows give one empty slice."""
        size = max(1, elements // self.widest)
        for start in range(rows.start, max(rows.stop, rows.start + 1), size):
            yield slice(start, min(start + size, rows.stop))

    def teacher_logits(self, rows: slice) -> dict[int, Tensor]:
        """Return raw logits `[n, V]` of the teachers that are models, in the dtype of each."""
        models = {k: t for k, t in self.teachers.items() if isinstance(t, States)}
        with torch.no_grad(), torch.autocast(self.targets.device.type, enabled=False):
            return {k: _raw(t, rows) for k, t in models.items()}

    def blocks(self, raw: Tensor, rows: slice) -> Iterator[_Block]:
        """Split a chunk's logits into blocks of rows."""
        theirs = self.teacher_logits(rows)
        # On a GPU, kernel launches cost more than cache misses.
        size = MAX_BLOCK_ELEMENTS if raw.device.type == "cpu" else MAX_CHUNK_ELEMENTS // 2
        for here in self.slices(rows, size):
            block = slice(here.start - rows.start, here.stop - rows.start)
            yield raw[block], {k: x[block] for k, x in theirs.items()}, here

    def read(self, block: _Block, describe: bool, unused: Container[int] = ()) -> list[Tensor]:
        """Return log-probs and values `[n]`, with gradients; if `describe`, then `FlatScores`.

        Outputs at the places `unused` are not computed, and have any value.
        """
        raw, theirs, rows = block
        with torch.autocast(raw.device.type, enabled=False):
            ours = self.head.finish(raw).log_softmax(dim=-1)
            others = {k: _full(t, theirs.get(k), rows, ours) for k, t in self.teachers.items()}
            targets = self.targets[rows, None]
            found = [ours.gather(1, targets).squeeze(1)]
            for place, one in enumerate(self.comparisons, 1):
                if place in unused:
                    found.append(found[0].detach())
                    continue
                given = (x[rows] for x in one.given)
                value = one.function(ours, others.get(id(one.teacher)), *given)
                found.append(checked_values(one.function, value, len(ours)))
            for x in (ours, *map(others.__getitem__, self.described)) if describe else ():
                found += _describe(x, targets, self.top_k)
            return found

    @torch.enable_grad()
    def pull_back(self, block: _Block, upstream: Sequence[Tensor | None]) -> Tensor:
        """Return the gradient `[n, V]` of raw logits, given those `[N]` of `read`'s outputs."""
        raw, theirs, rows = block
        leaf = raw.detach().requires_grad_()
        unused = {place for place, gradient in enumerate(upstream) if gradient is None}
        found = self.read((leaf, theirs, rows), describe=False, unused=unused)
        pairs = zip(found, upstream, strict=False)
        used = [(x, g[rows]) for x, g in pairs if g is not None and x.requires_grad]
        values, up = [x for x, _ in used], [g for _, g in used]
        return torch.autograd.grad(values, leaf, up)[0] if used else torch.zeros_like(raw)

    @torch.enable_grad()
    def read_with_gradient(self, block: _Block) -> tuple[list[Tensor], Tensor]:
        """Return `read`'s outputs, and the gradient `[n, V]` of the sum of the summed one."""
        raw, theirs, rows = block
        assert self.summed is not None
        leaf = raw.detach().requires_grad_()
        found = self.read((leaf, theirs, rows), describe=True)
        values = found[self.summed].sum()
        no_gradient = not values.requires_grad
        gradient = torch.zeros_like(raw) if no_gradient else torch.autograd.grad(values, leaf)[0]
        return [x.detach() for x in found], gradient

    def common_factor(self, upstream: Sequence[Tensor | None]) -> Tensor | None:
        """Return the gradient of all values of the summed output; None if it is not one number."""
        used = [i for i, x in enumerate(upstream) if x is not None]
        if self.summed is None or used != [self.summed]:
            return None
        gradient = upstream[self.summed]
        assert gradient is not None
        is_one = len(gradient) > 0 and bool((gradient == gradient[0]).all())
        return gradient[0] if is_one else None

    def chunks(self, hidden: Tensor, matrix: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows, raw logits `[n, V]` in a reused buffer, hidden states `[n, H]`)."""
        # CPUs without instructions for 16 bits multiply float32 copies of a chunk.
        is_copied = matrix.device.type == "cpu" and matrix.dtype.itemsize < 4
        size = MAX_CHUNK_ELEMENTS // 4 if is_copied else MAX_CHUNK_ELEMENTS
        runs = list(self.slices(slice(0, len(hidden)), size))
        buffer = matrix.new_empty(runs[0].stop, len(matrix))
        for rows in runs:
            states = hidden[rows].to(matrix.dtype)
            yield rows, torch.mm(states, matrix.t(), out=buffer[: len(states)]), states


class _LinearHead(torch.autograd.Function):
    """Plain linear head with one weight gradient `[V, H]`; autograd would keep one a chunk."""

    @staticmethod
    def forward(ctx: Any, reader: _Reader, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        ctx.reader = reader
        # Autocast's dtype or the weight's; by a view, as autocast would cache the cast full weight.
        ctx.dtype = nn.functional.linear(hidden[:0], weight[:0]).dtype
        ctx.save_for_backward(hidden, weight)
        ctx.set_materialize_grads(False)  # values unused by the loss must not add 0 * inf
        matrix, outputs, ctx.gradients = weight.to(ctx.dtype), list[Tensor](), None
        # float16 needs the loss scale, which only the backward pass knows.
        if reader.summed is not None and any(ctx.needs_input_grad) and ctx.dtype != torch.float16:
            ctx.gradients = Gradients(hidden, weight, of_weight=ctx.needs_input_grad[2])
        for rows, raw, states in reader.chunks(hidden, matrix):
            for block in reader.blocks(raw, rows):
                if ctx.gradients is None:
                    found = reader.read(block, describe=True)
                else:
                    found, gradient = reader.read_with_gradient(block)
                    block[0].copy_(gradient)
                outputs = outputs or [x.new_empty(len(hidden), *x.shape[1:]) for x in found]
                for output, x in zip(outputs, found, strict=True):
                    output[block[2]] = x  # keeping small parts in a list would fragment the heap
            if ctx.gradients is not None:
                with torch.autocast(hidden.device.type, enabled=False):
                    ctx.gradients.add(rows, raw, states, matrix)
        ctx.mark_non_differentiable(*outputs[1 + len(reader.comparisons) :])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        (hidden, weight), reader = ctx.saved_tensors, ctx.reader
        gradients, ctx.gradients = ctx.gradients, None
        factor = reader.common_factor(upstream)
        if gradients is not None and factor is not None:
            return None, *gradients.result(factor)
        matrix = weight.to(ctx.dtype)
        gradients = Gradients(hidden, weight, of_weight=ctx.needs_input_grad[2])
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, raw, states in reader.chunks(hidden, matrix):
                for block in reader.blocks(raw, rows):
                    block[0].copy_(reader.pull_back(block, upstream))
                gradients.add(rows, raw, states, matrix)
        return None, *gradients.result()


def _any_head(reader: _Reader, hidden: Tensor) -> list[Tensor]:
    """Apply any projection through autograd: an adapter, a hooked or sharded layer."""

    def read(rows: slice) -> list[Tensor]:
        raw = reader.head.project(hidden[rows])
        return reader.read((raw, reader.teacher_logits(rows), rows), describe=True)

    runs = reader.slices(slice(0, len(hidden)), MAX_CHUNK_ELEMENTS // 2)  # half for temporaries
    parts = [checkpoint(read, rows, use_reentrant=False) for rows in runs]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _is_plain_linear(project: Any) -> TypeGuard[nn.Linear]:
    """Return whether it is just `hidden @ weight.T`: no bias, adapter, hooks or sharded weight."""
    if type(project) is not nn.Linear or project.bias is not None:
        return False
    wrapped = any(x for k, x in vars(project).items() if k.endswith(("_hooks", "forward")))
    return type(project.weight) in (Tensor, nn.Parameter) and not wrapped


def _width(teacher: Distribution) -> int:
    """Return the size of a teacher's vocabulary; 0 if it is known to be the student's."""
    if isinstance(teacher, TokenStates):
        return teacher.head.vocab_size
    if isinstance(teacher, MixedStates):
        return max(states.head.vocab_size for _, states in teacher.parts)
    return 0


def _raw(teacher: States, rows: slice) -> Tensor:
    """Return raw logits `[n, V]`, in the most precise dtype of its models."""
    if isinstance(teacher, TokenStates):
        return teacher.head.project(teacher.hidden[rows])
    parts = [(at, s.head.project(s.hidden[place])) for at, place, s in teacher.within(rows)]
    dtype = reduce(torch.promote_types, (raw.dtype for _, raw in parts))
    whole = parts[0][1].new_empty(rows.stop - rows.start, parts[0][1].shape[1], dtype=dtype)
    for at, raw in parts:
        whole[at] = raw.to(dtype)
    return whole


@torch.no_grad()
def _full(teacher: Distribution, raw: Tensor | None, rows: slice, like: Tensor) -> Tensor:
    """Return a teacher's log-probs `[n, V]`; `raw` are its logits if it is a model."""
    if isinstance(teacher, TokenStates):
        assert raw is not None
        return teacher.head.finish(raw).log_softmax(dim=-1)
    if isinstance(teacher, MixedStates):
        assert raw is not None
        whole = like.new_empty(raw.shape)
        for at, _, states in teacher.within(rows):
            whole[at] = states.head.finish(raw[at]).log_softmax(dim=-1).to(like.dtype)
        return whole
    if isinstance(teacher, Tensor):
        return teacher[rows].to(like.dtype)
    known = teacher.logprobs[rows].to(like.dtype)
    return torch.full_like(like, -torch.inf).scatter_(1, teacher.ids[rows], known)


@torch.no_grad()
def _describe(logprobs: Tensor, targets: Tensor, top_k: int) -> FlatScores:
    # At log-probs of -inf, 0 * -inf would be NaN; exp(-1e4) is 0 as well.
    entropy = -logprobs.exp().mul_(logprobs.clamp_min(-1e4)).sum(dim=-1)
    return FlatScores(logprobs.gather(1, targets)[:, 0], entropy, *top_k_of(logprobs, top_k))


_HEAP_RATIO = 64  # V / k from which torch's CPU kernel uses a heap, which is fast


def top_k_of(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return ids `[N, K]` int64 and values of the top k of `logprobs [N, V]`, detached.

    Largest first; K is min(k, V). In small vocabularies numpy takes a third of `torch.topk`'s time.
    """
    logprobs, k = logprobs.detach(), min(k, logprobs.shape[1])
    if logprobs.device.type != "cpu" or k == 0 or logprobs.shape[1] >= k * _HEAP_RATIO:
        found, ids = logprobs.topk(k, dim=1)
        return ids, found
    ids = torch.from_numpy(np.argpartition(logprobs.numpy(), -k, axis=1)[:, -k:])
    found, order = logprobs.gather(1, ids).sort(dim=1, descending=True)
    return ids.gather(1, order), found
