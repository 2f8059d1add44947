"""Checks of single prompts against what reads them, made while a prompt file is read."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from opd_lightning.types import Prompt
from opd_lightning.verifiers.base import Verifier

Check = Callable[[Prompt], object]


class RowChecks:
    """What a prompt has to pass to be used, and its token ids.

    Args:
        tokenizer: The student's, which reads all texts of a row.
        verifier: Verifier that must be able to score the responses; None if there is none.
        render: Returns the token ids of a prompt; raises `UserError` if there are none.
        fits: Raises `UserError` if a prompt, with these ids, does not fit its readers.
    """

    def __init__(
        self,
        tokenizer: Any,
        verifier: Verifier | None,
        render: Callable[[Prompt], list[int]],
        fits: Callable[[Prompt, list[int]], None],
    ) -> None:
        self.tokenizer = tokenizer
        self.verifier = verifier
        self.render = render
        self.fits = fits
        self.ids: dict[str, list[int]] = {}  # by id of the prompt

    def steps(self) -> Iterator[tuple[str, Check]]:
        """Yield the checks in order, each with what is wrong with a row that fails it."""
        if self.verifier is not None:
            verifier = self.verifier
            yield "the verifier cannot use", lambda prompt: verifier.check([prompt])
        yield "the chat template refuses", self._render
        yield "do not fit the models", lambda prompt: self.fits(prompt, self.ids[prompt.id])

    def run(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Check prompts that are of no file, and return their token ids.

        Their ids as prompts need not be unique. Raises `UserError` at the first that fails.
        """
        ids = []
        for prompt in prompts:
            for _, check in self.steps():
                check(prompt)
            ids.append(self.ids[prompt.id])
        return ids

    def ids_of(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the token ids of prompts of a file that have passed."""
        return [self.ids[prompt.id] for prompt in prompts]

    def _render(self, prompt: Prompt) -> None:
        self.ids[prompt.id] = self.render(prompt)

    # Texts ----------------------------------------------------------------------------------

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        """Matches the texts of control tokens, such as the end of a turn."""
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special}
        texts |= {*self.tokenizer.all_special_tokens}
        longest_first = sorted((text for text in texts if text), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def control_token(self, prompt: Prompt) -> str | None:
        """Return a control token that a text of the row holds and would become; else None."""
        if self._control is None:
            return None
        found = (self._control.search(text) for text in texts_of(prompt))
        return next((match[0] for match in found if match), None)

    def ordinary(self, text: str) -> str:
        """Return the text without control tokens."""
        return text if self._control is None else self._control.sub("", text)

    def escaped(self, text: str) -> str:
        """Return the text with a space inside of what would become a control token."""
        if self._control is None:
            return text
        return self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def lacking(self, characters: set[str]) -> set[str]:
        """Return the visible characters that the tokenizer reads as unknown, or leaves out."""
        seen = [c for c in sorted(characters) if unicodedata.category(c)[0] not in "CMZ"]
        if not seen:
            return set()
        unknown = self.tokenizer.unk_token_id
        rows = self.tokenizer(seen, add_special_tokens=False)["input_ids"]
        return {c for c, ids in zip(seen, rows, strict=True) if not ids or unknown in ids}


def texts_of(prompt: Prompt) -> list[str]:
    """Return all texts of a row that a model reads."""
    texts = [message["content"] for message in prompt.messages]
    return [*texts, *(text for text in (prompt.response, prompt.privileged) if text)]
