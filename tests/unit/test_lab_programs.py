"""The lab's string programs: tasks, solutions, and the verifier that interprets them."""

import json
import random
import string
from typing import Any

import pytest

from opd_lightning.errors import UserError
from opd_lightning.lab import problems, programs
from opd_lightning.lab.program_verifier import ProgramVerifier
from opd_lightning.lab.programs import Operation, Problem
from opd_lightning.lab.tokenizer import build_tokenizer
from opd_lightning.types import Prompt
from opd_lightning.verifiers import CodeVerifier

DOUBLED = Problem("program-2", (Operation("append", "a"), Operation("double")))


def prompt(answer: str) -> Prompt:
    return Prompt(id="p", messages=({"role": "user", "content": "q"},), answer=answer)


def run_by_python(program: str, text: str) -> Any:
    names: dict[str, Any] = {}
    exec(program, names)
    return names["f"](text)


@pytest.fixture(scope="module")
def drawn() -> list[Problem]:
    return programs.generate("program-2", 500, seed=1, held_out=False)


def test_the_worked_examples() -> None:
    assert DOUBLED.question == "append a,double:"
    assert DOUBLED.solution == "f=lambda s:(s+'a')*2"
    upper = Problem("program-2", (Operation("upper"), Operation("prepend", "x")))
    assert upper.question == "upper,prepend x:"
    assert upper.solution == "f=lambda s:'x'+s.upper()"
    long = Problem("program-3", (*DOUBLED.operations, Operation("strip", "q")))
    assert long.solution == "f=lambda s:((s+'a')*2).strip('q')"


def test_solutions_pass_by_python_and_by_the_verifier(drawn: list[Problem]) -> None:
    for problem in drawn:
        tests = json.loads(problem.answer)
        found = [run_by_python(problem.solution, text) for (text,) in tests["inputs"]]
        assert found == tests["outputs"]
    prompts = [prompt(problem.answer) for problem in drawn]
    ProgramVerifier().check(prompts)
    solutions = [problem.solution for problem in drawn]
    assert ProgramVerifier().verify(prompts, solutions) == [1.0] * len(drawn)


def test_the_texts_tell_programs_apart(drawn: list[Problem]) -> None:
    """A program without an operation, or in the other order, fails unless it is equivalent."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(string.ascii_letters, k=4)) for _ in range(200)]
    texts += [letter + text + letter for text in texts for letter in rng.choice(texts)]
    compared = 0
    for problem in drawn:
        first, second = problem.operations
        for operations in ((first,), (second,), (second, first)):
            other = Problem("program-2", operations)
            if all(other.apply(text) == problem.apply(text) for text in texts):
                continue
            compared += 1
            assert ProgramVerifier().verify([prompt(problem.answer)], [other.solution]) == [0.0]
    assert compared > 2 * len(drawn)


def test_problems_are_distinct_and_parts_disjoint(drawn: list[Problem]) -> None:
    assert drawn == programs.generate("program-2", 500, seed=1, held_out=False)
    held_out = programs.generate("program-2", 100, seed=1, held_out=True)
    assert len(set(drawn)) == 500
    assert not {problem.question for problem in drawn} & {problem.question for problem in held_out}
    assert all(map(problems.is_held_out, held_out))


def test_the_tokenizer_knows_every_character(drawn: list[Problem]) -> None:
    tokenizer = build_tokenizer(256)
    text = "".join(problem.question + problem.solution for problem in drawn)
    assert tokenizer.unk_token_id not in tokenizer.encode(text, add_special_tokens=False)
    assert max(len(problem.solution) for problem in drawn) < 40  # max_new_tokens of the configs


@pytest.mark.parametrize("domain", ["program", "program-0", "add-2", "program-x"])
def test_unknown_domains_are_refused(domain: str) -> None:
    with pytest.raises(UserError, match="program-<operations>"):
        programs.generate(domain, 1, seed=0, held_out=False)


RIGHT = (
    DOUBLED.solution,
    "f=lambda s:s+'a'+s+'a'",
    'f = lambda text: 2 * (text + "a")\n',
)
WRONG = (
    "f=lambda s:s+'a'*2",  # the parentheses are missing
    "f=lambda s:(s+'a')*2)",
    "f=lambda s:(s+1)*2",
    "f=lambda s:(t+'a')*2",
    "f=lambda s:s.nothing()",
    "f=lambda s:s.strip(1)",
    "f=lambda:('a')*2",
    "f=(s+'a')*2",
    "g=lambda s:(s+'a')*2",
    "",
)


def test_it_agrees_with_running_the_programs_in_a_sandbox() -> None:
    """On a part that needs the sandbox; see below for all."""
    chosen = [*RIGHT[:2], *WRONG[:2], WRONG[4]]
    prompts = [prompt(DOUBLED.answer)] * len(chosen)
    verifiers = (ProgramVerifier(), CodeVerifier(sandbox="auto", timeout_seconds=60))
    ours, theirs = (verifier.verify(prompts, chosen) for verifier in verifiers)
    assert ours == theirs == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_scores_of_programs() -> None:
    hostile = (
        "f=lambda s:" + "(" * 5000,
        "f=lambda s:s*9999999*9999999",
        "f=lambda s:s" + "+s" * 5000,
        "f=lambda s:(lambda:0)()",
        "f=lambda s:__import__('os')",
        "f=lambda s,t=[]:(s+'a')*2",
        "\0",
        "\ud800",
        "0or",
    )
    texts = [*RIGHT, *WRONG, *hostile]
    scores = ProgramVerifier().verify([prompt(DOUBLED.answer)] * len(texts), texts)
    assert scores == [1.0] * len(RIGHT) + [0.0] * (len(WRONG) + len(hostile))


@pytest.mark.parametrize(
    "answer",
    [
        "ab",
        "[]",
        '{"inputs": [], "outputs": []}',
        '{"inputs": [["a"]], "outputs": []}',
        '{"inputs": ["ab"], "outputs": ["c"]}',
        '{"inputs": [["a"]], "outputs": [1]}',
    ],
)
def test_answers_that_are_no_tests_are_refused(answer: str) -> None:
    with pytest.raises(UserError, match="'answer'"):
        ProgramVerifier().check([prompt(answer)])
