"""Tokenizer, configuration and stop tokens of a Hugging Face model, without its weights."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from opd_lightning.errors import UserError
from opd_lightning.models.hub import hub_unavailable
from opd_lightning.models.identity import model_identity


class ModelSource:
    """Model folder or hub name with its tokenizer, configuration and stop tokens.

    Args:
        path: Folder with config.json, weights and tokenizer, or a hub name.
        trust_remote_code: Run code that ships with the model.
        role: Use of the model ("student", "teacher"); named in error messages.

    Files are read on first use, not at construction.
    """

    def __init__(self, path: str, *, trust_remote_code: bool = False, role: str = "model") -> None:
        self.path = path
        self.trust_remote_code = trust_remote_code
        self.role = role

    @cached_property
    def config(self) -> Any:
        """Transformers configuration."""
        from transformers import AutoConfig

        return self._load(AutoConfig)

    @cached_property
    def tokenizer(self) -> Any:
        """Fast tokenizer, which must have a chat template and an EOS token."""
        from transformers import AutoTokenizer

        return self._load(AutoTokenizer)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response: EOS of the tokenizer and of the generation config."""
        from transformers import GenerationConfig

        ids = {self.tokenizer.eos_token_id}
        try:
            listed = GenerationConfig.from_pretrained(
                self.path, local_files_only=self.local_files_only
            ).eos_token_id
        except OSError:  # the model has no generation_config.json
            listed = None
        ids |= set(listed if isinstance(listed, list) else [listed])
        return tuple(sorted(i for i in ids if i is not None))

    @cached_property
    def identity(self) -> str:
        """Identity of the weights, independent of their location; see `model_identity`."""
        return model_identity(self.path)

    @property
    def pad_id(self) -> int:
        """Padding id; EOS if the tokenizer has none, since masked ids are never read."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.eos_ids[0]

    @property
    def context_length(self) -> int:
        """Maximum number of tokens, prompt and response, that the model supports."""
        return int(self.config.get_text_config().max_position_embeddings)

    @property
    def local_files_only(self) -> bool:
        """Whether a hub name has to be read from the cache, since the hub does not answer."""
        return not Path(self.path).is_dir() and hub_unavailable() is not None

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
            return auto_class.from_pretrained(
                self.path,
                trust_remote_code=self.trust_remote_code,
                local_files_only=self.local_files_only,
            )
        except (OSError, ValueError) as error:
            if self.local_files_only:
                raise UserError(
                    f"{self.role} model: {self.path!r} is neither a folder here nor in the model "
                    f"hub's cache, and {hub_unavailable()}; give the path of a model folder, or "
                    "download the model first"
                ) from error
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{self.role} model: cannot read {self.path!r}: {reason}") from error
