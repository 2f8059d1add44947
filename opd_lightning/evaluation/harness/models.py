"""Models for lm-eval. This module imports lm-eval, so import it late."""

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

Likelihood = tuple[float, bool]  # nats; whether greedy decoding would generate the text


class RecordingModel(TemplateLM):
    """Model that records all requests and returns placeholder answers.

    Contexts and texts become tokens as in lm-eval's models for transformers.
    """

    def __init__(self, encoder: RequestEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.likelihood_requests: list[LikelihoodRequest] = []
        self.window_counts: list[int] = []  # windows of each text that is read in windows
        self.generation_requests: list[GenerationRequest] = []
        self.shortened = 0  # requests whose context was too long

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Token id before a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        """Render the turns as text; without a generation prompt, the last turn is continued."""
        return render_text(
            chat_history,
            self.tokenizer,
            self.encoder.template_args,
            "reply" if add_generation_prompt else "open",
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text without duplicating a BOS token that it begins with."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return list(ids)

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[Likelihood]:
        count = len(self.likelihood_requests)
        for _, context, text in requests:
            self.likelihood_requests.append(self.encoder.likelihood_request(context, text))
            self.shortened += len(self.likelihood_requests[-1].context_ids) < len(context)
        return [(-1.0, False)] * (len(self.likelihood_requests) - count)

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
        """Record whole texts, split into windows of the context length.

        Unlike in lm-eval, a window's last token takes up a position of the context.
        """
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.encoder.context_length - 1,
                context_len=1,
            )
            found = [
                self.encoder.likelihood_request(*make_disjoint_window(window)) for window in windows
            ]
            self.likelihood_requests += found
            self.window_counts.append(len(found))
        return [-1.0] * len(requests)

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        for request in requests:
            context, generation_kwargs = request.args
            ids = self.tok_encode(context)
            self.generation_requests.append(self.encoder.generation_request(ids, generation_kwargs))
            self.shortened += len(self.generation_requests[-1].context_ids) < len(ids)
        return [""] * len(requests)


class AnsweringModel(RecordingModel):
    """Model that returns given answers, in the order of the requests.

    Args:
        recorded: Model that recorded the requests.
        likelihoods: Answers to its likelihood_requests.
        texts: Answers to its generation_requests, cut at stop strings.
    """

    def __init__(
        self, recorded: RecordingModel, likelihoods: Iterable[Likelihood], texts: Iterable[str]
    ) -> None:
        super().__init__(recorded.encoder)
        self._likelihoods = iter(likelihoods)
        self._texts = iter(texts)
        self._window_counts = iter(recorded.window_counts)

    def loglikelihood(self, requests: Sequence[Any], **kwargs: Any) -> list[Likelihood]:
        return list(islice(self._likelihoods, len(requests)))

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
        counts = islice(self._window_counts, len(requests))
        return [sum(nats for nats, _ in islice(self._likelihoods, count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        return list(islice(self._texts, len(requests)))
