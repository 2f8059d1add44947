"""Tokenizer, configuration and stop tokens of a Hugging Face model, without its weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
        chat_template: Jinja text, or a file of it, used instead of the folder's; None keeps that.
        eos_tokens: Tokens that end a response, used instead of the folder's; the first of them
            ends recorded responses. None keeps the folder's.

    Files are read on first use, not at construction. `~` in paths is the home folder.
    """

    def __init__(
        self,
        path: str,
        *,
        trust_remote_code: bool = False,
        role: str = "model",
        chat_template: str | None = None,
        eos_tokens: Sequence[str] | None = None,
    ) -> None:
        self.path = os.path.expanduser(path)
        self.trust_remote_code = trust_remote_code
        self.role = role
        self.chat_template = chat_template
        self.eos_tokens = eos_tokens

    @cached_property
    def config(self) -> Any:
        """Transformers configuration."""
        from transformers import AutoConfig

        return self._load(AutoConfig)

    @cached_property
    def tokenizer(self) -> Any:
        """Fast tokenizer, which must have a chat template and an EOS token."""
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer)
        if self.chat_template is not None:
            tokenizer.chat_template = self._template(self.chat_template)
        if self.eos_tokens is not None:
            self._check_eos_tokens(self.eos_tokens, tokenizer)
            tokenizer.eos_token = self.eos_tokens[0]
        return tokenizer

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response: `eos_tokens`, or EOS of tokenizer and generation config."""
        from transformers import GenerationConfig

        if self.eos_tokens is not None:
            return tuple(sorted(self.tokenizer.convert_tokens_to_ids([*self.eos_tokens])))

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

    def _template(self, given: str) -> str:
        """Return the text of a chat template that is given as text or as a file."""
        if "{" in given:
            return given
        file = Path(given).expanduser()
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise UserError(
                f"{self.role}.chat_template: cannot read {given!r}: {reason}; give a Jinja file or "
                "its text"
            ) from error

    def _check_eos_tokens(self, tokens: Sequence[str], tokenizer: Any) -> None:
        known = tokenizer.get_vocab()
        unknown = [token for token in tokens if token not in known]
        if not tokens or unknown:
            got = f"{unknown[0]!r}, which is no token" if unknown else "none"
            raise UserError(
                f"{self.role}.eos_tokens: got {got} of {self.path!r}, expected tokens that end a "
                "response, such as the chat template's end of a turn"
            )

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
