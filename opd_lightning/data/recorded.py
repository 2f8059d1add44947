"""Token ids of recorded texts, as a policy would have written them after their prompts."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from opd_lightning.models.chat import ChatTemplateError, template_text
from opd_lightning.types import Message, Prompt

_PROBE = "recorded"  # the word between a prompt and what ends its turn
_SPACES = ("\u2581", "\u0120")  # a space in tokens of SentencePiece and byte-level tokenizers


class RecordedTexts:
    """Encoder of responses that are given as texts; EOS is appended.

    A chat template may put whitespace between prompt and response, which a policy writes itself,
    and some tokenizers begin every text with a space, which a policy would not write inside of one.
    A response is then encoded together with its prompt.

    Args:
        tokenizer: A tokenizer with a chat template.
        template_args: Extra template variables.

    Ids are kept for every prompt, 4 bytes a token.
    """

    def __init__(self, tokenizer: Any, template_args: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.template_args = template_args
        # By `id(prompt)`, since ids of prompts are unique in their file only; the prompt is held so
        # that no other has the same.
        self._known: dict[int, tuple[Prompt, array[int]]] = {}

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Encode the responses of some prompts together, which is faster."""
        end = self.tokenizer.eos_token_id
        for prompt, ids in zip(prompts, self._encode(prompts), strict=True):
            self._known[id(prompt)] = prompt, array("i", [*ids, end])

    def ids_of(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt's response."""
        if id(prompt) not in self._known:
            self.prepare([prompt])
        return self._known[id(prompt)][1].tolist()

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the ids of the response of every prompt, without EOS."""
        texts = [prompt.response or "" for prompt in prompts]
        if not self._needs_prompt:
            return self._ids(texts)
        try:
            fronts = [self._text(prompt.messages) for prompt in prompts]
        except ChatTemplateError:  # what is wrong is said where the prompt is rendered
            return self._ids(texts)
        behind = [self._seam + text for text in texts]
        alone, before = self._ids(behind), self._ids(fronts)
        both = self._ids([front + text for front, text in zip(fronts, behind, strict=True)])
        return [
            # A token may reach over the end of the prompt: then there are no ids of the response.
            whole[len(front) :] if whole[: len(front)] == front else ids
            for front, whole, ids in zip(before, both, alone, strict=True)
        ]

    @cached_property
    def _seam(self) -> str:
        """Whitespace of the chat template between prompt and response."""
        chat: list[Message] = [{"role": "user", "content": _PROBE}]
        said: Message = {"role": "assistant", "content": _PROBE}
        try:
            prompt = self._text(chat)
            whole = template_text([*chat, said], self.tokenizer, self.template_args, "message")
        except ChatTemplateError:  # such as one that expects other roles
            return ""
        seam, found, _ = whole.removeprefix(prompt).partition(_PROBE)
        return seam if found and whole.startswith(prompt) and not seam.strip() else ""

    @cached_property
    def _needs_prompt(self) -> bool:
        """Return whether the ids of a response depend on what is in front of it."""
        (ids,) = self._ids([_PROBE])
        first = self.tokenizer.convert_ids_to_tokens(ids)[:1]
        return bool(self._seam) or bool(first and first[0].startswith(_SPACES))

    def _text(self, messages: Sequence[Message]) -> str:
        return template_text(messages, self.tokenizer, self.template_args)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer([*texts], add_special_tokens=False)["input_ids"]
        return ids
