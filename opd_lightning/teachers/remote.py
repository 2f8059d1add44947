"""Teacher on vLLM servers, on this machine or others."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opd_lightning.errors import UserError
from opd_lightning.models.head import TopLogprobs
from opd_lightning.serving.client import Servers
from opd_lightning.serving.generation import PATH
from opd_lightning.serving.scoring import WHOLE_VOCABULARY, Answer, ScoreRequest, concatenate
from opd_lightning.serving.served_model import ServedModel
from opd_lightning.teachers.base import TopKTeacher
from opd_lightning.types import Prompt, Rollout, RolloutBatch, TokenScores

if TYPE_CHECKING:
    from opd_lightning.models.student import Student


class RemoteTeacher(TopKTeacher):
    """Frozen model on servers: `opd serve --model PATH`, or vLLM's own server.

    One request per rollout, sent concurrently and distributed over the servers. All requests of a
    step are sent before its first micro-batch is trained on. Returns log-probs at temperature 1 of
    the sampled tokens, of the top k tokens and of given ids; the entropy is unknown.

    Args:
        path: Folder or hub name of the model that the servers have. Tokenizer and configuration
            are read from it, and the weights' identity unless `served_model` is set.
        servers: Addresses, such as http://127.0.0.1:8000, or address files written by `opd serve
            --address_file`, which are waited for.
        key_file: File with the servers' key; None takes the environment variable OPD_SERVER_KEY.
        patience: Seconds to wait for servers or their address files, before and during training.
        timeout: Seconds that one request may take.
        served_model: Name of the model at servers that `opd serve` did not start (vLLM's need
            `--tokens-only`). The identity of the weights is then not checked.
        trust_remote_code: Run code that ships with the model's tokenizer or configuration.
        chat_template: Jinja text or file that the teacher is taken to expect, instead of the
            folder's. Prompts are always rendered with the student's.
        eos_tokens: Tokens that end a response, instead of the folder's.
    """

    scores_given_ids = True
    provides_entropy = False
    source: ServedModel

    def __init__(
        self,
        path: str,
        servers: list[str],
        key_file: str | None = None,
        patience: float = 600.0,
        timeout: float = 600.0,
        served_model: str | None = None,
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        eos_tokens: list[str] | None = None,
    ) -> None:
        self.servers = Servers(servers, key_file=key_file, patience=patience, timeout=timeout)
        self.source = ServedModel(
            path,
            self.servers,
            name=served_model,
            trust_remote_code=trust_remote_code,
            role="teacher",
            chat_template=chat_template,
            eos_tokens=eos_tokens,
        )
        self._by_id = False
        self._pending: dict[tuple[int, str, int], _Pending] = {}

    def check(self, prompts: Sequence[Prompt], temperature: float) -> None:
        if temperature != 1:
            raise UserError(
                f"data.sampling.temperature: got {temperature}, but servers tell a prompt's "
                "log-probs at temperature 1 alone, whatever they are asked; set it to 1, or use a "
                "teacher in this process"
            )
        # Waits for the servers and raises UserError for other models.
        _ = self.source.context_length
        self._post_all(by_id=False)

    def load(self, device: torch.device, student: Student) -> None:
        self.release()  # an exception may have left requests of a step
        try:
            self._post_all(by_id=True)
        except UserError:  # vLLM's first model runner
            self._by_id = False
        else:
            self._by_id = True

    def prefetch(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> None:
        """Send requests that are not in flight yet; `score` waits for the answers."""
        new = {
            (id(rollout), view, top_k): (rollout, count)
            for rollout, count in _scored(batch)
            if (id(rollout), view, top_k) not in self._pending
        }
        futures = self._send([self._request(*row, view, top_k) for row in new.values()])
        for (key, (rollout, _)), future in zip(new.items(), futures, strict=True):
            self._pending[key] = _Pending(rollout, future)

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        return self.score_top(batch, view, top_k=top_k)[0]

    def score_top(
        self, batch: RolloutBatch, view: str, *, top_k: int, ids: Tensor | None = None
    ) -> tuple[TokenScores, TopLogprobs]:
        rows = _scored(batch)
        if ids is None:
            self.prefetch(batch, view, top_k=top_k)
            futures = [self._pending[id(rollout), view, top_k].answer for rollout, _ in rows]
        else:
            self._check_can_score_ids()
            parts = np.split(ids.cpu().numpy(), np.cumsum([count for _, count in rows])[:-1])
            futures = self._send(
                [
                    self._request(rollout, count, view, top_k, part)
                    for (rollout, count), part in zip(rows, parts, strict=False)
                ]
            )
        given = 0 if ids is None else ids.shape[1]
        answer = concatenate([future.result() for future in futures], self._width(top_k), given)
        device = batch.response_ids.device
        logprobs, top_ids, top_logprobs, asked = (torch.from_numpy(x).to(device) for x in answer)
        unknown = torch.full_like(logprobs, torch.nan)
        scores = TokenScores.unflatten((logprobs, unknown, top_ids, top_logprobs), batch)
        known = TopLogprobs(top_ids, top_logprobs) if ids is None else TopLogprobs(ids, asked)
        return scores, known

    def release(self) -> None:
        """Cancel the step's pending requests and discard its answers."""
        for pending in self._pending.values():
            pending.answer.cancel()
        self._pending.clear()

    def close(self) -> None:
        self.release()
        self.servers.close()

    def _request(
        self,
        rollout: Rollout,
        count: int,
        view: str,
        top_k: int,
        given_ids: np.ndarray | None = None,
    ) -> ScoreRequest:
        # A row without this view uses the student's prompt, as in `data/collate.py`.
        prompt = (None if view == "student" else rollout.views[view]) or rollout.prompt_ids
        sequence = [*prompt, *rollout.response_ids[:count]]
        return ScoreRequest(
            sequence, len(prompt), self._width(top_k), given_ids, self._by_id, self._vocabulary
        )

    def _send(self, requests: Sequence[ScoreRequest]) -> list[Future[Answer]]:
        bodies = [request.body(self.source.identity) for request in requests]
        return self.servers.submit(PATH, bodies, [request.read for request in requests])

    def _post_all(self, *, by_id: bool) -> None:
        """Ask each server once for the log-prob of a token, and check its answer."""
        request = ScoreRequest([0, 0], 1, 0, None, by_id, self._vocabulary)
        self.servers.post_all(PATH, request.body(self.source.identity), request.read)

    def _width(self, top_k: int) -> int:
        return min(top_k, self._vocabulary)

    @property
    def _vocabulary(self) -> int:
        return int(self.source.config.get_text_config().vocab_size)

    def _check_can_score_ids(self) -> None:
        if not self._by_id and self._vocabulary > WHOLE_VOCABULARY:
            raise UserError(
                "teacher: its servers cannot tell the log-probs of given ids, which takes vLLM's "
                f"second model runner (a GPU, Triton) at a vocabulary of {self._vocabulary}; set "
                "the divergence's support to 'teacher'"
            )


class _Pending(NamedTuple):
    rollout: Rollout  # referenced, so that its id() is not reused
    answer: Future[Answer]


def _scored(batch: RolloutBatch) -> list[tuple[Rollout, int]]:
    """Return the rollouts that have response tokens, with their number."""
    counts = batch.response_mask.sum(dim=1).tolist()
    return [(row, n) for row, n in zip(batch.rollouts, counts, strict=True) if n]
