"""Tokens as bytes, and two tokenizations of one text."""

from itertools import accumulate, pairwise

import pytest
import torch
from tokenizers import normalizers

from opd_lightning.errors import UserError
from opd_lightning.lab.tokenizer import build_tokenizer
from opd_lightning.models.tokenization import (
    Group,
    align,
    check_spelling,
    ends_within,
    paired_tokens,
    token_bytes,
    token_texts,
    whole_characters,
)
from tests.tokenizers import (
    KINDS,
    as_source,
    byte_level,
    sentence_piece,
    word_piece,
    wrapped,
)

TEXT = "naïve 雪! 42 🙂".encode()


def cut(text: bytes, at: list[int]) -> list[bytes]:
    return [text[start:end] for start, end in pairwise([0, *at, len(text)])]


def test_groups_by_hand() -> None:
    ours, theirs = [b"ab", b"c", b"def", b"g"], [b"a", b"bc", b"d", b"ef", b"g"]
    assert align(ours, theirs) == [
        Group(range(0, 2), range(0, 2)),
        Group(range(2, 3), range(2, 4)),
        Group(range(3, 4), range(4, 5)),
    ]
    assert align([], []) == []


def test_u22_a_character_may_be_split_between_tokens() -> None:
    """The two bytes of an i with diaeresis: one side cuts between them, the other does not."""
    ours, theirs = [b"na", b"\xc3", b"\xafve"], [b"na\xc3\xaf", b"ve"]
    assert b"".join(ours).decode() == "naïve"
    assert align(ours, theirs) == [Group(range(0, 3), range(0, 2))]
    assert align(ours, [b"na\xc3", b"\xaf", b"ve"]) == [
        Group(range(0, 2), range(0, 1)),
        Group(range(2, 3), range(1, 3)),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_has_all_its_tokens_in_common_with_itself(kind: str) -> None:
    sources = [wrapped(KINDS[kind]()) for _ in range(2)]
    for source in sources:
        source.tokenizer.eos_token = source.tokenizer.convert_ids_to_tokens(1)
    ours, theirs = paired_tokens(*sources)
    assert ours == theirs
    assert sorted(ours) == list(range(len(sources[0].tokenizer)))


def test_tokens_are_paired_by_their_bytes() -> None:
    """Families name them otherwise: a space, bytes, the end of sequence."""
    one, other = wrapped(byte_level()), wrapped(sentence_piece(strips=False))
    one.tokenizer.eos_token, other.tokenizer.eos_token = "<end of turn>", "</s>"
    pairs = dict(zip(*paired_tokens(one, other), strict=True))
    ours, theirs = one.tokenizer.get_vocab(), other.tokenizer.get_vocab()

    for name, there in {"Ġ": "▁", "q": "q", "he": "he", "Ã": "<0xC3>"}.items():
        assert pairs[ours[name]] == theirs[there]
    spelt = token_bytes(one), token_bytes(other)
    for i, j in pairs.items():
        assert spelt[0][i] == spelt[1][j] or (i, j) == (ours["<end of turn>"], theirs["</s>"])
    assert pairs[ours["<end of turn>"]] == theirs["</s>"]
    assert len(set(pairs.values())) == len(pairs) > 50


@pytest.mark.parametrize("seed", range(20))
def test_u22_groups_rebuild_the_text_and_are_the_shortest(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cuts = [
        (1 + torch.nonzero(torch.rand(len(TEXT) - 1, generator=generator) < 0.5))[:, 0].tolist()
        for _ in range(2)
    ]
    ours, theirs = (cut(TEXT, at) for at in cuts)
    groups = align(ours, theirs)
    spelt = [b"".join(ours[i] for i in group.student) for group in groups]
    assert spelt == [b"".join(theirs[i] for i in group.teacher) for group in groups]
    assert b"".join(spelt) == TEXT
    assert len(groups) == 1 + len(set(cuts[0]) & set(cuts[1]))
    assert [i for group in groups for i in group.student] == list(range(len(ours)))
    assert [i for group in groups for i in group.teacher] == list(range(len(theirs)))


def pieces(text: str) -> list[bytes]:
    return [piece.encode() for piece in text.split("|")]


@pytest.mark.parametrize(
    ("ours", "theirs", "groups"),
    [
        # A space in front, on either side.
        ("he|llo| you", " he|llo| you", ["he~ he", "llo~llo", " you~ you"]),
        (" he|llo", "he|llo", [" he~he", "llo~llo"]),
        # A character that the other side writes differently, or not at all, in the middle.
        ("a|b|e\u0301|c|d", "a|b|é|c|d", ["a~a", "b~b", "e\u0301~é", "c~c", "d~d"]),
        ("a|b|x|c", "a|b|c", ["a~a", "bx~b", "c~c"]),
        ("a|b|c", "a|b|x|c", ["a~a", "b~b", "c~xc"]),
        # At the end, and in two places: the tokens between are in one group with them.
        ("a|b|x", "a|b", ["a~a", "bx~b"]),
        ("a|b", "a|b|x", ["a~a", "b~bx"]),
        ("a|x|b|y|c", "a|X|b|Y|c", ["a~a", "xby~XbY", "c~c"]),
        # Nothing in common.
        ("x|y", "z", ["xy~z"]),
        # Tokens without bytes.
        ("a||b", "a|b", ["a~a", "b~b"]),
        ("|a|b", "a|b", ["a~a", "b~b"]),
    ],
)
def test_other_bytes_are_one_group(ours: str, theirs: str, groups: list[str]) -> None:
    left, right = pieces(ours), pieces(theirs)
    found = align(left, right)
    spelt = [
        (b"".join(left[i] for i in group.student), b"".join(right[i] for i in group.teacher))
        for group in found
    ]
    assert spelt == [tuple(part.encode() for part in group.split("~")) for group in groups]
    assert [i for group in found for i in group.student] == list(range(len(left)))
    assert [i for group in found for i in group.teacher] == list(range(len(right)))


def test_one_side_without_tokens_has_no_groups() -> None:
    assert align([], [b"a"]) == align([b"a"], []) == []


@pytest.mark.parametrize("seed", range(30))
def test_any_two_lists_of_tokens_are_covered_in_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> list[bytes]:
        sizes = torch.randint(0, 3, (6,), generator=generator).tolist()
        return [bytes(torch.randint(97, 99, (n,), generator=generator).tolist()) for n in sizes]

    ours, theirs = tokens(), tokens()
    groups = align(ours, theirs)
    assert all(group.student and group.teacher for group in groups)
    assert [i for group in groups for i in group.student] == list(range(6))
    assert [i for group in groups for i in group.teacher] == list(range(6))


def test_an_unfinished_character_is_left_out() -> None:
    snow = "雪".encode()
    assert whole_characters([b"a", snow[:1], snow[1:]]) == 3
    assert whole_characters([b"a", snow[:1], snow[1:2]]) == 1
    assert whole_characters([b"a" + snow[:2]]) == 0
    assert whole_characters([b"a", b"\xff", b"b"]) == 3  # never a character: not unfinished
    assert whole_characters([]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the näive 雪🙂\n\n  fox", " the  fox", "the", "雪", "\n"])
def test_tokens_spell_the_text(kind: str, text: str) -> None:
    source = wrapped(KINDS[kind]())
    check_spelling(source)
    known, ids = token_bytes(source), source.tokenizer.encode(text, add_special_tokens=False)
    spelt = b"".join(known[i] for i in ids)
    assert spelt in (text.encode(), b" " + text.encode())
    assert source.tokenizer.decode(ids) in (spelt.decode(), spelt.decode()[1:])
    if "雪" in text:
        assert any(len(known[i].decode(errors="ignore")) == 0 for i in ids)  # split among tokens


def test_added_tokens_spell_their_names() -> None:
    source = wrapped(byte_level())
    known, ids = token_bytes(source), source.tokenizer.get_vocab()
    assert known[ids["<|user|>"]] == b"<|user|>"
    assert known[ids["<end of turn>"]] == b"<end of turn>"


def test_the_lab_spells_its_characters() -> None:
    source = as_source(build_tokenizer(256))
    check_spelling(source)
    known, ids = token_bytes(source), source.tokenizer.get_vocab()
    assert known[ids["+"]] == b"+"
    assert known[ids["<|end|>"]] == b"<|end|>"


def test_two_kinds_of_tokenizer_align() -> None:
    text = "the näive 雪 fox\n  the 12"
    spelt = []
    for make in (byte_level, KINDS["sentence piece, space in front"]):
        source = wrapped(make())
        ids = source.tokenizer.encode(text, add_special_tokens=False)
        spelt.append([token_bytes(source)[i] for i in ids])
    groups = align(*spelt)
    assert len(groups) > 5
    for group in groups[1:]:
        ours, theirs = (b"".join(x[i] for i in part) for x, part in zip(spelt, group, strict=True))
        assert ours == theirs


def test_other_kinds_are_refused() -> None:
    with pytest.raises(UserError, match=r"teacher 'some/model': cannot tell .* by WordPiece; use"):
        check_spelling(wrapped(word_piece()))
    backend = byte_level()
    backend.decoder = None
    with pytest.raises(UserError, match="decoded by no decoder"):
        check_spelling(wrapped(backend))


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    backend = byte_level()
    backend.normalizer = normalizers.Replace("w", "v")
    with pytest.raises(UserError, match="its tokens spell b'tvo vords"):
        check_spelling(wrapped(backend))


# Where a tokenizer ends its tokens ---------------------------------------------------------


def places(mask: int) -> list[int]:
    return [place for place in range(mask.bit_length()) if mask >> place & 1]


def test_a_tokenizer_of_characters_may_stop_everywhere() -> None:
    words = [b"ab", b"a", b"12+3", b"\xe9\x9b", "a雪".encode()]
    found = ends_within(as_source(build_tokenizer(64)), words)
    assert [places(mask) for mask in found] == [[1], [], [1, 2, 3], [1], [1, 2, 3]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_cuts_none_of_its_own_tokens_and_the_rest_as_it_reads(kind: str) -> None:
    source = wrapped(KINDS[kind]())
    spelt = token_bytes(source)
    assert not any(ends_within(source, list(spelt.values())))
    assert ends_within(source, []) == []
    whole = "quick 雪 the"
    tokens = [spelt[i] for i in source.tokenizer.encode(whole, add_special_tokens=False)]
    in_front = sum(map(len, tokens)) - len(whole.encode())
    (found,) = ends_within(source, [whole.encode()])
    ends = [end - in_front for end in accumulate(map(len, tokens))][:-1]
    assert places(found) == [end for end in ends if end > 0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_tokens_add_is_the_text(kind: str) -> None:
    tokenizer = wrapped(KINDS[kind]()).tokenizer
    for text in ("the so 1+1=2;", " näive", "dogs\n\n  and"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_belongs_to_the_last_of_its_tokens() -> None:
    tokenizer = wrapped(byte_level()).tokenizer
    ids = tokenizer.encode("a雪🙂", add_special_tokens=False)
    texts = token_texts(tokenizer, ids)
    assert "".join(texts) == "a雪🙂"
    assert [text for text in texts if text] == ["a", "雪", "🙂"]
    assert len(texts) > 3
    assert "".join(token_texts(tokenizer, ids[:-1])) == tokenizer.decode(ids[:-1])  # cut short
    assert token_texts(tokenizer, []) == []
