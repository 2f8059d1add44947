"""Chat templates: messages to token ids or text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Thread, local
from typing import Any, TypeVar

from opd_lightning.errors import UserError, reason_of
from opd_lightning.types import Message, Prompt

TIME_LIMIT = 20.0  # seconds to render one conversation; a template may loop for years
_BATCH = 256  # conversations rendered in one call

Rendered = TypeVar("Rendered")


def render(
    prompt: Prompt,
    tokenizer: Any,
    template_args: dict[str, Any],
    messages: Sequence[Message] | None = None,
    role: str = "student",
) -> list[int]:
    """Render a prompt's messages to token ids, up to the start of the reply.

    Args:
        prompt: Source of the messages; named in errors.
        tokenizer: A tokenizer with a chat template (rendered in transformers' Jinja sandbox).
        template_args: Extra template variables, e.g. {"enable_thinking": False}.
        messages: Messages to render instead of the prompt's.
        role: Model that the tokenizer belongs to; named in errors.
    """
    try:
        ids = _within_time(
            lambda: tokenizer.apply_chat_template(
                list(messages or prompt.messages),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **template_args,
            )
        )
    except Exception as error:  # whatever the template's expressions raise
        raise UserError(
            f"{prompt.origin or prompt.id}: the {role}'s chat template refuses the messages: "
            f"{_reason(error)}; change the row or the template"
        ) from error
    return list(ids)


def render_all(
    chats: Sequence[Sequence[Message]], tokenizer: Any, template_args: dict[str, Any]
) -> list[list[int] | None]:
    """Render many chats to token ids, each up to the start of its reply.

    `_BATCH` of them in one call, which takes a fraction of the time of `render` for each.

    Args:
        chats: Messages of every chat.
        tokenizer: A tokenizer with a chat template.
        template_args: Extra template variables.

    Returns:
        Token ids of every chat; None for those of a call that failed, of which `render` says why.
    """
    found: list[list[int] | None] = []
    for start in range(0, len(chats), _BATCH):
        batch = [list(messages) for messages in chats[start : start + _BATCH]]
        found += _render_batch(batch, tokenizer, template_args) or [None] * len(batch)
    return found


def _render_batch(
    chats: list[list[Message]], tokenizer: Any, template_args: dict[str, Any]
) -> list[list[int]] | None:
    if not all(chats):  # transformers refuses an empty chat, but not among others
        return None
    try:
        return _within_time(
            lambda: tokenizer.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **template_args,
            )
        )
    except Exception:  # whatever the template's expressions raise
        return None


def dropped_roles(
    prompt: Prompt, tokenizer: Any, template_args: dict[str, Any]
) -> list[tuple[int, str]]:
    """Return index and role of the messages whose content a chat template leaves out.

    Contents are replaced by words of their own, so the answer is one of roles and their order.
    """
    words = [f"content{i}of{len(prompt.messages)}" for i in range(len(prompt.messages))]
    probe: list[Message] = [
        {"role": message["role"], "content": word}
        for message, word in zip(prompt.messages, words, strict=True)
    ]
    text = render_text(probe, tokenizer, template_args)
    return [(i, probe[i]["role"]) for i, word in enumerate(words) if word not in text]


def render_text(
    messages: Sequence[Message],
    tokenizer: Any,
    template_args: dict[str, Any],
    *,
    continues: bool = False,
) -> str:
    """Render messages to text, up to the reply, or with `continues` inside the last turn."""
    try:
        text = _within_time(
            lambda: tokenizer.apply_chat_template(
                list(messages),
                add_generation_prompt=not continues,
                continue_final_message=continues,
                tokenize=False,
                **template_args,
            )
        )
    except Exception as error:  # whatever the template's expressions raise
        raise UserError(
            f"the student's chat template refuses the messages: {_reason(error)}; leave out "
            "apply_chat_template, or change the template"
        ) from error
    return str(text)


class _Worker:
    """A thread that renders one conversation after another for one calling thread.

    Nothing stops Jinja, so a thread that is late goes on until the process ends, and is replaced.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self._results: SimpleQueue[tuple[Any, Exception | None]] = SimpleQueue()
        self._thread = Thread(target=self._work, name="chat template", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False in a forked process, which inherits no thread."""
        return self._thread.is_alive()

    def run(self, function: Callable[[], Rendered]) -> Rendered:
        """Return the result of `function`, or raise its exception; `queue.Empty` if it is late."""
        self._calls.put(function)
        result, error = self._results.get(timeout=TIME_LIMIT)
        if error is not None:
            raise error
        return result

    def _work(self) -> None:
        while True:
            function = self._calls.get()
            try:
                self._results.put((function(), None))
            except Exception as error:
                self._results.put((None, error))


_workers = local()


def _within_time(function: Callable[[], Rendered]) -> Rendered:
    """Return the result of `function`, or raise TimeoutError after `TIME_LIMIT`."""
    worker: _Worker | None = getattr(_workers, "worker", None)
    if worker is None or not worker.is_alive:
        worker = _workers.worker = _Worker()
    try:
        return worker.run(function)
    except Empty:
        del _workers.worker
        raise TimeoutError(f"it takes more than {TIME_LIMIT:g} s to render") from None


def _reason(error: Exception) -> str:
    """Return the message of an error, with its class where that says more."""
    from jinja2 import TemplateError

    known = isinstance(error, TemplateError | TimeoutError)
    return reason_of(error) if known else f"{type(error).__name__}: {reason_of(error)}"
