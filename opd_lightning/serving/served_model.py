"""A model with a local folder and with weights on servers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource
from opd_lightning.serving.answers import field, of_kind
from opd_lightning.serving.client import Servers


class ServedModel(ModelSource):
    """Model source with tokenizer and configuration from a folder, context length from servers.

    Args:
        path: Model folder or hub name.
        servers: Servers that have the weights.
        name: Name of the model at the servers. None takes the identity of the weights in the
            folder, as servers started by `opd serve` do.
        trust_remote_code: Run code that ships with the model.
        role: Purpose of the model, named in error messages.
        chat_template: As for `ModelSource`.
        eos_tokens: As for `ModelSource`.
    """

    def __init__(
        self,
        path: str,
        servers: Servers,
        *,
        name: str | None = None,
        trust_remote_code: bool = False,
        role: str = "model",
        chat_template: str | None = None,
        eos_tokens: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            path,
            trust_remote_code=trust_remote_code,
            role=role,
            chat_template=chat_template,
            eos_tokens=eos_tokens,
        )
        self.servers = servers
        self._name = name

    @cached_property
    def identity(self) -> str:
        """Model name that every request carries, so that a server of another model refuses it."""
        return self._name or super().identity

    @property
    def context_length(self) -> int:
        """Longest sequence to score, in tokens: the server must be able to generate one more."""
        return min(super().context_length, self.max_model_len - 1)

    @cached_property
    def max_model_len(self) -> int:
        """Context length of all servers. Waits for them; raises UserError for another model."""
        lengths = []
        answers = self.servers.get_all("/v1/models", _context_lengths)
        for url, served in zip(self.servers.urls, answers, strict=True):
            if self.identity not in served:
                raise UserError(
                    f"{self.role}: {url} serves {' and '.join(served) or 'nothing'}, expected "
                    f"{self.identity} ({self.path!r}); start it with that model, or give the "
                    "folder of the model that it serves"
                )
            lengths.append(served[self.identity] or super().context_length)
        return min(lengths)


def _context_lengths(answer: Any) -> dict[str, int | None]:
    """Return the context length of each model by name; None if a server does not report it."""
    lengths: dict[str, int | None] = {}
    for model in field(answer, "data", list):
        length = of_kind(model, "data", dict).get("max_model_len")
        if length is not None and of_kind(length, "max_model_len", int) < 2:
            raise ValueError(f"max_model_len: got {length}, expected at least 2")
        lengths[field(model, "id", str)] = length
    return lengths
