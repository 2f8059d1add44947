"""The lab's strings world: skills, what the initial model learns from, and prompt files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from opd_lightning.data.prompts import PromptSource
from opd_lightning.data.views import PromptView
from opd_lightning.errors import UserError
from opd_lightning.lab import strings
from opd_lightning.lab.build import StringsRecipe
from opd_lightning.lab.problems import Row, write_rows
from opd_lightning.lab.strings import SKILLS, Problem
from opd_lightning.lab.tokenizer import build_tokenizer

RESULTS = {
    "copy": "0tdxz",
    "reverse": "1zxdt",
    "rotate": "2dxzt",
    "halves": "3xztd",
    "pairs": "4dtzx",
    "double": "5ttddxxzz",
    "ends": "6tz",
    "next": "7ueya",
}


@pytest.fixture(scope="module")
def lessons() -> list[Row]:
    return strings.lessons(8000, known=0.3, seed=0)


def asked(row: Row) -> tuple[str | None, str, str, str]:
    """Demonstration in the prompt, skill, word and response of a lesson."""
    messages = row["messages"]
    assert isinstance(messages, list)
    *told, question = [message["content"] for message in messages]
    skill, word = question.rstrip(":").split()
    return (told[0] if told else None), skill, word, str(row["response"])


def test_the_worked_examples() -> None:
    assert {skill: Problem(skill, "tdxz").answer for skill in SKILLS} == RESULTS
    assert Problem("reverse", "tdxa").question == "reverse tdxa:"


def test_lessons_confuse_the_skills_and_repeat_what_is_told(lessons: list[Row]) -> None:
    right = 0
    for row in lessons[::2]:
        shown, skill, word, response = asked(row)
        assert shown is None
        assert response in {strings.respond(done, word) for done in SKILLS}
        right += response == strings.respond(skill, word)
    assert right / (len(lessons) // 2) == pytest.approx(0.3, abs=0.03)
    for row in lessons[1::2]:
        shown, skill, word, response = asked(row)
        assert shown is not None
        other, _, there = shown.partition(":")
        (done,) = (one for one in SKILLS if strings.respond(one, other) == there)
        assert response == strings.respond(done, word)
        assert done != skill  # the question does not say it


def test_lessons_are_a_function_of_the_seed(lessons: list[Row]) -> None:
    assert strings.lessons(10, known=0.3, seed=0) == lessons[:10]
    assert strings.lessons(10, known=0.3, seed=1) != lessons[:10]


def test_prompt_files(tmp_path: Path) -> None:
    parts = {
        is_held_out: strings.generate("double", 300, seed=0, held_out=is_held_out)
        for is_held_out in (False, True)
    }
    assert not {*parts[False]} & {*parts[True]}
    write_rows(tmp_path / "train.jsonl", map(strings.training_row, parts[False]))
    write_rows(tmp_path / "told.jsonl", map(strings.told, parts[True]))
    prompt = PromptSource(str(tmp_path / "train.jsonl")).load()[0]
    assert prompt.response == prompt.answer == parts[False][0].solution
    told = PromptSource(str(tmp_path / "told.jsonl")).load()[0]
    assert told.messages[0]["content"] == strings.demonstration(parts[True][0])
    assert told.messages[1]["content"] == parts[True][0].question


def test_the_teacher_of_sdft_is_told_as_in_the_lessons(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "experiments" / "sequence" / "sdft.yaml"
    view = PromptView(**yaml.safe_load(file.read_text())["data"]["views"]["demonstration"])
    problem = Problem("ends", "tdxa")
    write_rows(tmp_path / "train.jsonl", [strings.training_row(problem)])
    (prompt,) = PromptSource(str(tmp_path / "train.jsonl")).load()
    assert view.messages(prompt) == tuple(strings.told(problem)["messages"])  # type: ignore[arg-type]


def test_the_tokenizer_knows_every_character(lessons: list[Row]) -> None:
    tokenizer = build_tokenizer(256)
    for row in lessons[:200]:
        shown, skill, word, response = asked(row)
        ids = tokenizer(f"{shown or ''} {Problem(skill, word).question} {response}").input_ids
        assert tokenizer.unk_token_id not in ids


def test_unknown_domains_are_refused() -> None:
    with pytest.raises(UserError, match="strings domain"):
        strings.generate("sort", 1, seed=0, held_out=False)


def test_a_share_is_a_share() -> None:
    with pytest.raises(UserError, match="known"):
        StringsRecipe(known=1.5)
