"""Requests of a task to a language model, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from opd_lightning.errors import UserError
from opd_lightning.rollouts.base import Sampling

# lm-eval's default where a task does not set the length of an answer.
MAX_NEW_TOKENS = 256

# Names for the length of an answer; the first one that is set applies.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {*_LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k"}


class LikelihoodRequest(NamedTuple):
    """A text whose log-likelihood after a context is needed."""

    context_ids: list[int]
    text_ids: list[int]


class GenerationRequest(NamedTuple):
    """A context whose continuation is needed."""

    context_ids: list[int]
    sampling: Sampling
    until: tuple[str, ...]  # stop strings; the answer ends before the first of them

    def cut(self, text: str) -> str:
        """Cut a generated text at the stop strings."""
        for stop in self.until:
            text = text.split(stop)[0]
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEncoder:
    """Encoder of requests for a model, with its tokenizer and context length."""

    tokenizer: Any
    template_args: dict[str, Any]  # further variables of its chat template
    context_length: int  # tokens, an answer included

    def likelihood_request(self, context_ids: list[int], text_ids: list[int]) -> LikelihoodRequest:
        """Make a request, its context truncated on the left to fit with the text."""
        available = self.context_length - len(text_ids)
        if not text_ids or available < 1:
            raise UserError(
                f"got a text of {len(text_ids)} tokens to read, expected one that fits the "
                f"student's context of {self.context_length} after at least one other"
            )
        return LikelihoodRequest(context_ids[-available:], text_ids)

    def generation_request(
        self, context_ids: list[int], kwargs: dict[str, Any]
    ) -> GenerationRequest:
        """Make a request of a task's `generation_kwargs`, truncated on the left to fit."""
        unknown = {k for k in kwargs.keys() - _KNOWN if (k, kwargs[k]) != ("num_beams", 1)}
        if unknown:
            raise UserError(
                f"got generation_kwargs {min(unknown)!r}, which data.engine cannot do; take it out "
                "in a task of your own"
            )
        samples = kwargs.get("do_sample", kwargs.get("temperature", 0) > 0)
        lengths = [int(kwargs[name]) for name in _LENGTHS if kwargs.get(name) is not None]
        sampling = Sampling(
            temperature=float(kwargs.get("temperature", 1.0)) if samples else 0.0,
            top_p=float(kwargs.get("top_p", 1.0)) if samples else 1.0,
            top_k=int(kwargs.get("top_k", 0)) if samples else 0,
            max_new_tokens=lengths[0] if lengths else MAX_NEW_TOKENS,
        )
        available = self.context_length - sampling.max_new_tokens
        if available < 1:
            raise UserError(
                f"got answers of up to {sampling.max_new_tokens} tokens for the student's context "
                f"of {self.context_length}; set max_gen_toks in generation_kwargs of a task of "
                "your own"
            )
        until = kwargs.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        return GenerationRequest(context_ids[-available:], sampling, tuple(filter(None, stops)))
