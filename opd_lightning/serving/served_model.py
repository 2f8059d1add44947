"""A model whose folder is here and whose weights are behind servers."""

from __future__ import annotations

from functools import cached_property

from opd_lightning.errors import UserError
from opd_lightning.models.identity import model_identity
from opd_lightning.models.source import ModelSource
from opd_lightning.serving.client import Servers


class ServedModel(ModelSource):
    """Tokenizer and configuration come from the folder, the room for sequences from the servers.

    Args:
        path: Model folder or hub name.
        servers: Who has the weights.
        name: What the servers call the model. None: started by `opd serve`, they call it by the
            identity of the weights in the folder.
        trust_remote_code: Run code that ships with the model.
        role: What the model is for; error messages name it.
    """

    def __init__(
        self,
        path: str,
        servers: Servers,
        *,
        name: str | None = None,
        trust_remote_code: bool = False,
        role: str = "model",
    ) -> None:
        super().__init__(path, trust_remote_code=trust_remote_code, role=role)
        self.servers = servers
        self._name = name

    @cached_property
    def name(self) -> str:
        """What every request must carry, so that a server of another model refuses it."""
        return self._name or model_identity(self.path)

    @property
    def identity(self) -> str:
        """The servers' word for it: the weights may not be here."""
        return self.name

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence that is scored: the server must have room to write one more."""
        return min(super().context_length, self.room - 1)

    @cached_property
    def room(self) -> int:
        """Tokens that fit every server. Waits for them, and refuses one that has another model."""
        rooms = []
        answers = self.servers.read("/v1/models")
        for url, answer in zip(self.servers.urls, answers, strict=True):
            served = {model["id"]: model for model in answer["data"]}
            if self.name not in served:
                raise UserError(
                    f"{self.role}: {url} serves {' and '.join(served) or 'nothing'}, expected "
                    f"{self.name} ({self.path!r}); start it with that model, or give the folder "
                    "of the model that it serves"
                )
            rooms.append(int(served[self.name].get("max_model_len") or super().context_length))
        return min(rooms)
