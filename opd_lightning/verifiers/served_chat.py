"""A language model behind the chat completions API, and the messages that it is asked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

import httpx
from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opd_lightning.errors import RunStoppedError, UserError, reason_of

if TYPE_CHECKING:
    from opd_lightning.types import Prompt

KEY_VARIABLE = "OPD_JUDGE_KEY"
COLUMNS = ("answer", "privileged")  # columns of a row that a template may read
FIRST_PAUSE = 0.5  # seconds before a failed request is repeated; doubled each time
MOST_FAILED = 16  # consecutive requests that fail before the server counts as lost
_TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined)


class FailedError(Exception):
    """A request has no reply, for a reason outside of what it asks about."""


class ServedChat:
    """Requests to a served model at temperature 0; those that fail are repeated.

    Args:
        owner: Class that asks; named in errors.
        url: Address up to and without `/v1`.
        model: Name under which the model is served.
        max_tokens: Length limit of a reply.
        max_requests: Requests in flight.
        timeout_seconds: Time limit of a request.
    """

    def __init__(
        self,
        owner: str,
        url: str,
        model: str,
        *,
        max_tokens: int,
        max_requests: int,
        timeout_seconds: float,
    ) -> None:
        for name, value in {"max_tokens": max_tokens, "max_requests": max_requests}.items():
            if value < 1:
                raise UserError(f"{owner}: {name!r} must be at least 1, got {value}")
        self.owner = owner
        self.url = url.rstrip("/")
        self.model = model
        self.max_tokens = max_tokens
        self.max_requests = max_requests
        self.timeout_seconds = timeout_seconds
        self._has_answered = False
        self._failed = 0  # consecutive requests of the last calls

    def note_call(self, asked: int, failures: Sequence[str]) -> None:
        """Count the failures of a call of `asked` requests.

        Raises:
            RunStoppedError: None has ever succeeded, or the last `MOST_FAILED` have all failed. A
                call may be of a single response that is too long for the model.
        """
        if len(failures) < asked:
            self._has_answered, self._failed = True, 0
        elif failures:
            self._failed += asked
            if not self._has_answered or self._failed >= MOST_FAILED:
                raise RunStoppedError(
                    f"{self.owner}: {self.url}: no request succeeded: {failures[0]}"
                )

    def check(self) -> None:
        """Raise `UserError`, once, unless the server has the model."""
        if "_served" in self.__dict__:
            return
        if self.model not in self._served:
            raise UserError(
                f"{self.owner}.model: got {self.model!r}, but {self.url} serves "
                f"{', '.join(self._served) or 'nothing'}; correct the name"
            )

    @cached_property
    def _served(self) -> list[str]:
        """Return the names of the models that the server has."""
        client = self._client
        try:
            answer = client.get("/v1/models")
            if answer.status_code in (401, 403):
                raise UserError(
                    f"{self.owner}.url: {self.url} answered {answer.status_code}, so the key is "
                    f"missing or wrong; set {KEY_VARIABLE}"
                )
            answer.raise_for_status()
            return [str(model["id"]) for model in answer.json()["data"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.owner}.url: {self.url}/v1/models gives no list of models "
                f"({reason_of(error, 120)}); start the server, or correct it"
            ) from error

    @cached_property
    def _client(self) -> httpx.Client:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if key and not (key.isascii() and key.isprintable()):  # httpx's error would show it
            raise UserError(f"{KEY_VARIABLE}: expected the key alone, in one line of ASCII")
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=self.timeout_seconds,
            limits=httpx.Limits(max_connections=self.max_requests),
            trust_env=False,  # no proxies: they must not see the key
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings without connections."""
        return {name: value for name, value in self.__dict__.items() if name != "_client"}

    def ask(
        self, text: str, end: float, max_tokens: int | None = None, **more: Any
    ) -> Mapping[str, Any]:
        """Return the reply's choice, `message` and `logprobs`; repeat until `end` what fails.

        Args:
            text: The user message.
            end: Time of the monotonic clock.
            max_tokens: Length limit of this reply.
            more: Further fields of the request.

        Raises:
            FailedError: There is no reply.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens or self.max_tokens,
            "seed": 0,
            **more,
        }
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
                raise FailedError(f"status {error.response.status_code}: {text}") from error
            except httpx.HTTPError as error:
                reason = reason_of(error, 150)
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise FailedError("its reply is no chat completion") from error
            sleep(max(0.0, min(pause, end - monotonic())))
            pause *= 2
        raise FailedError(reason)


class MessageTemplate:
    """Jinja text of a message, over given names and the columns of a row.

    Args:
        option: Setting that it is, such as "JudgeVerifier.question"; named in errors.
        text: The template.
        known: Names that it may read besides `COLUMNS`.
    """

    def __init__(self, option: str, text: str, known: set[str]) -> None:
        self._made_of = (option, text, known)
        self.option = option
        try:
            self.variables = meta.find_undeclared_variables(_TEMPLATES.parse(text))
            self._template = _TEMPLATES.from_string(text)
        except TemplateError as error:
            raise UserError(f"{option}: no Jinja template: {error}") from error
        if unknown := self.variables - known - set(COLUMNS):
            raise UserError(
                f"{option}: reads {min(unknown)!r}, expected one of "
                f"{', '.join(sorted(known | set(COLUMNS)))}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._made_of  # Jinja's templates cannot be pickled

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise `UserError` if a row lacks a column that is read."""
        for prompt in prompts:
            for name in sorted(self.variables & set(COLUMNS)):
                if getattr(prompt, name) is None:
                    raise UserError(
                        f"{prompt.origin or prompt.id}: no {name!r}, which {self.option} reads; "
                        "add the column or change the text"
                    )

    def need(self, name: str) -> None:
        """Raise `UserError` unless it reads a name."""
        if name not in self.variables:
            raise UserError(f"{self.option}: does not read the `{name}`; add it")

    def render(self, prompt: Prompt, **names: Any) -> str:
        """Return the message about a prompt, whose last user message is `question`."""
        asked = [message["content"] for message in prompt.messages if message["role"] == "user"]
        own = {name: getattr(prompt, name) for name in COLUMNS}
        try:
            return self._template.render(**{"question": asked[-1] if asked else "", **own, **names})
        except Exception as error:  # whatever the template's expressions raise
            raise RunStoppedError(
                f"{prompt.origin or prompt.id}: {self.option}: cannot be rendered: "
                f"{reason_of(error)}; correct the text"
            ) from error


def text_of(choice: Mapping[str, Any]) -> str:
    """Return the text of a reply; raise `FailedError` if it has none."""
    message = choice.get("message")
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, str):
        raise FailedError("its reply has no text")
    return content
