"""Detection of repetition by compressibility (Stable-OPD, arXiv 2604.08527)."""

import zlib

TAIL_CHARACTERS = 10_000
MAX_COMPRESSION = 10.0


def is_repetitive(text: str) -> bool:
    """Return whether the last 10,000 characters compress more than tenfold; False if shorter."""
    if len(text) < TAIL_CHARACTERS:
        return False
    tail = text[-TAIL_CHARACTERS:].encode()
    return len(tail) / len(zlib.compress(tail)) > MAX_COMPRESSION
