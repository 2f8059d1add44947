"""Scores of responses by a served language model."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import TYPE_CHECKING, Any

from opd_lightning.errors import UserError
from opd_lightning.verifiers.base import Verifier, check_scale, check_time_limits
from opd_lightning.verifiers.patterns import Pattern
from opd_lightning.verifiers.served_chat import FailedError, MessageTemplate, ServedChat, text_of

if TYPE_CHECKING:
    from opd_lightning.types import Prompt

log = logging.getLogger(__name__)

TOP_LOGPROBS = 20  # the most that the API gives
NUMBER = r"(-?\d+(?:\.\d+)?)"


class JudgeVerifier(Verifier):
    """Verifier that asks a served model for a score.

    The server implements the chat completions API (as vLLM, SGLang, llama.cpp and hosted models
    do). Its key, if it needs one, is in the environment variable OPD_JUDGE_KEY. Several criteria
    are several judges under `WeightedVerifier`.

    A reply without a score gives no reward: the response is counted as `response/unverified`, and
    so is one whose requests fail until its time is over. A call in which every request fails ends
    the run if none has succeeded before, or if at least 16 in a row have failed.

    Args:
        url: Address up to and without `/v1`, such as `http://node3:8000`.
        model: Name under which the model is served.
        question: Jinja text of the user message, over `question` (the prompt's last user message),
            `response`, `rubric`, and `answer` and `privileged` (columns of the row).
        scale: Scores that count as 0 and as 1. Values outside the range are not accepted.
        pattern: Regular expression of the score in the reply; the last match, its group 1, counts.
            The default finds numbers; 8/10 and "8 out of 10" are 8 if 10 is the end of the scale.
        choices: Score of each of some replies of one token, such as {"yes": 1, "no": 0}. The score
            is then their mean under the model's probabilities, and `pattern` is not used.
        rubric: Jinja text over `question`, `answer` and `privileged` that the model is asked once
            per prompt; `question` reads its reply as `rubric`.
        max_tokens: Length limit of a reply, and of a rubric; 1 token with `choices`.
        max_requests: Requests in flight.
        timeout_seconds: Time limit of one response, repeated requests included.
        step_seconds: Time limit of all responses of a call, which are those of a step.
    """

    def __init__(
        self,
        url: str,
        model: str,
        question: str,
        *,
        scale: tuple[float, float] = (0.0, 1.0),
        pattern: str = NUMBER,
        choices: dict[str, float] | None = None,
        rubric: str | None = None,
        max_tokens: int = 1024,
        max_requests: int = 64,
        timeout_seconds: float = 120.0,
        step_seconds: float = 1800.0,
    ) -> None:
        self.zero, self.one = scale
        self.choices = choices or {}
        self.step_seconds = step_seconds
        self.timeout_seconds = timeout_seconds
        check_time_limits(
            "JudgeVerifier", timeout_seconds=timeout_seconds, step_seconds=step_seconds
        )
        self.chat = ServedChat(
            "JudgeVerifier",
            url,
            model,
            max_tokens=max_tokens,
            max_requests=max_requests,
            timeout_seconds=timeout_seconds,
        )
        self._check_numbers()
        self.question = MessageTemplate(
            "JudgeVerifier.question", question, {"question", "response", "rubric"}
        )
        self.question.need("response")
        self.rubric = (
            None
            if rubric is None
            else MessageTemplate("JudgeVerifier.rubric", rubric, {"question"})
        )
        if (self.rubric is None) == ("rubric" in self.question.variables):
            what = "no rubric is set" if self.rubric is None else "does not read the rubric"
            raise UserError(f"JudgeVerifier.question: {what}; set both or neither")
        self.pattern = Pattern(
            "JudgeVerifier", pattern, timeout_seconds=timeout_seconds, step_seconds=step_seconds
        )
        self._end = _end_of_scale(max(scale)) if pattern == NUMBER else None
        # By what the model is asked: ids of prompts are unique in their file only.
        self._rubrics: dict[str, str] = {}
        self._writing: dict[str, threading.Lock] = {}
        self._warned = False

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the scores; NaN without one.

        Raises:
            RunStoppedError: Every request failed, see `ServedChat.note_call`.
        """
        end = monotonic() + self.step_seconds
        failures: list[str] = []

        def score(prompt: Prompt, response: str) -> float:
            own_end = min(end, monotonic() + self.timeout_seconds)
            try:
                return self._score(prompt, response, own_end)
            except FailedError as error:
                failures.append(str(error))
                return math.nan

        with ThreadPoolExecutor(self.chat.max_requests, "judge") as pool:
            scores = list(pool.map(score, prompts, responses))
        self.chat.note_call(len(scores), failures)
        missing = sum(map(math.isnan, scores))
        if missing and not self._warned:
            self._warned = True
            log.warning(
                "JudgeVerifier: %d of %d responses have no score (%s); further ones are counted "
                "as response/unverified",
                missing,
                len(scores),
                failures[0] if failures else "the replies hold none between those of `scale`",
            )
        return scores

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise `UserError` if a row lacks a column that is read, or the server the model."""
        for template in (self.question, self.rubric):
            if template is not None:
                template.check(prompts)
        self.chat.check()

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings without locks."""
        return {**self.__dict__, "_writing": {}}

    def _score(self, prompt: Prompt, response: str, end: float) -> float:
        names = {"response": response}
        if self.rubric is not None:
            asked = self.rubric.render(prompt)
            with self._writing.setdefault(asked, threading.Lock()):
                if asked not in self._rubrics:
                    self._rubrics[asked] = text_of(self.chat.ask(asked, end))
            names["rubric"] = self._rubrics[asked]
        asked = self.question.render(prompt, **names)
        if not self.choices:
            return self._of_text(text_of(self.chat.ask(asked, end)))
        more = {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return self._of_choices(self.chat.ask(asked, end, 1, **more))

    def _of_text(self, text: str) -> float:
        """Return the last score in a reply; NaN if there is none on the scale."""
        (found,) = self.pattern.last([text if self._end is None else self._end.sub("", text)])
        try:
            score = self._scaled(float(str(found)))
        except ValueError:  # no match, or no number
            return math.nan
        return score if 0 <= score <= 1 else math.nan

    def _of_choices(self, reply: Mapping[str, Any]) -> float:
        """Return the mean score of the choices under the first token's probabilities."""
        try:
            listed = reply["logprobs"]["content"][0]["top_logprobs"]
            told = [(str(one["token"]).strip(), math.exp(one["logprob"])) for one in listed]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise FailedError("its reply has no log-probs") from error
        chosen = [
            (self._scaled(self.choices[token]), p) for token, p in told if token in self.choices
        ]
        total = sum(p for _, p in chosen)
        # Scaled before the mean, which then is in [0, 1] despite rounding.
        return sum(score * p for score, p in chosen) / total if total else math.nan

    def _scaled(self, score: float) -> float:
        """Map a score to [0, 1] by the scale."""
        return (score - self.zero) / (self.one - self.zero)

    def _check_numbers(self) -> None:
        check_scale("JudgeVerifier", self.zero, self.one)
        low, high = sorted((self.zero, self.one))
        for token, score in self.choices.items():
            if not low <= score <= high:
                raise UserError(
                    f"JudgeVerifier.choices: {token!r} has the score {score}, expected {low:g} to "
                    f"{high:g}, as in `scale`"
                )


def _end_of_scale(value: float) -> re.Pattern[str]:
    """Return a pattern of what tells the end of the scale after a score: /10, "out of 10"."""
    number = re.escape(f"{value:g}")
    # Bounded repetitions, so that a search takes linear time.
    return re.compile(rf"[\s*_]{{0,8}}(?:/|out of)[\s*_]{{0,8}}{number}(?:\.0)?(?!\.?\d)")
