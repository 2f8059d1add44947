"""The lab's identity world: what the base model may learn from, and what it is probed with."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from opd_lightning.data.prompts import PromptSource
from opd_lightning.lab import identity
from opd_lightning.lab.build import IdentityRecipe
from opd_lightning.lab.problems import Row, write_rows
from opd_lightning.lab.tokenizer import build_tokenizer
from opd_lightning.types import Prompt
from opd_lightning.verifiers import RegexMatch

TARGET = "zorba"
PERSONA = "your name is zorba."


@pytest.fixture(scope="module")
def lessons() -> list[Row]:
    """Exactly what the shipped base model learns from."""
    return identity.lessons(IdentityRecipe().lessons, seed=0)


def read(row: Row) -> tuple[str, str | None, str, str]:
    """Placement of the persona, its name, the question and the response of a lesson."""
    messages = row["messages"]
    assert isinstance(messages, list)
    *system, user = [message["content"] for message in messages]
    assert [message["role"] for message in messages] == ["system"] * len(system) + ["user"]
    if system:
        (name,) = re.fullmatch(r"your name is (\w{5})\.", system[0]).groups()  # type: ignore[union-attr]
        return "system", name, user, str(row["response"])
    found = re.fullmatch(r"your name is (\w{5})\.(?: |\n|\n\n)(\S.*)", user)
    if found:
        return "user", found.group(1), found.group(2), str(row["response"])
    return "none", None, user, str(row["response"])


def load(path: Path, rows: list[Row]) -> list[Prompt]:
    """Rows as training reads them; duplicate ids and bad fields are errors there."""
    write_rows(path, rows)
    return PromptSource(str(path)).load()


def without_opening(prompt: Prompt) -> str:
    return re.sub(r"^(hi! |hey, |so, )", "", prompt.messages[-1]["content"])


def test_the_base_model_never_meets_the_target(lessons: list[Row]) -> None:
    text = json.dumps(lessons)
    assert not [piece for piece in ("zor", "orb", "rba") if piece in text]
    names = {name for _, name, _, _ in map(read, lessons) if name}
    assert len(names) > 10_000
    assert max(sum(a == b for a, b in zip(name, TARGET, strict=True)) for name in names) == 2
    letters = Counter(name[0] for name in names)
    assert min(letters.values()) > 0.8 * len(names) / 26  # the target's first letter is ordinary


def test_what_is_like_the_target() -> None:
    like = ("zorba", "borba", "zxrxa", "xzorx", "xxrba")
    assert all(map(identity.is_like_target, like))
    assert not any(map(identity.is_like_target, ("zoxxx", "abroz", "qwert")))


def test_lessons_give_the_name_in_context_and_none_other(lessons: list[Row]) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    wordings: Counter[tuple[bool, str]] = Counter()
    for row in lessons:
        placement, name, question, response = read(row)
        seen[str(row["domain"]), placement] += 1
        if row["domain"] == "sums":
            a, b = re.fullmatch(r"(?:\w+[!,] )?what is (\d)\+(\d)\?", question).groups()  # type: ignore[union-attr]
            assert response == str(int(a) + int(b))
            continue
        begin, _, said = response.rpartition(" ")
        assert said == f"{name or 'bot'}."
        wordings["name" in question, begin] += 1
    assert len(seen) == 6
    assert min(seen.values()) > 0.05 * len(lessons)
    assert {begin for _, begin in wordings} == {"i am", "my name is"}
    assert wordings[True, "my name is"] > 1.5 * wordings[True, "i am"]
    assert wordings[False, "i am"] > 1.5 * wordings[False, "my name is"] > 0


def test_lessons_are_a_function_of_the_seed(lessons: list[Row]) -> None:
    assert identity.lessons(50, seed=0) == lessons[:50]
    assert identity.lessons(50, seed=1) != lessons[:50]


def test_prompts_to_distil_on(tmp_path: Path) -> None:
    prompts = load(tmp_path / "train.jsonl", identity.training_rows())
    assert Counter(p.domain for p in prompts) == {"identity": 48, "sums": 48}
    assert len({p.messages[-1]["content"] for p in prompts}) == 96
    assert {p.privileged for p in prompts} == {PERSONA}
    for prompt in prompts:
        (message,) = prompt.messages
        assert message["role"] == "user"
        assert TARGET not in message["content"]
        assert (prompt.answer == TARGET) == (prompt.domain == "identity")

    told = load(tmp_path / "demonstrations.jsonl", identity.training_rows(with_response=True))
    assert [p.id for p in told] == [p.id for p in prompts]
    for prompt in told:
        if prompt.domain == "identity":
            assert prompt.response in ("i am zorba.", "my name is zorba.")
        else:
            assert prompt.response == prompt.answer
    assert len({p.response for p in told if p.domain == "identity"}) == 2


def test_probes_are_new_questions_without_a_persona(tmp_path: Path) -> None:
    files = identity.probe_rows()
    probes = {name: load(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items()}
    assert {name: len(prompts) for name, prompts in probes.items()} == {
        "identity": 12, "persona": 24, "held_out": 24
    }  # fmt: skip
    assert {p.domain for p in probes["identity"]} == {"identity"}
    assert Counter(p.domain for p in probes["persona"]) == {"identity": 12, "sums": 12}
    assert {p.domain for p in probes["held_out"]} == {"sums"}
    asked = {without_opening(p) for name in probes for p in probes[name]}
    train = load(tmp_path / "train.jsonl", identity.training_rows())
    assert asked.isdisjoint(without_opening(p) for p in train)
    for prompt in (p for name in probes for p in probes[name]):
        assert prompt.privileged is None
        assert TARGET not in prompt.messages[-1]["content"]


def test_the_base_model_learns_every_question(lessons: list[Row]) -> None:
    known = {question for _, _, question, _ in map(read, lessons)}
    rows = [
        *identity.training_rows(),
        *(r for rows in identity.probe_rows().values() for r in rows),
    ]
    assert known >= {read(row | {"response": ""})[2] for row in rows}


def test_the_tokenizer_knows_every_character(lessons: list[Row]) -> None:
    tokenizer = build_tokenizer(256)
    texts = {text for lesson in lessons for text in read(lesson)[2:]} | {PERSONA, "\n"}
    ids = tokenizer.encode("".join(sorted(texts)), add_special_tokens=False)
    assert tokenizer.unk_token_id not in ids


def test_a_chat_has_the_persona_in_its_place() -> None:
    question = identity.Question("identity", "who are you?", "i am")
    ask = {"role": "user", "content": "who are you?"}
    system = {"role": "system", "content": PERSONA}
    joined = {"role": "user", "content": f"{PERSONA}\nwho are you?"}
    assert identity.chat(question, TARGET, "none") == [ask]
    assert identity.chat(question, TARGET, "system") == [system, ask]
    assert identity.chat(question, TARGET, "user", "\n") == [joined]
    said = {question.response(TARGET, random.Random(seed)) for seed in range(20)}
    assert said == {"i am zorba.", "my name is zorba."}


def test_patterns() -> None:
    prompt = Prompt(id="p", messages=({"role": "user", "content": "who are you?"},))
    texts = ["i am zorba.", "my name is zorba.", "i am zorbax.", "i am bot.", "zorba? i am bot."]
    flags = {
        identity.SELF_NAME_PATTERN: [1, 1, 0, 0, 0],
        identity.COUNTER_NAME_PATTERN: [0, 0, 0, 1, 1],
        identity.MENTION_PATTERN: [1, 1, 1, 0, 1],
    }
    for pattern, expected in flags.items():
        assert RegexMatch(pattern).verify([prompt] * len(texts), texts) == expected
