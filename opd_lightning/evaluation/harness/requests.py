"""What a task asks of a language model, as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from opd_lightning.errors import UserError
from opd_lightning.rollouts.base import Sampling

# What the harness takes where a task does not say how long an answer may get.
MAX_NEW_TOKENS = 256

# What tasks call the length of an answer; the first that is there counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KNOWN = {*_LENGTHS, "until", "do_sample", "temperature", "top_p", "top_k"}


class LikelihoodRequest(NamedTuple):
    """How likely is a text after another?"""

    context_ids: list[int]
    text_ids: list[int]


class GenerationRequest(NamedTuple):
    """How does a text go on?"""

    context_ids: list[int]
    sampling: Sampling
    until: tuple[str, ...]  # the answer ends before the first of them

    def cut(self, text: str) -> str:
        """The answer in what was written."""
        for stop in self.until:
            text = text.split(stop)[0]
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEncoder:
    """Who reads the questions: a model's tokens, and how many of them it can hold."""

    tokenizer: Any
    template_args: dict[str, Any]  # further variables of its chat template
    context_length: int  # tokens, an answer included

    def reading(self, context_ids: list[int], text_ids: list[int]) -> LikelihoodRequest:
        """The question, its context cut on the left to what there is room for."""
        room = self.context_length - len(text_ids)
        if not text_ids or room < 1:
            raise UserError(
                f"got a text of {len(text_ids)} tokens to read, expected one that fits the "
                f"student's context of {self.context_length} after at least one other"
            )
        return LikelihoodRequest(context_ids[-room:], text_ids)

    def writing(self, context_ids: list[int], wishes: dict[str, Any]) -> GenerationRequest:
        """The same of a text to be written; `wishes` are a task's `generation_kwargs`."""
        unknown = {k for k in wishes.keys() - _KNOWN if (k, wishes[k]) != ("num_beams", 1)}
        if unknown:
            raise UserError(
                f"got generation_kwargs {min(unknown)!r}, which data.engine cannot do; take it out "
                "in a task of your own"
            )
        samples = wishes.get("do_sample", wishes.get("temperature", 0) > 0)
        lengths = [int(wishes[name]) for name in _LENGTHS if wishes.get(name) is not None]
        sampling = Sampling(
            temperature=float(wishes.get("temperature", 1.0)) if samples else 0.0,
            top_p=float(wishes.get("top_p", 1.0)) if samples else 1.0,
            top_k=int(wishes.get("top_k", 0)) if samples else 0,
            max_new_tokens=lengths[0] if lengths else MAX_NEW_TOKENS,
        )
        room = self.context_length - sampling.max_new_tokens
        if room < 1:
            raise UserError(
                f"got answers of up to {sampling.max_new_tokens} tokens for the student's context "
                f"of {self.context_length}; set max_gen_toks in generation_kwargs of a task of "
                "your own"
            )
        until = wishes.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        return GenerationRequest(context_ids[-room:], sampling, tuple(filter(None, stops)))
