"""Hugging Face engine: `transformers` generate with exact per-request seeds.

It is the reference engine: it runs wherever PyTorch does, and tests compare the faster ones to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.models.causal_lm import Dtype, load_causal_lm
from opd_lightning.models.folder_format import stored_tensors
from opd_lightning.models.source import ModelSource
from opd_lightning.models.weight_sums import EngineSum, engine_sums
from opd_lightning.rollouts.base import Engine, Request, Sampling
from opd_lightning.rollouts.checks import check_lengths, checked_weights
from opd_lightning.terminal.progress import Progress
from opd_lightning.types import Completion, StopReason


class HFEngine(Engine):
    """Engine that samples with `transformers` generate from a separate copy of the model.

    Args:
        dtype: Precision of the copy. float32 agrees with a float32 trainer to rounding.
        device: Device of the copy, such as "cpu" or "cuda:1". None takes the current CUDA device
            if there is one, else the CPU.
        max_batch_size: Maximum number of requests decoded at once; longer lists are split.
    """

    def __init__(
        self,
        *,
        dtype: Dtype = "float32",
        device: str | None = None,
        max_batch_size: int = 256,
    ) -> None:
        if max_batch_size < 1:
            raise UserError(f"engine.max_batch_size: got {max_batch_size}, expected >= 1")
        self.dtype = dtype
        self.device = device
        self.max_batch_size = max_batch_size
        self._model: Any = None

    def start(self, source: ModelSource, *, max_length: int) -> None:
        """Load the model of `source` for sequences of up to `max_length` tokens."""
        from transformers import GenerationConfig

        self._eos_ids = source.eos_ids
        self._pad_id = source.pad_id
        self._max_length = max_length
        model = load_causal_lm(source, dtype=self.dtype)
        # generate() takes every value that our configuration leaves unset from this one, so the
        # folder's repetition penalty or top-k would change the distribution.
        model.generation_config = GenerationConfig()
        self._device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.to(self._device).eval().requires_grad_(False)
        self.weights_dtype = self._model.dtype
        self._pads = self._ignores_padding(model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def _ignores_padding(self, vocabulary: int) -> bool:
        """Return whether left padding does not change log-probs, as it may for recurrent states."""
        ids = [i for i in range(min(vocabulary, 16)) if i != self._pad_id]
        greedy = Sampling(max_new_tokens=1, temperature=0)
        short, long = (Request(ids[-length:], seed=0) for length in (3, 8))
        (alone,), (padded, _) = (
            self._generate_batch(batch, greedy, lambda: None) for batch in ([short], [short, long])
        )
        gap = abs(alone.logprobs[0] - padded.logprobs[0])
        same = alone.response_ids == padded.response_ids
        return same and gap <= torch.finfo(self._model.dtype).eps ** 0.5

    @torch.no_grad()
    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights. `weights` yields (Hugging Face name, full tensor), tied ones once.

        A name or shape that does not fit raises `UserError` and leaves the copy partly updated.
        """
        own = dict(stored_tensors(self._model))
        shapes = {name: tensor.shape for name, tensor in own.items()}
        for name, tensor in checked_weights(weights, shapes):
            own[name].copy_(tensor)
            del tensor  # before the next is gathered
        self.version = version

    def weight_sums(self) -> list[EngineSum]:
        return engine_sums(stored_tensors(self._model))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """Return one completion per request, in the order of the requests."""
        check_lengths(requests, sampling, self._max_length)
        # Sorted by length, which minimises padding when the list is split.
        order = sorted(range(len(requests)), key=lambda i: _length(requests[i]))
        completions: dict[int, Completion] = {}
        batches = self._batches(requests, order)
        # Unless all responses of a batch end earlier.
        steps = len(batches) * sampling.max_new_tokens
        with Progress("generate", steps, "token step", within=True) as bar:
            for chosen in batches:
                batch = [requests[i] for i in chosen]
                found = self._generate_batch(batch, sampling, bar.update)
                bar.shorten(sampling.max_new_tokens - max(len(c.response_ids) for c in found))
                completions.update(zip(chosen, found, strict=True))
        return [completions[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[Request], order: list[int]) -> list[list[int]]:
        """Split `order`, sorted by length, into batches; of one length if padding matters."""
        batches: list[list[int]] = []
        for i in order:
            last = batches[-1] if batches else []
            alike = last and (self._pads or _length(requests[last[-1]]) == _length(requests[i]))
            if alike and len(last) < self.max_batch_size:
                last.append(i)
            else:
                batches.append([i])
        return batches

    def sleep(self) -> None:
        """Move the copy to CPU memory until `wake`; on the CPU no memory is released."""
        self._model.to("cpu")
        self.version = -1
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Move the copy back to its device."""
        self._model.to(self._device)

    def close(self) -> None:
        """Free the copy and reset its version; `start` may be called again."""
        self._model = None
        self.version = -1

    def _generate_batch(
        self, batch: Sequence[Request], sampling: Sampling, on_step: Callable[[], None]
    ) -> list[Completion]:
        from transformers import GenerationConfig, LogitsProcessorList

        width = max(len(request.prompt_ids) for request in batch)
        input_ids = torch.full((len(batch), width), self._pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, request in enumerate(batch):
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            attention_mask[row, width - len(request.prompt_ids) :] = 1
        seeds = [request.seed for request in batch] if sampling.temperature > 0 else None
        draw = _Draw(seeds, self._device, on_step)
        output = self._model.generate(
            input_ids.to(self._device),
            attention_mask=attention_mask.to(self._device),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,  # the last logits processor samples
                eos_token_id=list(self._eos_ids),
                pad_token_id=self._pad_id,
            ),
            logits_processor=LogitsProcessorList([*_make_warpers(sampling), draw]),
        )
        response_ids = output[:, width:].tolist()
        # [B, T]; finished rows continue to sample along with the others and are cut here.
        logprobs = torch.stack(draw.logprobs, dim=1).tolist()
        return [self._cut(ids, row) for ids, row in zip(response_ids, logprobs, strict=True)]

    def _cut(self, ids: list[int], logprobs: list[float]) -> Completion:
        """Return the completion up to its first EOS, inclusive."""
        for index, token in enumerate(ids):
            if token in self._eos_ids:
                return Completion(ids[: index + 1], logprobs[: index + 1], StopReason.EOS)
        return Completion(ids, logprobs, StopReason.LENGTH)


def _length(request: Request) -> int:
    return len(request.prompt_ids)


class _Draw:
    """Logits processor that samples one token per row and records its log-prob.

    Gumbel-max: argmax(log p + G) is a sample of p when G is Gumbel noise. Each row has a separate
    generator, so samples do not depend on the batch or its order. generate()'s greedy argmax over
    the returned scores picks the recorded token.
    """

    def __init__(
        self, seeds: list[int] | None, device: torch.device, on_step: Callable[[], None]
    ) -> None:
        self._generators: list[torch.Generator] | None = None  # one per row; None is greedy
        if seeds is not None:
            self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._on_step = on_step
        self._noise: Tensor | None = None  # [B, V], reused by every step
        self.logprobs: list[Tensor] = []  # one [B] per step, float32 nats

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        keys = scores if self._generators is None else scores - self._exponential_log(scores)
        chosen = keys.argmax(dim=-1, keepdim=True)
        self.logprobs.append(scores.gather(1, chosen).squeeze(1) - scores.logsumexp(dim=-1))
        self._on_step()
        return keys

    def _exponential_log(self, scores: Tensor) -> Tensor:
        """Return log(-log(u)), the negated Gumbel noise `[B, V]`.

        float64, because float32 uniforms end at 1 - 2**-24: tokens less likely than about that,
        most of a vocabulary of 150,000, would never be drawn.
        """
        assert self._generators is not None
        if self._noise is None:
            self._noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        for row, generator in zip(self._noise.unbind(), self._generators, strict=True):
            row.uniform_(generator=generator)
        return self._noise.log_().neg_().log_().float()


def _make_warpers(sampling: Sampling) -> list[Any]:
    """Return transformers' warpers in the order that it applies them; none when greedy."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    if sampling.temperature == 0:
        return []
    warpers: list[Any] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers
