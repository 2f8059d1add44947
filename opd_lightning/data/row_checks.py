"""Checks of single prompts against verifier, template and models, while a file is read."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from opd_lightning.data.views import Renderer
from opd_lightning.types import Prompt
from opd_lightning.verifiers.base import Verifier

Check = Callable[[Prompt], object]


@dataclass(eq=False, repr=False)
class RowChecks:
    """Checks that a prompt must pass, and the token ids of those that did.

    Args:
        renderer: The student's, whose tokenizer reads all texts of a row.
        verifier: Verifier that must be able to score the responses; None if there is none.
        fits: Raises `UserError` if a prompt, with these ids, does not fit its readers.
    """

    renderer: Renderer
    verifier: Verifier | None
    fits: Callable[[Prompt, list[int]], None]
    # With token ids, by the prompt's id.
    _passed: dict[str, tuple[Prompt, list[int]]] = field(default_factory=dict, init=False)

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Tokenise prompts together that are checked next."""
        self.renderer.prepare(prompts)

    def steps(self) -> Iterator[tuple[str, Check]]:
        """Yield the checks in order, each with the reason that is counted for failing rows."""
        if self.verifier is not None:
            verifier = self.verifier
            yield "the verifier cannot use", lambda prompt: verifier.check([prompt])
        yield "the chat template refuses", self._render
        yield "do not fit the models", lambda prompt: self.fits(prompt, self._passed[prompt.id][1])

    def run(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Check prompts that come from no file, and return their token ids.

        `Prompt.id` need not be unique. Raises the `UserError` of the first failing check.
        """
        ids = []
        self.prepare(prompts)
        for prompt in prompts:
            for _, check in self.steps():
                check(prompt)
            ids.append(self._passed[prompt.id][1])
        return ids

    def ids_of(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the token ids of a source's prompts, which have passed while they were read.

        Those that the source has changed since, or added, are checked now.
        """
        ids = []
        for prompt in prompts:
            passed, tokens = self._passed.get(prompt.id, (None, []))
            ids += [tokens] if passed == prompt else self.run([prompt])
        return ids

    def _render(self, prompt: Prompt) -> None:
        self._passed[prompt.id] = prompt, self.renderer.plain(prompt)

    # Texts ----------------------------------------------------------------------------------

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Pattern of the texts of control tokens, such as the end of a turn."""
        added = self.renderer.tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if token.special}
        texts |= {*self.renderer.tokenizer.all_special_tokens}
        longest_first = sorted(filter(None, texts), key=len, reverse=True)
        # Without control tokens, a pattern that no text has.
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def control_token(self, prompt: Prompt) -> str | None:
        """Return a control token that a text of the row contains; None without one."""
        found = (self._control.search(text) for text in texts_of(prompt))
        return next((match[0] for match in found if match), None)

    def without_control(self, text: str) -> str:
        """Return the text with control tokens removed."""
        return self._control.sub("", text)

    def escaped(self, text: str) -> str:
        """Return the text with a space inside each control token, which makes it plain text."""
        return self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def unreadable(self, characters: set[str]) -> set[str]:
        """Return the visible characters that the tokenizer drops or maps to the unknown token."""
        visible = [c for c in sorted(characters) if unicodedata.category(c)[0] not in "CMZ"]
        if not visible:
            return set()
        unknown = self.renderer.tokenizer.unk_token_id
        rows = self.renderer.tokenizer(visible, add_special_tokens=False)["input_ids"]
        return {c for c, ids in zip(visible, rows, strict=True) if not ids or unknown in ids}


def texts_of(prompt: Prompt) -> list[str]:
    """Return all texts of a row that a model reads."""
    texts = [message["content"] for message in prompt.messages]
    return [*texts, *(text for text in (prompt.response, prompt.privileged) if text)]
