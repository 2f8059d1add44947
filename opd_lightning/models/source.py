"""Tokenizer, configuration and stop tokens of a Hugging Face model, without its weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from opd_lightning.errors import UserError, is_panic, reason_of
from opd_lightning.models.folder import CONFIGURATION, TOKENIZER, check_texts
from opd_lightning.models.gguf import converted, gguf_file
from opd_lightning.models.hub import hub_unavailable
from opd_lightning.models.identity import model_identity

_TEMPLATE_BYTES = 2**20  # limit of a chat template; long ones have 2**15
_CONTEXT = ("max_position_embeddings", "max_seq_len", "seq_length")  # MPT's is the second


class ModelSource:
    """Model folder or hub name with its tokenizer, configuration and stop tokens.

    Args:
        path: Folder with config.json, weights and tokenizer, a hub name, or a GGUF file (or a
            folder with one and without config.json), which is converted on first use.
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
        self._given = os.path.expanduser(path)
        self.trust_remote_code = trust_remote_code
        self.role = role
        self.chat_template = chat_template
        self.eos_tokens = eos_tokens

    @cached_property
    def path(self) -> str:
        """Folder or hub name; of a GGUF file, the folder that it was converted to."""
        file = gguf_file(Path(self._given), self.role)
        return self._given if file is None else str(converted(file, self.role))

    @property
    def folder(self) -> Path | None:
        """Local folder; None if `path` is a hub name.

        Raises:
            UserError: `path` can be neither.
        """
        folder = Path(self.path)
        is_local = folder.exists() or self.path.startswith((".", "~", "/"))
        # A hub name has one slash at most.
        if not is_local and self.path.count("/") <= 1:
            return None
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{self.role} model: no config.json in {self.path!r}; give a Hugging Face model "
                "folder, a GGUF file or a hub name"
            )
        return folder

    @cached_property
    def config(self) -> Any:
        """Transformers configuration."""
        from transformers import AutoConfig

        return self._load(AutoConfig, CONFIGURATION)

    @cached_property
    def tokenizer(self) -> Any:
        """Fast tokenizer, which must have a chat template and an EOS token."""
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer, TOKENIZER)
        if self.chat_template is not None:
            tokenizer.chat_template = self._template(self.chat_template)
        if self.eos_tokens is not None:
            self._check_eos_tokens(self.eos_tokens, tokenizer)
            tokenizer.eos_token = self.eos_tokens[0]
        return tokenizer

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response: `eos_tokens`, or EOS of tokenizer and generation config.

        Without a generation_config.json those of config.json count, as for `generate` and vLLM.
        """
        from transformers import GenerationConfig

        if self.eos_tokens is not None:
            return tuple(sorted(self.tokenizer.convert_tokens_to_ids([*self.eos_tokens])))
        if folder := self.folder:
            check_texts(folder, ("generation_config.json",), self.role)
        file = "generation_config.json"
        configured = getattr(self.config.get_text_config(), "eos_token_id", None)
        if isinstance(configured, list | tuple) and not configured:
            self._checked_eos_ids(configured, "config.json")  # also where it is not read
        try:
            listed = GenerationConfig.from_pretrained(
                self.path, local_files_only=self.local_files_only
            ).eos_token_id
        except OSError:  # the model has no generation_config.json
            file, listed = "config.json", configured
        except Exception as error:  # its own checks of the values
            raise UserError(
                f"{self.role} model: cannot read {self.path!r}: generation_config.json: "
                f"{reason_of(error)}"
            ) from error
        own = self.tokenizer.eos_token_id
        ids = [] if own is None else [own]
        if listed is not None:
            ids += self._checked_eos_ids(listed, file)
        return tuple(sorted({*ids}))

    @cached_property
    def identity(self) -> str:
        """Identity of the weights, independent of their location; see `model_identity`."""
        return model_identity(self.path)

    @property
    def pad_id(self) -> int:
        """Padding id; 0 if the tokenizer has none that can be embedded: masked ids are not read."""
        pad = self.tokenizer.pad_token_id
        if pad is None:
            return self.eos_ids[0]
        return pad if pad < self.config.get_text_config().vocab_size else 0

    @property
    def context_length(self) -> int:
        """Maximum number of tokens, prompt and response, that the model supports.

        `sys.maxsize` for architectures without positions, such as Mamba and Bloom.

        Raises:
            UserError: The configuration names something else than a number of tokens.
        """
        config = self.config.get_text_config()
        for name in _CONTEXT:
            limit = getattr(config, name, None)
            if limit is None:
                continue
            if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
                raise UserError(
                    f"{self.role} {self.path!r}: {name} in config.json: got {limit!r}, expected a "
                    "number of tokens; get the file again"
                )
            return limit
        return sys.maxsize

    @property
    def local_files_only(self) -> bool:
        """Return whether a hub name must be read from the cache because the hub does not answer."""
        return self.folder is None and hub_unavailable() is not None

    def _template(self, given: str) -> str:
        """Return the text of a chat template that is given as text or as a file."""
        if "{" in given:
            return given
        file = Path(os.path.expanduser(given))
        try:
            size = file.stat().st_size
            if file.is_file() and size <= _TEMPLATE_BYTES:
                return file.read_text(encoding="utf-8")
            reason: str | None = f"it has {size} bytes" if size else "it is no file"
        except (OSError, ValueError) as error:  # not UTF-8, or a null in the name
            reason = error.strerror if isinstance(error, OSError) else reason_of(error)
        raise UserError(
            f"{self.role}.chat_template: cannot read {given[:100]!r}: {reason}; give a Jinja file "
            "or its text"
        )

    def _check_eos_tokens(self, tokens: Sequence[str], tokenizer: Any) -> None:
        known = tokenizer.get_vocab()
        unknown = [token for token in tokens if token not in known]
        if not tokens or unknown:
            got = f"{unknown[0]!r}, which is no token" if unknown else "none"
            raise UserError(
                f"{self.role}.eos_tokens: got {got} of {self.path!r}, expected tokens that end a "
                "response, such as the chat template's end of a turn"
            )

    def _checked_eos_ids(self, listed: Any, file: str) -> Sequence[int]:
        """Return the ids of `file`, a list of them or a single one."""
        ids = listed if isinstance(listed, list | tuple) else [listed]
        size = self.config.get_text_config().vocab_size
        if not ids or not all(type(i) is int and 0 <= i < size for i in ids):
            raise UserError(
                f"{self.role} {self.path!r}: eos_token_id in {file}: got {listed!r}, expected a "
                f"token id or a list of them, 0 to {size - 1}; remove the line if there is none"
            )
        return ids

    def _load(self, auto_class: Any, files: tuple[str, ...]) -> Any:
        """Read what `auto_class` reads, from `files` if the model is a local folder."""
        if folder := self.folder:
            check_texts(folder, files, self.role)
        try:
            return auto_class.from_pretrained(
                self.path,
                trust_remote_code=self.trust_remote_code,
                local_files_only=self.local_files_only,
            )
        except BaseException as error:  # from three libraries, some of which raise Exception itself
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            if self.local_files_only:
                raise UserError(
                    f"{self.role} model: {self.path!r} is neither a folder here nor in the model "
                    f"hub's cache, and {hub_unavailable()}; give the path of a model folder, or "
                    "download the model first"
                ) from error
            reason = f"{files[0]}: {reason_of(error)}" if folder else reason_of(error)
            raise UserError(f"{self.role} model: cannot read {self.path!r}: {reason}") from error
