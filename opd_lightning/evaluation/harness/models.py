"""The model that lm-eval asks. Imports lm-eval, so import this late."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from opd_lightning.evaluation.harness.requests import (
    GenerationRequest,
    LikelihoodRequest,
    RequestEncoder,
)
from opd_lightning.models.chat import render_text
from opd_lightning.types import Message

Likelihood = tuple[float, bool]  # nats; whether the text is what a greedy model writes


class RecordingModel(TemplateLM):
    """Notes what it is asked and hands in a blank sheet.

    Contexts and texts become tokens as in lm-eval's own models of transformers.
    """

    def __init__(self, reader: RequestEncoder) -> None:
        super().__init__()
        self.reader = reader
        self.tokenizer = reader.tokenizer
        self.likelihood_requests: list[LikelihoodRequest] = []
        self.parts: list[int] = []  # of each text that is read in windows: their number
        self.generation_requests: list[GenerationRequest] = []
        self.shortened = 0  # questions whose context was too long

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        """The turns as text; a last one that is begun is to be gone on with."""
        return render_text(
            chat_history,
            self.tokenizer,
            self.reader.template_args,
            continues=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Its tokens; whatever the tokenizer puts before every text comes once."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return list(ids)

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[Likelihood]:
        count = len(self.likelihood_requests)
        for _, context, text in requests:
            self.likelihood_requests.append(self.reader.reading(context, text))
            self.shortened += len(self.likelihood_requests[-1].context_ids) < len(context)
        return [(-1.0, False)] * (len(self.likelihood_requests) - count)

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
        """Of whole texts, in windows as long as the context where they are longer.

        The last token of a window needs a place of its own here, which lm-eval spares.
        """
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.reader.context_length - 1,
                context_len=1,
            )
            found = [self.reader.reading(*make_disjoint_window(window)) for window in windows]
            self.likelihood_requests += found
            self.parts.append(len(found))
        return [-1.0] * len(requests)

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        for request in requests:
            context, wishes = request.args
            ids = self.tok_encode(context)
            self.generation_requests.append(self.reader.writing(ids, wishes))
            self.shortened += len(self.generation_requests[-1].context_ids) < len(ids)
        return [""] * len(requests)


class AnsweringModel(RecordingModel):
    """Hands in what was answered, in the order of the questions.

    Args:
        asked: Who noted them.
        likelihoods: Of its likelihood_requests.
        texts: Of its generation_requests, cut.
    """

    def __init__(
        self, asked: RecordingModel, likelihoods: Iterable[Likelihood], texts: Iterable[str]
    ) -> None:
        super().__init__(asked.reader)
        self._likelihoods = iter(likelihoods)
        self._texts = iter(texts)
        self._parts = iter(asked.parts)

    def loglikelihood(self, requests: Sequence[Any], **kwargs: Any) -> list[Likelihood]:
        return list(islice(self._likelihoods, len(requests)))

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
        counts = islice(self._parts, len(requests))
        return [sum(nats for nats, _ in islice(self._likelihoods, count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        return list(islice(self._texts, len(requests)))
