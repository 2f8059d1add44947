"""Notes on responses, written by a served language model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TYPE_CHECKING

from opd_lightning.verifiers.base import Rewards, Verifier, check_time_limits
from opd_lightning.verifiers.served_chat import FailedError, MessageTemplate, ServedChat, text_of

if TYPE_CHECKING:
    from opd_lightning.types import Prompt

log = logging.getLogger(__name__)

NAMES = {"question", "response", "reward", "feedback"}


class Reflector(Verifier):
    """Verifier whose feedback is a note that a frozen, served model writes about each response.

    A view whose template reads `feedback` shows the note to its teacher: a second round of writing
    in every step, after the responses are scored. Without such a view nothing is asked. Scores,
    and answers for a majority vote, are those of `verifier`.

    The server speaks the chat completions API, as for `JudgeVerifier`; its key, if it needs one, is
    in the environment variable OPD_JUDGE_KEY. A response without a note (its requests fail until
    its time is over) has no feedback, so the row lacks the view; a step in which every request
    fails ends the run if none has succeeded before, or if at least 16 in a row have failed.

    Args:
        verifier: Scores the responses.
        url: Address up to and without `/v1`, such as `http://node3:8000`.
        model: Name under which the model is served.
        question: Jinja text of the user message, over `question` (the prompt's last user message),
            `response`, `reward` (the score, a number; NaN without one), `feedback` (that of
            `verifier`, or None), and `answer` and `privileged` (columns of the row).
        max_tokens: Length limit of a note.
        max_requests: Requests in flight.
        timeout_seconds: Time limit of one note, repeated requests included.
        step_seconds: Time limit of all notes of a step.
    """

    def __init__(
        self,
        verifier: Verifier,
        url: str,
        model: str,
        question: str,
        *,
        max_tokens: int = 512,
        max_requests: int = 64,
        timeout_seconds: float = 120.0,
        step_seconds: float = 1800.0,
    ) -> None:
        check_time_limits("Reflector", timeout_seconds=timeout_seconds, step_seconds=step_seconds)
        self.verifier = verifier
        self.chat = ServedChat(
            "Reflector",
            url,
            model,
            max_tokens=max_tokens,
            max_requests=max_requests,
            timeout_seconds=timeout_seconds,
        )
        self.question = MessageTemplate("Reflector.question", question, NAMES)
        self.question.need("response")
        self.timeout_seconds = timeout_seconds
        self.step_seconds = step_seconds
        self._rewards: dict[tuple[str, str], float] = {}  # by prompt id and response, of a call
        self._warned = False

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return self.score(prompts, responses).totals

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Rewards:
        rewards = self.verifier.score(prompts, responses)
        keys = ((prompt.id, text) for prompt, text in zip(prompts, responses, strict=True))
        self._rewards = dict(zip(keys, rewards.totals, strict=True))
        return rewards

    def feedback(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Sequence[str | None]:
        """Return the notes; None for a response without one.

        Raises:
            RunStoppedError: Every request failed, see `ServedChat.note_call`.
        """
        end = monotonic() + self.step_seconds
        known = self.verifier.feedback(prompts, responses)
        failures: list[str] = []

        def note(prompt: Prompt, response: str, feedback: str | None) -> str | None:
            asked = self.question.render(
                prompt,
                response=response,
                reward=self._rewards[prompt.id, response],
                feedback=feedback,
            )
            try:
                reply = self.chat.ask(asked, min(end, monotonic() + self.timeout_seconds))
                return text_of(reply).strip() or None
            except FailedError as error:
                failures.append(str(error))
                return None

        with ThreadPoolExecutor(self.chat.max_requests, "reflector") as pool:
            notes = list(pool.map(note, prompts, responses, known))
        self.chat.note_call(len(notes), failures)
        if failures and not self._warned:
            self._warned = True
            log.warning(
                "Reflector: %d of %d responses have no note (%s); further ones are not reported",
                len(failures),
                len(notes),
                failures[0],
            )
        return notes

    def answers(self, responses: Sequence[str]) -> Sequence[str | None] | None:
        return self.verifier.answers(responses)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise `UserError` if a row lacks a column that is read, or the server the model."""
        self.verifier.check(prompts)
        self.question.check(prompts)
        self.chat.check()
