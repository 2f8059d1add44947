"""Tokens as bytes, and two tokenizations of one text.

Models with different tokenizers share nothing but the text. Their tokens are compared in groups,
between the bytes where both tokenizations end a token (ULD, 2402.12030; TRL's GOLD trainer).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource

_PROBE = "two words,\n\n  1+1=2; (and) so on?"
_SPACE = "\u2581"  # SentencePiece's
_SENTENCE_PIECE = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}  # steps of its decoders
UNFINISHED = "\ufffd"  # what decoders write for a part of a character
_BATCH = 4096  # texts in one call; what comes back is large
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Group(NamedTuple):
    """The shortest runs of tokens, one on each side, that spell the same bytes."""

    student: range
    teacher: range


def align(student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> list[Group]:
    """Groups of token positions that end at the same byte, in order, covering every token.

    Where the two do not spell the same bytes, as when a tokenizer normalises characters or puts a
    space in front of the text, the stretch from the first difference to the last is one group.
    There are no groups if one side has no tokens.

    Args:
        student_tokens: The bytes of each token of the response. A character of several bytes may
            be split among tokens; a token without bytes belongs to its neighbours.
        teacher_tokens: The same text in the teacher's tokens.
    """
    if not student_tokens or not teacher_tokens:
        return []
    text, other = b"".join(student_tokens), b"".join(teacher_tokens)
    same = _common_prefix(text, other)
    rest = min(len(text), len(other)) - same
    same_again = len(text) - _common_prefix(text[::-1][:rest], other[::-1][:rest])
    shift = len(other) - len(text)
    # The byte where a token ends -> the number of tokens up to there.
    ends = {byte: i for i, byte in enumerate(accumulate(map(len, student_tokens)), 1)}
    teacher_ends = {byte: i for i, byte in enumerate(accumulate(map(len, teacher_tokens)), 1)}
    shared = {0: 0}  # the teacher's tokens so far -> the student's
    for byte, i in ends.items():
        there = byte if byte <= same else byte + shift if byte >= same_again else -1
        if there in teacher_ends and 0 < teacher_ends[there] < len(teacher_tokens):
            # What the teacher does not have at all joins the group before it.
            shared[teacher_ends[there]] = i
    shared = {j: i for j, i in shared.items() if i < len(student_tokens)}
    shared[len(teacher_tokens)] = len(student_tokens)
    return [Group(range(i, k), range(j, n)) for (j, i), (n, k) in pairwise(shared.items())]


def whole_characters(tokens: Sequence[bytes]) -> int:
    """How many tokens there are before a character that the last of them leave unfinished."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(b"".join(tokens))
    unfinished = len(decoder.getstate()[0])
    whole = len(tokens)
    while unfinished > 0:
        whole -= 1
        unfinished -= len(tokens[whole])
    return whole


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What every token adds to the text; together they are the text, special tokens included.

    A character of several tokens belongs to the last of them.
    """
    texts: list[str] = []
    # Decoded from one token before the new ones: the first of a text may lose its space.
    start = done = 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[start:done])
        both = tokenizer.decode(ids[start:end])
        is_whole = not both.endswith(UNFINISHED) or end == len(ids)
        texts.append(both[len(before) :] if is_whole else "")
        if is_whole:
            start, done = done, end
    return texts


def token_bytes(source: ModelSource) -> dict[int, bytes]:
    """What every token spells, by id, as the tokenizer's decoder has it.

    Knows byte-level tokenizers (GPT-2, Qwen, Llama 3), SentencePiece's with or without byte
    fallback (Llama 2, Gemma), and those whose tokens are the text itself. A space that a
    SentencePiece tokenizer puts in front of a text, and its decoder takes away, is spelt.

    Raises:
        UserError: It is of another kind (WordPiece, say).
    """
    decoder = getattr(getattr(source.tokenizer, "backend_tokenizer", None), "decoder", None)
    steps = _steps(json.loads(decoder.__getstate__())) if decoder else []
    kinds = {step["type"] for step in steps}
    vocabulary = source.tokenizer.get_vocab().items()
    if kinds == {"ByteLevel"}:
        return {i: _of_byte_characters(token) for token, i in vocabulary}
    replaced = [(s["pattern"], s["content"]) for s in steps if s["type"] == "Replace"]
    is_known = kinds and kinds <= _SENTENCE_PIECE
    if not is_known or any(pair != ({"String": _SPACE}, " ") for pair in replaced):
        raise UserError(
            f"{source.role} {source.path!r}: cannot tell the bytes of its tokens, which are "
            f"decoded by {', '.join(sorted(kinds)) or 'no decoder'}; use a model with a "
            "byte-level or SentencePiece tokenizer"
        )
    space = _SPACE if kinds & {"Replace", "Metaspace"} else " "
    has_bytes = "ByteFallback" in kinds
    spelt = {}
    for token, i in vocabulary:
        byte = _BYTE.fullmatch(token) if has_bytes else None
        spelt[i] = bytes.fromhex(byte[1]) if byte else token.replace(space, " ").encode()
    return spelt


def check_spelling(source: ModelSource) -> None:
    """Raise UserError unless its tokens spell the text that they are the tokens of."""
    known = token_bytes(source)
    ids = source.tokenizer.encode(_PROBE, add_special_tokens=False)
    spelt = b"".join(known[i] for i in ids)
    if spelt.removeprefix(b" ") != _PROBE.encode():
        raise UserError(
            f"{source.role} {source.path!r}: its tokens spell {spelt!r} for {_PROBE!r}, expected "
            "the same, so that tokenizers can be compared by their text; use another model"
        )


def ends_within(source: ModelSource, words: Sequence[bytes]) -> list[int]:
    """Where its tokenizer ends tokens within each word: bit k is set if one ends after k bytes.

    A word that is one of its tokens is not cut. One that it does not spell, as when it is a part
    of a character, may be cut anywhere.
    """
    spelt = token_bytes(source)
    tokens = set(spelt.values())
    found = [0 if word in tokens else (1 << len(word)) - 2 for word in words]
    texts = [(i, text) for i, word in enumerate(words) if found[i] and (text := _text(word))]
    for start in range(0, len(texts), _BATCH):
        rows, batch = zip(*texts[start : start + _BATCH], strict=True)
        encoded = source.tokenizer(list(batch), add_special_tokens=False)["input_ids"]
        for i, ids in zip(rows, encoded, strict=True):
            whole = b"".join(spelt[k] for k in ids)
            in_front = len(whole) - len(words[i])  # a space
            if in_front in (0, 1) and whole == b" " * in_front + words[i]:
                ends = [end - in_front for end in accumulate(len(spelt[k]) for k in ids)]
                found[i] = sum(1 << end for end in ends if 0 < end < len(words[i]))
    return found


def _text(word: bytes) -> str:
    try:
        return word.decode()
    except UnicodeDecodeError:
        return ""


def _common_prefix(one: bytes, other: bytes) -> int:
    if one == other:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _steps(part)]
    return [decoder]


def _byte_characters() -> dict[str, int]:
    """GPT-2's names of the bytes: printable ones are themselves, the others come from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()


def _of_byte_characters(token: str) -> bytes:
    """An added token that has other characters is text."""
    if all(character in _BYTE_CHARACTERS for character in token):
        return bytes(_BYTE_CHARACTERS[character] for character in token)
    return token.encode()
