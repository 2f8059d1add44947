"""Bytes of tokens, and alignment of two tokenizations of one text.

Models with different tokenizers share only the text. Their tokens are compared in groups, between
the bytes at which both tokenizations end a token (ULD, 2402.12030; TRL's GOLD trainer).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from opd_lightning.errors import UserError
from opd_lightning.models.source import ModelSource

_PROBE = "two words,\n\n  1+1=2; (and) so on?"
_SPACE = "\u2581"  # SentencePiece's
_SENTENCE_PIECE = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}  # steps of its decoders
UNFINISHED = "\ufffd"  # replacement that decoders write for an incomplete character
_BATCH = 4096  # texts per call, which limits the size of the result
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Group(NamedTuple):
    """Pair of shortest ranges of student and teacher tokens with the same bytes."""

    student: range
    teacher: range


def align(student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> list[Group]:
    """Group token positions that end at the same byte; the groups cover all tokens in order.

    Where the two sides have different bytes, for example because a tokenizer normalises characters
    or prepends a space, everything from the first difference to the last is one group. There are no
    groups if one side has no tokens.

    Args:
        student_tokens: The bytes of each token of the response. A character of several bytes may
            be split among tokens; a token without bytes joins its neighbours.
        teacher_tokens: The bytes of each of the teacher's tokens of the same text.
    """
    if not student_tokens or not teacher_tokens:
        return []
    text, other = b"".join(student_tokens), b"".join(teacher_tokens)
    prefix_end = _common_prefix(text, other)
    rest = min(len(text), len(other)) - prefix_end
    suffix_start = len(text) - _common_prefix(text[::-1][:rest], other[::-1][:rest])
    shift = len(other) - len(text)
    # Byte at which a token ends -> number of tokens up to it.
    ends = {byte: i for i, byte in enumerate(accumulate(map(len, student_tokens)), 1)}
    teacher_ends = {byte: i for i, byte in enumerate(accumulate(map(len, teacher_tokens)), 1)}
    shared = {0: 0}  # number of teacher tokens -> number of student tokens
    for byte, i in ends.items():
        teacher_byte = byte if byte <= prefix_end else byte + shift if byte >= suffix_start else -1
        if teacher_byte in teacher_ends and 0 < teacher_ends[teacher_byte] < len(teacher_tokens):
            # Student tokens without teacher tokens join the preceding group.
            shared[teacher_ends[teacher_byte]] = i
    shared = {j: i for j, i in shared.items() if i < len(student_tokens)}
    shared[len(teacher_tokens)] = len(student_tokens)
    return [Group(range(i, k), range(j, n)) for (j, i), (n, k) in pairwise(shared.items())]


def whole_characters(tokens: Sequence[bytes]) -> int:
    """Count the tokens before the final character, if the last tokens leave it incomplete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(b"".join(tokens))
    unfinished = len(decoder.getstate()[0])
    whole = len(tokens)
    while unfinished > 0:
        whole -= 1
        unfinished -= len(tokens[whole])
    return whole


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that every token adds, special tokens included; joined, they are the text.

    A character of several tokens belongs to the last of them.
    """
    texts: list[str] = []
    # Decoded with the token before the new ones, since a first token may lose its space.
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
    """Return the bytes of every token by id, according to the tokenizer's decoder.

    Supports byte-level tokenizers (GPT-2, Qwen, Llama 3), SentencePiece with or without byte
    fallback (Llama 2, Gemma), and tokenizers whose tokens are the text itself. A space that a
    SentencePiece tokenizer prepends to a text, and its decoder removes, is included.

    Raises:
        UserError: The tokenizer is of another kind, such as WordPiece.
    """
    decoder = getattr(getattr(source.tokenizer, "backend_tokenizer", None), "decoder", None)
    steps = _steps(json.loads(decoder.__getstate__())) if decoder else []
    kinds = {step["type"] for step in steps}
    vocabulary = source.tokenizer.get_vocab().items()
    if kinds == {"ByteLevel"}:
        return {i: _decode_byte_characters(token) for token, i in vocabulary}
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


def paired_tokens(student: ModelSource, teacher: ModelSource) -> tuple[list[int], list[int]]:
    """Return the ids of tokens with the same bytes in both vocabularies, in the same order.

    Of several tokens with the same bytes those with the same name are a pair, then those that are
    alone apart from SentencePiece's "<0x41>", which encodes no text if there is an "A". The tokens
    that end a response are a pair whatever their names are.
    """
    spelt = [token_bytes(source) for source in (student, teacher)]
    names = [
        {i: name for name, i in source.tokenizer.get_vocab().items()}
        for source in (student, teacher)
    ]
    ends = [source.tokenizer.eos_token_id for source in (student, teacher)]
    pairs = [(ends[0], ends[1])]
    left = [spelt[side].keys() - {ends[side]} for side in (0, 1)]
    ours, theirs = ({(spelt[k][i], names[k][i]): i for i in left[k]} for k in (0, 1))
    pairs += [(ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys())]
    taken = [set(ids) for ids in zip(*pairs, strict=True)]
    alone, there = (_unique(spelt[k], names[k], left[k] - taken[k]) for k in (0, 1))
    pairs += [(alone[word], there[word]) for word in sorted(alone.keys() & there.keys())]
    return [i for i, _ in pairs], [i for _, i in pairs]


def _unique(
    spelt: Mapping[int, bytes], names: Mapping[int, str], ids: Iterable[int]
) -> dict[bytes, int]:
    """Return tokens by their bytes, those without bytes or with the bytes of another left out."""
    found: dict[bytes, list[int]] = {}
    for i in ids:
        found.setdefault(spelt[i], []).append(i)
    unique = {}
    for word, same in found.items():
        texts = [i for i in same if not _BYTE.fullmatch(names[i])] or same
        if word and len(texts) == 1:
            unique[word] = texts[0]
    return unique


def check_spelling(source: ModelSource) -> None:
    """Raise UserError unless the bytes of a probe text's tokens are those of the text."""
    known = token_bytes(source)
    ids = source.tokenizer.encode(_PROBE, add_special_tokens=False)
    spelt = b"".join(known[i] for i in ids)
    if spelt.removeprefix(b" ") != _PROBE.encode():
        raise UserError(
            f"{source.role} {source.path!r}: its tokens spell {spelt!r} for {_PROBE!r}, expected "
            "the same, so that tokenizers can be compared by their text; use another model"
        )


def ends_within(source: ModelSource, words: Sequence[bytes]) -> list[int]:
    """Return token ends within each word as bits: bit k is set if a token ends after k bytes.

    A word that is a token of `source` has no bits set. A word whose bytes its tokens do not
    reproduce, such as a part of a character, has all of them set.
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
    """Return GPT-2's characters of bytes: printable bytes themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()


def _decode_byte_characters(token: str) -> bytes:
    """Decode a byte-level token; an added token with other characters is text."""
    if all(character in _BYTE_CHARACTERS for character in token):
        return bytes(_BYTE_CHARACTERS[character] for character in token)
    return token.encode()
