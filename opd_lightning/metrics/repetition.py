"""Detection of repetition: compressibility of a text's end, and repeated 3-grams of its tokens."""

import zlib
from collections.abc import Sequence

TAIL_CHARACTERS = 10_000
MAX_COMPRESSION = 10.0


def is_repetitive(text: str) -> bool:
    """Return whether the last 10,000 characters compress more than tenfold; False if shorter.

    Stable-OPD's measure (2604.08527).
    """
    if len(text) < TAIL_CHARACTERS:
        return False
    tail = text[-TAIL_CHARACTERS:].encode()
    return len(tail) / len(zlib.compress(tail)) > MAX_COMPRESSION


def repeated_trigrams(ids: Sequence[int]) -> float:
    """Return the share of a response's 3-grams of tokens that occurred in it before.

    Many Faces' measure (2605.11182); for responses of any length, 0 below three tokens.
    """
    if len(ids) < 3:
        return 0.0
    return 1 - len({*zip(ids, ids[1:], ids[2:], strict=False)}) / (len(ids) - 2)
