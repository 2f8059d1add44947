"""jsonargparse's YAML loader, which refuses what `config_files` refuses.

Every text that a parser takes for YAML passes here: files that options name in place of settings,
those that such files name, and values of the command line.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from opd_lightning.commands.config_files import check_text
from opd_lightning.errors import UserError

_load = get_loader("yaml")
# Most texts are single words, in which there is nothing to refuse; a run's parser reads each value
# several times.
_WORD = re.compile(r"[A-Za-z0-9_/][A-Za-z0-9_./+-]*")
_load_word = lru_cache(1000)(_load)


def load(text: str) -> Any:
    """Load a text.

    Raises:
        TypeError: It repeats a key, contains itself, or is nested too deeply. Parsers add the name
            of the option.
        yaml.YAMLError: The text is not YAML, so it may be a plain value; or it is YAML that is
            almost certainly a mistake, such as "#1" (null) or "?" (a null key).
    """
    if _WORD.fullmatch(text):
        return _load_word(text)
    try:
        check_text("YAML", text)
    except UserError as error:
        raise TypeError(str(error)) from error
    try:
        value = _load(text)
    except TypeError as error:  # jsonargparse's loader, of a key that is no text
        raise yaml.YAMLError("a key that is no text") from error
    if value is None and "\n" not in text and text.strip().lower() not in ("", "~", "null"):
        raise yaml.YAMLError("a comment, a mark or an anchor without a value")
    return value


set_loader("yaml", load, (yaml.YAMLError,))
