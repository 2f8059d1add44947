"""A teacher's longer tokens, by enumeration: every string of a small world, its exact scores."""

import random
import time
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from opd_lightning.lab.tokenizer import build_tokenizer
from opd_lightning.losses.alignment import in_groups
from opd_lightning.models import head
from opd_lightning.models.head import Head, TokenStates
from opd_lightning.models.source import ModelSource
from opd_lightning.models.tokenization import token_bytes
from opd_lightning.teachers import CrossTokenizerTeacher
from opd_lightning.teachers.longer_tokens import LongerTokens
from opd_lightning.types import Prompt, Rollout, RolloutBatch, TokenScores
from tests.batches import make_batch, make_rollout
from tests.tokenizers import KINDS, as_source, wrapped

LENGTH = 4
STRINGS = ["".join(x) for n in range(LENGTH + 1) for x in product("ab", repeat=n)]
PROMPT = Prompt(id="p", messages=({"role": "user", "content": "a"},))
World = dict[str, float]  # every string's probability


def random_world(seed: int) -> World:
    probs = random.Random(seed)
    weights = {string: probs.random() for string in STRINGS}
    return {string: weight / sum(weights.values()) for string, weight in weights.items()}


def source_of(model: Any, end: str) -> ModelSource:
    backend = Tokenizer(model)
    backend.decoder = decoders.Fuse()
    template = "{{ messages[0].content }}"
    source = as_source(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, chat_template=template)
    )
    source.config = SimpleNamespace(
        get_text_config=lambda: SimpleNamespace(max_position_embeddings=64)
    )
    return source


def longest_match(*tokens: str, end: str = "$") -> ModelSource:
    """Its tokenizer takes the longest of these that fits, from left to right."""
    vocabulary = {token: i for i, token in enumerate((end, *tokens))}
    model = models.WordPiece(vocabulary, unk_token=end, continuing_subword_prefix="")
    return source_of(model, end)


def encode(source: ModelSource, string: str) -> tuple[int, ...]:
    """Its tokens and the end."""
    ids = source.tokenizer.encode(string, add_special_tokens=False)
    return (*ids, source.tokenizer.eos_token_id)


class Oracle:
    """The model whose strings have these probabilities, each in its tokenizer's tokens."""

    def __init__(self, world: World, source: ModelSource) -> None:
        self.size = len(source.tokenizer)
        self.mass: dict[tuple[int, ...], float] = {}
        for string, prob in world.items():
            ids = encode(source, string)
            for n in range(len(ids) + 1):
                self.mass[ids[:n]] = self.mass.get(ids[:n], 0.0) + prob

    def next(self, ids: tuple[int, ...]) -> Tensor:
        mass = [self.mass.get((*ids, i), 0.0) for i in range(self.size)]
        return (torch.tensor(mass, dtype=torch.float64) / self.mass[ids]).log()

    def load(self, device: torch.device, student: Any) -> None: ...

    def states(self, batch: RolloutBatch, view: str) -> TokenStates:
        pairs = zip(batch.response_ids, batch.response_mask, strict=True)
        rows = [tuple(ids[mask].tolist()) for ids, mask in pairs]
        logits = [self.next(ids[:t]) for ids in rows for t in range(len(ids))]
        same = Head(project=lambda hidden: hidden, vocab_size=self.size, temperature=1.0)
        return TokenStates(torch.stack(logits), same)


def asked(world: World, source: ModelSource, batch: RolloutBatch, ours: ModelSource) -> TokenScores:
    teacher = CrossTokenizerTeacher("some/model")
    teacher.source, teacher.frozen = source, Oracle(world, source)  # type: ignore[assignment]
    teacher.load(torch.device("cpu"), SimpleNamespace(source=ours))  # type: ignore[arg-type]
    return teacher.score(batch, "student")


def logprobs(world: World, source: ModelSource, batch: RolloutBatch) -> Tensor:
    """Of a model with the batch's own tokens."""
    states = Oracle(world, source).states(batch, "student")
    targets = batch.response_ids[batch.response_mask]
    return batch.unflatten(states.hidden.gather(1, targets[:, None])[:, 0]).float()


def written(ours: ModelSource, *, cut: int | None = None) -> RolloutBatch:
    """Every string, or those of their first `cut` tokens that ended nothing."""
    ids = [encode(ours, string) for string in STRINGS]
    if cut is not None:
        ids = sorted({x[:cut] for x in ids if len(x) > cut})
    return make_batch([answered(x, truncated=cut is not None) for x in ids])


def answered(ids: tuple[int, ...], *, truncated: bool = False) -> Rollout:
    return replace(make_rollout(list(ids), prompt_ids=[1], truncated=truncated), prompt=PROMPT)


def difference(
    teacher: World, source: ModelSource, ours: ModelSource, batch: RolloutBatch
) -> tuple[Tensor, Tensor]:
    """Compare a teacher over all groups with one that has the student's tokens."""
    own = logprobs(teacher, ours, batch)
    told = asked(teacher, source, batch, ours)
    assert told.ends is not None
    return in_groups(own, told.logprobs, told.ends) - own, told.ends


LETTERS = longest_match("a", "b")
# The end of the first is called as a text may begin.
NESTED = longest_match("a", "b", "ab", "abb", "ba", "bab", end="a$")
GAPS = longest_match("a", "b", "aab", "abba", "bb")  # "aab" begins with no token but "a" "a"


@pytest.mark.parametrize("source", [LETTERS, NESTED, GAPS])
@pytest.mark.parametrize("cut", [None, 1, 2, 3])
def test_it_says_what_a_teacher_with_the_students_letters_says(
    source: ModelSource, cut: int | None
) -> None:
    """Of every group of every string; so one distribution gives no signal, whatever is sampled."""
    batch = written(LETTERS, cut=cut)
    found, _ = difference(random_world(0), source, LETTERS, batch)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=2e-6, rtol=0)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = written(LETTERS)
    monkeypatch.setattr(head, "MAX_BLOCK_ELEMENTS", 20)
    monkeypatch.setattr(head, "MAX_CHUNK_ELEMENTS", 100)
    found, _ = difference(random_world(0), NESTED, LETTERS, batch)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=2e-6, rtol=0)


def test_a_token_that_tells_what_follows_tells_nothing_too_early() -> None:
    """The teacher has letters and "ab"; its token "a" implies that no "b" follows."""
    world = {"aa": 0.28, "ab": 0.42, "ba": 0.24, "bb": 0.06}
    source = longest_match("a", "b", "ab")
    batch = make_batch([answered(encode(LETTERS, string)) for string in world])
    found, ends = difference(world, source, LETTERS, batch)
    assert ends.tolist() == [[True] * 3, [False, True, True], [True] * 3, [True] * 3]
    torch.testing.assert_close(found, torch.zeros_like(found), atol=2e-6, rtol=0)
    said = Oracle(world, source).next(()).exp()[source.tokenizer.convert_tokens_to_ids("a")]
    assert said.item() == pytest.approx(0.28)  # of its 0.7 for all that begins with "a"


@pytest.mark.parametrize("source", [NESTED, GAPS])
def test_another_distribution_is_compared_as_by_its_letters(source: ModelSource) -> None:
    """So a discount of 0 gives the gradient that a teacher with the student's tokens gives."""
    teacher, student = random_world(1), random_world(2)
    batch = written(LETTERS)
    own = logprobs(student, LETTERS, batch)
    told = asked(teacher, source, batch, LETTERS)
    assert told.ends is not None
    found = in_groups(own, told.logprobs, told.ends)
    expected = in_groups(own, logprobs(teacher, LETTERS, batch), told.ends)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    assert (found - own).abs().max() > 0.5


def test_the_same_tokens_are_scored_as_they_are() -> None:
    for source in (LETTERS, NESTED, GAPS):
        batch = written(source)
        told = asked(random_world(0), source, batch, source)
        assert torch.equal(told.logprobs, logprobs(random_world(0), source, batch))


def counted(tokens: LongerTokens, word: bytes) -> int:
    found = tokens.longer(word)
    return 0 if found is None else len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokenizer_counts_no_longer_token(kind: str) -> None:
    source = wrapped(KINDS[kind]())
    spelt = token_bytes(source)
    longer = LongerTokens(spelt, source)
    assert not any(counted(longer, word) for word in spelt.values())
    letters = LongerTokens(spelt, as_source(build_tokenizer(64)))
    assert sum(counted(letters, word) for word in spelt.values()) > 2


def test_sums_are_the_sequences() -> None:
    """Whatever is not exact; behind the length limit more can follow, and counts."""
    world, batch = random_world(0), written(LETTERS)
    for source in (NESTED, GAPS, MERGES):
        told = asked(world, source, batch, LETTERS)
        expected = torch.tensor([world[string] for string in STRINGS]).log()
        torch.testing.assert_close(told.logprobs.sum(1), expected, atol=1e-5, rtol=0)
    cut = written(LETTERS, cut=1)
    told = asked(world, NESTED, cut, LETTERS)
    begun = [sum(p for x, p in world.items() if x.startswith(first)) for first in "ab"]
    torch.testing.assert_close(told.logprobs[:, 0].exp(), torch.tensor(begun), atol=1e-6, rtol=0)


# Limits -----------------------------------------------------------------------------------

# "ab" is a token, but "abb" is "a" "bb".
MERGES = source_of(
    models.BPE({"$": 0, "a": 1, "b": 2, "bb": 3, "ab": 4}, [("b", "b"), ("a", "b")]), "$"
)


def test_a_text_that_was_cut_otherwise_before_is_left_out() -> None:
    """Behind "ab" the teacher's mass of "abb" is missing: it would begin with another token."""
    world, batch = random_world(0), written(LETTERS)
    found, _ = difference(world, MERGES, LETTERS, batch)
    row = STRINGS.index("aba")
    begun = {b: sum(p for x, p in world.items() if x.startswith(b)) for b in ("ab", "abb")}
    missing = torch.tensor(begun["ab"] - begun["abb"]).log() - torch.tensor(begun["ab"]).log()
    torch.testing.assert_close(found[row, 1], missing, atol=2e-6, rtol=0)
    torch.testing.assert_close(found[row, 2], -missing, atol=2e-6, rtol=0)


def test_what_a_token_of_the_students_tells_the_teacher_knows_later() -> None:
    """The student's "a" implies that no "b" follows, the teacher's does not."""
    world = random_world(0)
    ours = longest_match("a", "b", "ab")
    batch = written(ours)
    found, ends = difference(world, LETTERS, ours, batch)
    row = STRINGS.index("aa")
    begun = {b: sum(p for x, p in world.items() if x.startswith(b)) for b in ("a", "ab")}
    early = torch.tensor(begun["a"]).log() - torch.tensor(begun["a"] - begun["ab"]).log()
    torch.testing.assert_close(found[row, 0], early, atol=2e-6, rtol=0)
    sums = torch.where(ends, found, 0.0).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), atol=4e-6, rtol=0)


# Large vocabularies -----------------------------------------------------------------------


def test_a_large_vocabulary_takes_seconds() -> None:
    generator = random.Random(0)
    words = {i: generator.randbytes(generator.randint(1, 12)) for i in range(100_000)}
    started = time.process_time()
    longer = LongerTokens(words, as_source(build_tokenizer(64)))
    assert time.process_time() - started < 10
    text = words[0][:2]
    found = longer.longer(text)
    expected = sorted(i for i, x in words.items() if x.startswith(text) and len(x) > 2)
    assert found is not None
    assert sorted(found.tolist()) == expected
    assert expected
