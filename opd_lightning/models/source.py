"""A Hugging Face model as it is known before any weight is loaded."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from opd_lightning.errors import UserError
from opd_lightning.models.identity import model_identity


class ModelSource:
    """A model folder (or hub name): its tokenizer, configuration and stop tokens.

    Args:
        path: Folder with config.json, weights and tokenizer, or a hub name.
        trust_remote_code: Run code that ships with the model. Off unless asked for.
        role: What the model is for ("student", "teacher"); error messages name it.

    Everything is read on first use, so building one costs nothing.
    """

    def __init__(self, path: str, *, trust_remote_code: bool = False, role: str = "model") -> None:
        self.path = path
        self.trust_remote_code = trust_remote_code
        self.role = role

    @cached_property
    def config(self) -> Any:
        """The transformers configuration."""
        from transformers import AutoConfig

        return self._load(AutoConfig)

    @cached_property
    def tokenizer(self) -> Any:
        """The fast tokenizer; it must have a chat template and an EOS token."""
        from transformers import AutoTokenizer

        return self._load(AutoTokenizer)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a response: the tokenizer's EOS and the generation config's."""
        from transformers import GenerationConfig

        ids = {self.tokenizer.eos_token_id}
        try:
            listed = GenerationConfig.from_pretrained(self.path).eos_token_id
        except OSError:  # the model has no generation_config.json
            listed = None
        ids |= set(listed if isinstance(listed, list) else [listed])
        return tuple(sorted(i for i in ids if i is not None))

    @cached_property
    def identity(self) -> str:
        """What its weights are known by, wherever they are; see `model_identity`."""
        return model_identity(self.path)

    @property
    def pad_id(self) -> int:
        """Id used for padding; never read under a mask, so EOS serves when there is none."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.eos_ids[0]

    @property
    def context_length(self) -> int:
        """Most tokens (prompt and response together) the model was built for."""
        return int(self.config.get_text_config().max_position_embeddings)

    def _load(self, auto_class: Any) -> Any:
        folder = Path(self.path)
        is_local = folder.exists() or self.path.startswith((".", "~", "/"))
        # A hub name has one slash at most.
        if (is_local or self.path.count("/") > 1) and not (folder / "config.json").is_file():
            raise UserError(
                f"{self.role} model: no config.json in {self.path!r}; give a Hugging Face model "
                "folder or a hub name"
            )
        try:
            return auto_class.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.role} model: cannot read {self.path!r}: {reason}") from error
