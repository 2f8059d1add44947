"""Output on terminals and pipes whose encoding lacks characters of a response."""

from __future__ import annotations

import io
import sys


def escape_unknown_characters() -> None:
    """Let stdout escape what its encoding lacks, as stderr does, instead of raising an error."""
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out.errors == "strict":
        out.reconfigure(errors="backslashreplace")
