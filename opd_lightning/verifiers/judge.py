"""Scores of responses by a served language model."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import httpx
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.verifiers.base import Verifier, check_scale, check_time_limits
from opd_lightning.verifiers.patterns import Pattern

if TYPE_CHECKING:
    from opd_lightning.types import Prompt

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPD_JUDGE_KEY"
TOP_LOGPROBS = 20  # the most that the API gives
FIRST_PAUSE = 0.5  # seconds before a failed request is repeated; doubled each time
_TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
_COLUMNS = ("answer", "privileged")  # of a row, where a template reads them


class JudgeVerifier(Verifier):
    """Verifier that asks a served model for a score.

    The server speaks the chat completions API (vLLM, SGLang, llama.cpp and hosted models do). Its
    key, if it needs one, is in the environment variable OPD_JUDGE_KEY. Several criteria are several
    judges under `WeightedVerifier`.

    A reply without a score gives no reward: the response is counted as `response/unverified`, and
    so is one whose requests fail until its time is over. A call in which every request fails ends
    the run.

    Args:
        url: Address up to and without `/v1`, such as `http://node3:8000`.
        model: Name under which the model is served.
        question: Jinja text of the user message, over `question` (the prompt's last user message),
            `response`, `rubric`, and `answer` and `privileged` (columns of the row).
        scale: Scores that count as 0 and as 1. Others than those between them are no scores.
        pattern: Regular expression of the score in the reply; the last match, its group 1, counts.
        choices: Score of each of some replies of one token, such as {"yes": 1, "no": 0}. The score
            is then their mean under the model's probabilities, and `pattern` is not used.
        rubric: Jinja text over `question`, `answer` and `privileged` that the model is asked once
            per prompt; `question` reads its reply as `rubric`.
        max_tokens: Length limit of a reply. With `choices` it is 1.
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
        pattern: str = r"(-?\d+(?:\.\d+)?)",
        choices: dict[str, float] | None = None,
        rubric: str | None = None,
        max_tokens: int = 1024,
        max_requests: int = 64,
        timeout_seconds: float = 120.0,
        step_seconds: float = 1800.0,
    ) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.zero, self.one = scale
        self.choices = choices or {}
        self.max_tokens = 1 if choices else max_tokens
        self.max_requests = max_requests
        self.timeout_seconds = timeout_seconds
        self.step_seconds = step_seconds
        check_time_limits(
            "JudgeVerifier", timeout_seconds=timeout_seconds, step_seconds=step_seconds
        )
        self._check_numbers()
        self.question = _Template("question", question, {"question", "response", "rubric"})
        self.rubric = None if rubric is None else _Template("rubric", rubric, {"question"})
        if (self.rubric is None) == ("rubric" in self.question.variables):
            what = "no rubric is set" if self.rubric is None else "does not read the rubric"
            raise UserError(f"JudgeVerifier.question: {what}; set both or neither")
        self.pattern = Pattern(
            "JudgeVerifier", pattern, timeout_seconds=timeout_seconds, step_seconds=step_seconds
        )
        self._rubrics: dict[str, str] = {}  # by id of the prompt
        self._writing: dict[str, threading.Lock] = {}
        self._warned = False

    def verify(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the scores; NaN without one.

        Raises:
            RunStoppedError: Every request failed.
        """
        end = monotonic() + self.step_seconds
        failures: list[str] = []

        def score(prompt: Prompt, response: str) -> float:
            own_end = min(end, monotonic() + self.timeout_seconds)
            try:
                return self._score(prompt, response, own_end)
            except _FailedError as error:
                failures.append(str(error))
                return math.nan

        for prompt in prompts:
            self._writing.setdefault(prompt.id, threading.Lock())
        with ThreadPoolExecutor(self.max_requests, "judge") as pool:
            scores = list(pool.map(score, prompts, responses))
        if failures and len(failures) == len(scores):
            raise RunStoppedError(f"JudgeVerifier: {self.url}: no request succeeded: {failures[0]}")
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
        templates = [self.question, *([self.rubric] if self.rubric else [])]
        read = {name for template in templates for name in template.variables}
        for prompt in prompts:
            for name in sorted(read & set(_COLUMNS)):
                if getattr(prompt, name) is None:
                    raise UserError(
                        f"{prompt.origin or prompt.id}: no {name!r}, which the judge's question "
                        "reads; add the column or change the question"
                    )
        self._check_server()

    def _check_server(self) -> None:
        if "_served" in self.__dict__:
            return
        if self.model not in self._served:
            raise UserError(
                f"JudgeVerifier.model: got {self.model!r}, but {self.url} serves "
                f"{', '.join(self._served) or 'nothing'}; correct the name"
            )

    @cached_property
    def _served(self) -> list[str]:
        """Return the names of the models that the server has."""
        try:
            answer = self._client.get("/v1/models")
            answer.raise_for_status()
            return [str(model["id"]) for model in answer.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"JudgeVerifier.url: {self.url}/v1/models gives no list of models "
                f"({str(error)[:120] or type(error).__name__}); start the server, or correct it"
            ) from error

    @cached_property
    def _client(self) -> httpx.Client:
        key = os.environ.get(KEY_VARIABLE)
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.timeout_seconds,
            limits=httpx.Limits(max_connections=self.max_requests),
            trust_env=False,  # no proxies: they must not see the key
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings without connections and locks."""
        own = {**self.__dict__, "_writing": {}}
        own.pop("_client", None)
        return own

    def _score(self, prompt: Prompt, response: str, end: float) -> float:
        names = {"question": _last_question(prompt), **{c: getattr(prompt, c) for c in _COLUMNS}}
        if self.rubric is not None:
            with self._writing[prompt.id]:
                if prompt.id not in self._rubrics:
                    asked = self.rubric.render(names)
                    self._rubrics[prompt.id] = _text(self._ask(asked, end, self.max_tokens))
            names["rubric"] = self._rubrics[prompt.id]
        reply = self._ask(self.question.render({**names, "response": response}), end)
        return self._of_choices(reply) if self.choices else self._of_text(_text(reply))

    def _of_text(self, text: str) -> float:
        """Return the last score in a reply; NaN if there is none on the scale."""
        (found,) = self.pattern.last([text])
        try:
            score = (float(str(found)) - self.zero) / (self.one - self.zero)
        except ValueError:  # no match, or no number
            return math.nan
        return score if 0 <= score <= 1 else math.nan

    def _of_choices(self, reply: Mapping[str, Any]) -> float:
        """Return the mean score of the choices under the first token's probabilities."""
        try:
            listed = reply["logprobs"]["content"][0]["top_logprobs"]
            told = [(str(one["token"]).strip(), math.exp(one["logprob"])) for one in listed]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _FailedError("its reply has no log-probs") from error
        chosen = [(self.choices[token], p) for token, p in told if token in self.choices]
        total = sum(p for _, p in chosen)
        if not total:
            return math.nan
        mean = sum(score * p for score, p in chosen) / total
        return (mean - self.zero) / (self.one - self.zero)

    def _ask(self, text: str, end: float, max_tokens: int | None = None) -> Mapping[str, Any]:
        """Return the reply's choice, `message` and `logprobs`; repeat until `end` what fails."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens or self.max_tokens,
            "seed": 0,
        }
        if self.choices and max_tokens is None:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        pause, reason = FIRST_PAUSE, "its time was over before it was asked"
        while (left := end - monotonic()) > 0:
            try:
                answer = self._client.post("/v1/chat/completions", json=body, timeout=left)
                if answer.status_code < 500 and answer.status_code not in (408, 429):
                    answer.raise_for_status()
                    choice: Mapping[str, Any] = answer.json()["choices"][0]
                    return choice
                reason = f"status {answer.status_code}"
            except httpx.HTTPStatusError as error:
                text = " ".join(error.response.text.split())[:150]
                raise _FailedError(f"status {error.response.status_code}: {text}") from error
            except httpx.HTTPError as error:
                reason = str(error)[:150] or type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise _FailedError("its reply is no chat completion") from error
            sleep(max(0.0, min(pause, end - monotonic())))
            pause *= 2
        raise _FailedError(reason)

    def _check_numbers(self) -> None:
        for name, value in {
            "max_tokens": self.max_tokens,
            "max_requests": self.max_requests,
        }.items():
            if value < 1:
                raise UserError(f"JudgeVerifier: {name!r} must be at least 1, got {value}")
        check_scale("JudgeVerifier", self.zero, self.one)
        low, high = sorted((self.zero, self.one))
        for token, score in self.choices.items():
            if not low <= score <= high:
                raise UserError(
                    f"JudgeVerifier.choices: {token!r} has the score {score}, expected {low:g} to "
                    f"{high:g}, as in `scale`"
                )


class _FailedError(Exception):
    """A response could not be scored, for a reason outside of the response."""


class _Template:
    """Jinja text of a message to the judge."""

    def __init__(self, name: str, text: str, known: set[str]) -> None:
        self._made_of = (name, text, known)
        try:
            self.variables = meta.find_undeclared_variables(_TEMPLATES.parse(text))
            self._template = _TEMPLATES.from_string(text)
        except TemplateError as error:
            raise UserError(f"JudgeVerifier.{name}: no Jinja template: {error}") from error
        if unknown := self.variables - known - set(_COLUMNS):
            raise UserError(
                f"JudgeVerifier.{name}: reads {min(unknown)!r}, expected one of "
                f"{', '.join(sorted(known | set(_COLUMNS)))}"
            )
        if name == "question" and "response" not in self.variables:
            raise UserError("JudgeVerifier.question: does not read the `response`; add it")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of  # Jinja's templates cannot be pickled

    def render(self, names: Mapping[str, Any]) -> str:
        try:
            return self._template.render(**names)
        except TemplateError as error:
            raise RunStoppedError(
                f"JudgeVerifier: a template cannot be rendered: {error}"
            ) from error


def _last_question(prompt: Prompt) -> str:
    asked = [message["content"] for message in prompt.messages if message["role"] == "user"]
    return asked[-1] if asked else ""


def _text(choice: Mapping[str, Any]) -> str:
    message = choice.get("message")
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, str):
        raise _FailedError("its reply has no text")
    return content
