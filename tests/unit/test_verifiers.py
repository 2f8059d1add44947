"""Verifiers: what counts as right; test_workers.py has workers that hang, die or are signalled."""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from opd_lightning.errors import UserError
from opd_lightning.types import Prompt
from opd_lightning.verifiers import ExactMatch, MathVerifier, RegexMatch, Verifier
from opd_lightning.verifiers.math import final_answer, is_parsable, is_right
from opd_lightning.verifiers.patterns import most_steps
from opd_lightning.verifiers.workers import Unfinished

HANGS = r"So it is \boxed{9^{9^{9^{9}}}}."  # sympy works it out, in C code, for longer than we live
LIMIT = 1.0


def prompt(answer: str | None, origin: str = "train.jsonl:3") -> Prompt:
    message = {"role": "user", "content": "?"}
    return Prompt(id="p", messages=(message,), answer=answer, origin=origin)  # type: ignore[arg-type]


def score(verifier: Verifier, *pairs: tuple[str, str]) -> list[float]:
    return verifier.verify([prompt(answer) for answer, _ in pairs], [text for _, text in pairs])


@pytest.fixture(scope="module")
def checker() -> Iterator[MathVerifier]:
    """Return a verifier whose workers take two CPU seconds to start; one test kills one."""
    checker = MathVerifier(timeout_seconds=60)  # a busy machine is no wrong answer
    yield checker
    checker.close()


def test_exact_match_compares_the_whole_response_by_default() -> None:
    pairs = [("12", " 12\n"), ("12", "12."), ("a\nb", "a\nb"), ("a", "A"), ("", "")]
    assert score(ExactMatch(), *pairs) == [1, 0, 1, 0, 1]
    assert score(ExactMatch(ignore_case=True), ("Yes", "yES"), ("Yes", "no")) == [1, 0]


def test_exact_match_takes_the_last_match_and_its_first_group() -> None:
    tagged = ExactMatch(pattern=r"<answer>(.*?)</answer>")
    assert score(
        tagged,
        ("2", "<answer>1</answer> no, <answer> 2 </answer>"),
        ("1", "<answer>1</answer> no, <answer>2</answer>"),
        ("2", "2"),
    ) == [1, 0, 0]
    assert score(ExactMatch(pattern=r"\d+"), ("7", "3, then 7!"), ("3", "3, then 7!")) == [1, 0]
    assert score(ExactMatch(pattern=r"x(\d)?"), ("1", "x1 x"), ("None", "x")) == [0, 0]


@pytest.mark.parametrize("kind", [ExactMatch, RegexMatch])
def test_a_bad_pattern_is_refused_in_one_line(kind: type[ExactMatch | RegexMatch]) -> None:
    with pytest.raises(UserError) as caught:
        kind(pattern="(\n")
    message = str(caught.value)
    assert message.startswith(kind.__name__)
    assert "'pattern' must be a regular expression, got '(\\n' (missing ), unterminated" in message
    assert "\n" not in message


NAMED = r"\b(?:i am|my name is)\s+zorba\b"


@pytest.mark.parametrize(
    ("response", "score_as_is", "score_without_case"),
    [
        ("i am zorba.", 1, 1),
        ("well, my name is  zorba", 1, 1),
        ("i am zorbax", 0, 0),
        ("hi am zorba", 0, 0),
        ("I am Zorba.", 0, 1),
        ("i am bot.\ni am\nzorba", 1, 1),
        ("zorba", 0, 0),
        ("", 0, 0),
    ],
)
def test_regex_match(response: str, score_as_is: float, score_without_case: float) -> None:
    assert score(RegexMatch(NAMED), ("", response)) == [score_as_is]
    assert score(RegexMatch(NAMED, ignore_case=True), ("", response)) == [score_without_case]


def test_regex_match_can_ask_for_the_absence_of_a_word() -> None:
    unnamed = RegexMatch(r"(?s)\A(?!.*zorba)")
    assert score(unnamed, ("", "i am bot."), ("", "no!\ni am zorba"), ("", "")) == [1, 0, 1]


def test_regex_match_needs_no_answer() -> None:
    RegexMatch("x").check([prompt(None)])
    assert RegexMatch("x").verify([prompt(None)], ["x"]) == [1]
    assert RegexMatch("x").verify([], []) == []
    with pytest.raises(ValueError, match="shorter"):
        RegexMatch("x").verify([prompt(None)], [])


@pytest.mark.parametrize("verifier", [ExactMatch(), MathVerifier()])
@pytest.mark.parametrize("answer", [None, "  "])
def test_a_prompt_without_an_answer_is_named(verifier: Verifier, answer: str | None) -> None:
    verifier.check([prompt("1")])
    with pytest.raises(UserError) as caught:
        verifier.check([prompt("1"), prompt(answer, "train.jsonl:17")])
    assert str(caught.value) == (
        f"train.jsonl:17: {type(verifier).__name__} needs an 'answer' to compare with, got "
        f"{answer!r}; add it to the row or train without a verifier"
    )


def test_unequal_lengths_are_our_own_bug() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ExactMatch().verify([prompt("1"), prompt("2")], ["1"])


RIGHT = [
    ("42", r"so \boxed{42}"),
    ("42", "first 3, then the answer is 42."),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    ("1,000", r"\boxed{1000}"),
    ("1000", r"\boxed{1\,000}"),
    (r"1\ 234\,567", r"$1{,}234{,}567$"),
    ("0.001", r"$\frac{1}{1~000}$"),
    ("-12345.5", r"\boxed{-12 345.5}"),
    ("2x", r"\boxed{2\,x}"),
    ("x^2+1", "$1+x^2$"),
    ("[1,2)", r"\boxed{[1, 2)}"),
    (r"$2\sqrt{3}$", r"\boxed{\sqrt{12}}"),
    (r"\boxed{7}", r"\boxed{7}"),
    (r"\text{Monday}", r"\boxed{Monday}"),
    ("5", r"\boxed{6}. Wait, that is wrong: \boxed{5}"),
    ("5", r"It goes into \boxed{}. So \boxed{5}."),
    ("5, 6", r"\boxed{6} and \boxed{5}"),
]
WRONG = [
    ("42", r"so \boxed{43}"),
    ("42", ""),
    ("6", r"\boxed{6}. Wait, that is wrong: \boxed{5}"),
    ("100", r"\boxed{1 00}"),
    ("1200", r"\boxed{(1,\,200)}"),
    ("x^2+1", "$1-x^2$"),
    ("[1,2)", r"\boxed{[1, 2]}"),
]


def test_math_equality(checker: MathVerifier) -> None:
    before = checker.timeouts
    assert score(checker, *RIGHT, *WRONG) == [1] * len(RIGHT) + [0] * len(WRONG)
    assert score(checker) == []
    assert checker.timeouts == before


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"^MathVerifier: 'max_workers' must be at least 1, got 0$"):
        MathVerifier(max_workers=0)
    kinds: list[Any] = [MathVerifier, ExactMatch, functools.partial(RegexMatch, "x")]
    for verifier in kinds:
        for limit in ("timeout_seconds", "step_seconds"):
            for value in (0, -1, math.nan, math.inf):
                with pytest.raises(UserError, match=limit):
                    verifier(**{limit: value})


def test_a_response_that_hangs_is_wrong_and_one_that_is_not_checked_has_no_score(
    checker: MathVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker.answers(["1"])  # start the workers
    monkeypatch.setattr(checker.workers, "timeout_seconds", LIMIT)
    before = checker.timeouts
    assert score(checker, ("2", HANGS)) == [0]
    assert checker.timeouts == before + 1
    monkeypatch.setattr(checker.workers, "map", lambda *_: [Unfinished.NOT_CALLED])
    assert math.isnan(*score(checker, ("2", "2")))
    assert checker.answers(["2"]) == [None]


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{" + r"\frac{1}{" * 500 + "1" + "}" * 500 + "}",
        "$" + "(" * 30 + "1" + ")" * 30 + "$",
        r"\boxed{" + "1" * 10**6 + "}",
        r"\boxed{" + ",".join(["1"] * 3000) + "}",
        r"\boxed{" * 10**4,
    ],
    ids=["fractions", "parentheses", "digits", "list", "boxes"],
)
def test_what_would_take_too_long_is_not_parsed(response: str) -> None:
    assert not is_parsable(response)
    assert not is_right("1", response)
    assert final_answer(response) is None
    assert not is_right(response, "1")
    with pytest.raises(UserError, match=r"train\.jsonl:3: MathVerifier cannot parse"):
        MathVerifier().check([prompt("1"), prompt(response)])


def test_what_takes_no_time_is_parsed_whatever_its_length() -> None:
    prose = "We have (12) apples, 1,000 pears and $x = {3}$. " * 2000
    assert is_parsable(prose + r"\boxed{12}")
    for answer, response in RIGHT:
        assert is_parsable(answer)
        assert is_parsable(response)


EXPONENTIAL = r"(?:a+)+b"


def test_patterns_have_a_time_limit() -> None:
    found = RegexMatch(EXPONENTIAL, timeout_seconds=LIMIT)
    exact = ExactMatch(EXPONENTIAL, timeout_seconds=LIMIT)
    try:
        score(found, ("", "b"))  # start the workers
        assert score(found, ("", "aab"), ("", "a" * 60), ("", "b")) == [1, 0, 0]
        assert score(exact, ("aab", "so aab")) == [1]
        assert exact.answers(["aab", "a" * 60]) == ["aab", None]
    finally:
        found.pattern.workers.close()
        exact.pattern.workers.close()


@pytest.mark.parametrize(
    ("pattern", "exponent"),
    [
        (r"(?s)\A.*\Z", 1),
        (r"\bi am\s+bot", 2),
        (r"[(*+]x{3}\+\*", 1),
        (r"<a>(.*?)</a>", 2),
        (r"(?P<x>.+)=(?P=x)", 3),
        (r"a{2,}b*+c", 3),
        (r"(?:a|b)*", math.inf),
        (r"(a){9}", math.inf),
        ("a*" * 200, math.inf),  # more than a float holds
        ("a?" * 2000, math.inf),
    ],
)
def test_the_steps_of_a_search_are_bounded(pattern: str, exponent: float) -> None:
    steps = most_steps(re.compile(pattern), 1000)
    assert steps == (math.inf if math.isinf(exponent) else pytest.approx(1000**exponent))


def test_long_texts_are_searched_where_the_search_can_be_killed() -> None:
    assert ExactMatch(r"<a>(.*?)</a>").pattern.longest_here == 2000  # 2000 ** 2 == STEPS_HERE
    assert RegexMatch(EXPONENTIAL).pattern.longest_here == -1
    assert RegexMatch("x{3}").pattern.longest_here == 4_000_000  # starts of a search


def test_answers_for_a_vote(checker: MathVerifier) -> None:
    texts = [r"So \boxed{\frac{1}{2}}", r"\boxed{1/2}.", "It is $3$.", "I do not know", HANGS]
    assert checker.answers(texts) == ["1/2", "1/2", "3", None, "9**(9**(9**9))"]
    tagged = ExactMatch(pattern=r"=(\w+)", ignore_case=True)
    assert tagged.answers(["=A", "a =a", "b"]) == ["a", "a", None]
    assert RegexMatch("a").answers(["a"]) is None  # it returns whether, not which
