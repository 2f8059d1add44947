"""Views of prompts, and their token ids: the text before a response that is sampled or scored."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from opd_lightning.data.recorded import RecordedTexts
from opd_lightning.errors import UserError, reason_of
from opd_lightning.models.bounded import bounded
from opd_lightning.models.chat import dropped_roles, render, render_all, why_not_rendered
from opd_lightning.types import Message, Prompt

log = logging.getLogger(__name__)

_TEMPLATES = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)


class ResponseFacts(NamedTuple):
    """Values about a response that views may show, known only after verification."""

    attempt: str | None = None  # the response itself
    reward: float | None = None  # its score
    peer: str | None = None  # another response of the student's to the prompt that succeeded
    peer_failure: str | None = None  # one that failed
    feedback: str | None = None  # the verifier's, on this response


NO_FACTS = ResponseFacts()
# Names that a template may read, and those known only after verification.
LATE = frozenset(ResponseFacts._fields)
VARIABLES = frozenset({"question", "privileged", "answer", "response"}) | LATE
RESPONSES = frozenset({"attempt", "peer", "peer_failure"})  # limited by the sampling budget

_compiled = cache(_TEMPLATES.from_string)  # 0.5 ms a template

# The template may have opened the part, and the response may have been cut in it.
_THINKING = re.compile(r"\A(?:(?!<think>).)*?</think>\s*|<think>.*?(?:</think>\s*|\Z)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class PromptView:
    """A variant of the prompt for another reader, such as a privileged teacher.

    Args:
        template: Jinja text over `question` (the last user message), `privileged`, `answer` and
            `response` (columns of the row), and what is known of the row's response: `attempt`
            (its text), `reward` (its score, a number), `peer` and `peer_failure` (the student's
            first other response to the prompt that scores at least 0.5, or less) and `feedback`
            (the verifier's). If a template reads values of the response and none of them (`attempt`
            excluded) is known, or the text is too long for the models' context, the row lacks the
            view. Peers are shown without their <think> part.
        place: "system" makes the text a system message, after an existing one; "user" replaces
            the last user message, which the template may quote as `{{ question }}`. An empty
            text leaves the prompt unchanged.
        late_characters: Longest `attempt`, `peer`, `peer_failure` and `feedback`, of which the
            first so many characters are shown; None shows all.
    """

    template: str = "{{ privileged }}"
    place: Literal["system", "user"] = "system"
    late_characters: int | None = None

    def __post_init__(self) -> None:
        if self.late_characters is not None and self.late_characters < 1:
            raise UserError(
                f"data.views: late_characters is {self.late_characters}, expected at least 1"
            )
        try:
            unknown = self.variables - VARIABLES
        except (TemplateError, TimeoutError) as error:
            raise UserError(
                f"data.views: {self.template[:100]!r} is no Jinja template: {reason_of(error)}; "
                "correct it"
            ) from error
        if unknown:
            raise UserError(
                f"data.views: a template reads {min(unknown)!r}, expected one of "
                f"{', '.join(sorted(VARIABLES))}"
            )

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads."""
        # Bounded, since Jinja computes what is constant.
        tree = _TEMPLATES.parse(self.template)
        return frozenset(bounded(lambda: meta.find_undeclared_variables(tree)))

    @property
    def is_late(self) -> bool:
        """Return whether the view depends on the responses."""
        return bool(self.variables & LATE)

    @property
    def late_responses(self) -> int:
        """Return the number of texts of a response's length that the view may add to the prompt."""
        read = len(self.variables & RESPONSES)
        return read or int("feedback" in self.variables)

    def messages(
        self, prompt: Prompt, late: ResponseFacts = NO_FACTS
    ) -> tuple[Message, ...] | None:
        """Return the prompt's messages under this view; None if it has none."""
        shown = {name: self._shown(name, value) for name, value in late._asdict().items()}
        needed = self.variables & LATE - {"attempt"}
        if needed and all(shown[name] in (None, "") for name in needed):
            return None
        own = {name: getattr(prompt, name) for name in ("privileged", "answer", "response")}
        for name in sorted(self.variables & own.keys()):
            if own[name] is None:
                raise UserError(
                    f"{prompt.origin or prompt.id}: no {name!r}, which a view's template reads; "
                    "add the column or change data.views"
                )
        users = [i for i, message in enumerate(prompt.messages) if message["role"] == "user"]
        question = prompt.messages[users[-1]]["content"] if users else ""
        try:
            text = bounded(lambda: self._render(question=question, **own, **shown))
        except Exception as error:  # whatever the template's expressions raise
            raise UserError(
                f"{prompt.origin or prompt.id}: data.views: {self.template[:100]!r} cannot be "
                f"rendered: {why_not_rendered(error)}; correct it"
            ) from error
        return self._placed(text, prompt, users)

    def _shown(self, name: str, value: str | float | None) -> str | float | None:
        """Return a late value as templates read it."""
        if not isinstance(value, str):
            return value
        text = value if name in ("attempt", "feedback") else _THINKING.sub("", value)
        return text[: self.late_characters]

    def _render(self, **variables: str | float | None) -> str:
        return _compiled(self.template).render(**variables)

    def _placed(self, text: str, prompt: Prompt, users: Sequence[int]) -> tuple[Message, ...]:
        """Return the prompt's messages with the view's text; `users` are those of users."""
        if not text.strip():
            return prompt.messages
        if self.place == "user":
            if not users:
                raise UserError(
                    f"{prompt.origin or prompt.id}: no user message to put a view in; add one, or "
                    "set the view's place to system"
                )
            replaced: Message = {"role": "user", "content": text}
            return (*prompt.messages[: users[-1]], replaced, *prompt.messages[users[-1] + 1 :])
        first, *rest = prompt.messages
        if first["role"] == "system":
            return ({"role": "system", "content": f"{first['content']}\n\n{text}"}, *rest)
        return ({"role": "system", "content": text}, *prompt.messages)


class Renderer:
    """Renderer of prompts to token ids, under the student's view and under named views.

    Args:
        tokenizer: A tokenizer with a chat template (rendered in transformers' Jinja sandbox).
        template_args: Extra template variables, e.g. {"enable_thinking": False}.
        views: Views to render, by name.
        eos_ids: Token ids that end a recorded response.
        context_length: Largest number of tokens of a late view and its response; None: no limit.
        reads_records: Whether recorded responses are read.

    Views that depend on the prompt alone and recorded responses are kept, so that each is
    tokenised once in a run; 4 bytes a token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_args: dict[str, Any],
        views: Mapping[str, PromptView],
        eos_ids: Sequence[int],
        context_length: int | None = None,
        reads_records: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.eos_ids = eos_ids
        self.template_args = template_args
        self.views = views
        self.reads_records = reads_records
        # Ids from `prepare`, by `id(prompt)`; the prompt is held so that no other has the same id.
        self._ahead: dict[int, tuple[Prompt, list[int]]] = {}
        # By view and the prompt's id; the prompt is held, as a source may change what it has read.
        self._early: dict[tuple[str, str], tuple[Prompt, array[int]]] = {}
        self._recorded = RecordedTexts(tokenizer, template_args)
        # Index and role of messages that the template leaves out, by the roles of a chat.
        self._dropped: dict[tuple[str, ...], list[tuple[int, str]]] = {}

    @property
    def reads_feedback(self) -> bool:
        """Return whether a view's template reads the verifier's feedback."""
        return any("feedback" in view.variables for view in self.views.values())

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Tokenise together what `plain`, `view` and `recorded` will return for some prompts.

        What cannot be rendered is left to those, which raise the error.
        """
        plain = self._render_all([prompt.messages for prompt in prompts])
        self._ahead = {
            id(prompt): (prompt, ids)
            for prompt, ids in zip(prompts, plain, strict=True)
            if ids is not None
        }
        for name, view in self.views.items():
            seen: list[Prompt] = []
            chats: list[Sequence[Message]] = []
            for prompt in prompts if not view.is_late else ():
                with suppress(UserError):
                    chats.append(view.messages(prompt) or ())
                    seen.append(prompt)
            for prompt, ids in zip(seen, self._render_all(chats), strict=True):
                if ids is not None:
                    self._early[name, prompt.id] = prompt, array("i", ids)
        texts = [p for p in prompts if p.response_ids is None and p.response]
        if self.reads_records:
            self._recorded.prepare(texts)

    def _render_all(self, chats: Sequence[Sequence[Message]]) -> list[list[int] | None]:
        return render_all(chats, self.tokenizer, self.template_args)

    def plain(self, prompt: Prompt) -> list[int]:
        """Return the ids of the unmodified messages with the generation prompt."""
        _, ids = self._ahead.pop(id(prompt), (prompt, None))
        if ids is None:
            ids = render(prompt, self.tokenizer, self.template_args)
        self._check_shape(prompt)
        return ids

    def _check_shape(self, prompt: Prompt) -> None:
        """Refuse prompts whose question the template leaves out; warn of other messages, once."""
        shape = tuple(message["role"] for message in prompt.messages)
        if shape not in self._dropped:
            self._dropped[shape] = dropped_roles(prompt, self.tokenizer, self.template_args)
            others = [role for i, role in self._dropped[shape] if i < len(shape) - 1]
            if others:
                log.warning(
                    "%s: the student's chat template leaves out the %s message of chats of %s",
                    prompt.origin or prompt.id,
                    others[0],
                    ", ".join(shape),
                )
        if any(i == len(shape) - 1 for i, _ in self._dropped[shape]):
            raise UserError(
                f"{prompt.origin or prompt.id}: the student's chat template leaves out the last "
                f"message, of role {shape[-1]!r}; change the template (student.chat_template)"
            )

    def view(self, name: str, prompt: Prompt, late: ResponseFacts = NO_FACTS) -> list[int] | None:
        """Return the ids under a named view; None where the prompt has no such view."""
        view = self.views[name]
        if not view.is_late:
            held, kept = self._early.get((name, prompt.id), (None, None))
            if kept is not None and held == prompt:
                return kept.tolist()
        messages = view.messages(prompt, late)
        if messages is None:
            return None
        ids = render(prompt, self.tokenizer, self.template_args, messages)
        if not view.is_late:
            self._early[name, prompt.id] = prompt, array("i", ids)
        return ids

    def recorded(self, prompt: Prompt) -> list[int]:
        """Return the prompt's recorded response as the policy would have written it.

        Recorded ids are returned unchanged; a text is tokenised as it stands behind its prompt, and
        EOS is appended.
        """
        if prompt.response_ids is not None:
            return list(prompt.response_ids)
        if prompt.response is None:
            raise UserError(
                f"{prompt.origin}: no 'response' or 'response_ids' to learn from; add the column, "
                "or take data.mix.recorded and add_recorded away"
            )
        return self._recorded.ids_of(prompt)

    def is_too_long(self, name: str, ids: Sequence[int], response_ids: Sequence[int]) -> bool:
        """Return whether a late view with its response is longer than the context.

        The lengths of other views are checked before training.
        """
        if self.context_length is None or not self.views[name].is_late:
            return False
        return len(ids) + len(response_ids) > self.context_length
