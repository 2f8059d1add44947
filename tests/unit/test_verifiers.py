"""Verifiers: what counts as right, and workers that hang, die or are signalled."""

import copy
import functools
import logging
import math
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from opd_lightning.errors import RunStoppedError, UserError
from opd_lightning.types import Prompt
from opd_lightning.verifiers import ExactMatch, MathVerifier, RegexMatch, Verifier
from opd_lightning.verifiers.math import final_answer, is_parsable, is_right
from opd_lightning.verifiers.patterns import most_steps
from opd_lightning.verifiers.workers import Workers

HANGS = r"So it is \boxed{9^{9^{9^{9}}}}."  # sympy works it out, in C code, for longer than we live
LIMIT = 1.0


def prompt(answer: str | None, origin: str = "train.jsonl:3") -> Prompt:
    message = {"role": "user", "content": "?"}
    return Prompt(id="p", messages=(message,), answer=answer, origin=origin)  # type: ignore[arg-type]


def score(verifier: Verifier, *pairs: tuple[str, str]) -> list[float]:
    return verifier.verify([prompt(answer) for answer, _ in pairs], [text for _, text in pairs])


STRANGERS: set[int] = set()  # children that tests of other modules left in this process


def children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def worker_pids() -> list[int]:
    return [pid for pid in children() if pid not in STRANGERS]


def start_all(checker: MathVerifier) -> None:
    """Return once each worker has done something."""
    while len(set(checker.workers.map(os.getpid, [()] * 8))) < checker.workers.count:
        time.sleep(0.05)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """Start in two CPU seconds, so tests hand them on."""
    STRANGERS.update(children())
    workers = MathVerifier().workers
    yield workers
    workers.close()


@pytest.fixture
def checker(workers: Workers) -> Iterator[MathVerifier]:
    """A new verifier, but for workers that an earlier test left behind."""
    verifier = MathVerifier(timeout_seconds=LIMIT)
    vars(workers).update(vars(verifier.workers) | {"_pool": workers._pool})
    verifier.workers = workers
    prepare = workers.prepare
    yield verifier
    if workers.prepare is not prepare:
        workers.close()


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
    ("x^2+1", "$1+x^2$"),
    ("[1,2)", r"\boxed{[1, 2)}"),
    (r"$2\sqrt{3}$", r"\boxed{\sqrt{12}}"),
    (r"\boxed{7}", r"\boxed{7}"),
    (r"\text{Monday}", r"\boxed{Monday}"),
]
WRONG = [
    ("42", r"so \boxed{43}"),
    ("42", ""),
    ("x^2+1", "$1-x^2$"),
    ("[1,2)", r"\boxed{[1, 2]}"),
]


def test_math_equality(checker: MathVerifier) -> None:
    checker.workers.timeout_seconds = 60  # a busy machine is no wrong answer
    assert score(checker, *RIGHT, *WRONG) == [1] * len(RIGHT) + [0] * len(WRONG)
    assert score(checker) == []
    assert checker.timeouts == 0


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(UserError, match=r"^MathVerifier: 'max_workers' must be at least 1, got 0$"):
        MathVerifier(max_workers=0)
    kinds: list[Any] = [MathVerifier, ExactMatch, functools.partial(RegexMatch, "x")]
    for verifier in kinds:
        for limit in ("timeout_seconds", "step_seconds"):
            for value in (0, -1, math.nan, math.inf):
                with pytest.raises(UserError, match=limit):
                    verifier(**{limit: value})


def test_a_hanging_response_is_killed_and_the_others_are_scored(
    checker: MathVerifier, caplog: pytest.LogCaptureFixture
) -> None:
    start_all(checker)  # so that the clock below shows the limit alone
    before = set(worker_pids())
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        scores = score(checker, ("2", "2"), ("2", HANGS), ("2", "3"), ("2", r"\boxed{2}"))
    assert scores == [1, 0, 0, 1]
    assert LIMIT < time.monotonic() - start < LIMIT + 2  # a hung worker is killed at once
    assert checker.timeouts == 1
    assert len(before & set(worker_pids())) == 1

    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        assert score(checker, ("2", HANGS), ("2", "2"), ("2", HANGS), ("2", "2")) == [0, 1, 0, 1]
    assert checker.timeouts == 3
    (record,) = caplog.records
    assert "gave up on a response after 1.0 s or a crash (TimeoutError)" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_crash_costs_one_response(checker: MathVerifier) -> None:
    checker.workers.timeout_seconds = 60
    start_all(checker)
    scores: list[float] = []
    batch = [("2", HANGS), ("2", HANGS), ("2", "2"), ("2", "3")]
    thread = threading.Thread(target=lambda: scores.extend(score(checker, *batch)))
    thread.start()
    time.sleep(0.5)  # both workers are busy with their hanging responses
    for pid in worker_pids():
        os.kill(pid, signal.SIGKILL)
    thread.join(30)
    assert scores == [0, 0, 1, 0]
    assert checker.timeouts == 2


def test_idle_workers_may_be_killed(checker: MathVerifier) -> None:
    start_all(checker)
    for pid in worker_pids():
        os.kill(pid, signal.SIGKILL)
    assert score(checker, ("2", "2"), ("2", "3")) == [1, 0]
    assert checker.timeouts == 0


def test_workers_that_are_killed_again_and_again_leave_responses_without_a_score(
    checker: MathVerifier, caplog: pytest.LogCaptureFixture
) -> None:
    score(checker, ("1", "1"))
    checker.workers.prepare = functools.partial(os._exit, 3)  # of those that come after
    for pid in worker_pids():
        os.kill(pid, signal.SIGKILL)
    with caplog.at_level(logging.WARNING, logger="opd_lightning"):
        scores = score(checker, ("2", "2"), ("2", "3"))
        assert checker.answers(["2"]) == [None]
    assert [math.isnan(value) for value in scores] == [True, True]
    assert (checker.timeouts, checker.workers.not_called) == (0, 3)
    (record,) = caplog.records
    assert "2 of 2 responses are not verified" in record.getMessage()


def test_a_step_s_verification_is_bounded(checker: MathVerifier) -> None:
    """Unchecked responses do not count as wrong."""
    checker.workers.timeout_seconds = 60
    score(checker, ("1", "1"))
    checker.workers.step_seconds = 2 * LIMIT
    start = time.monotonic()
    scores = score(checker, ("2", "2"), *[("2", HANGS)] * 4, ("2", "2"))
    assert time.monotonic() - start < 2 * LIMIT + 3
    assert scores[0] == 1
    assert all(map(math.isnan, scores[1:]))
    assert (checker.timeouts, checker.workers.not_called) == (0, 5)
    checker.workers.step_seconds = 60
    assert score(checker, ("2", "2")) == [1]  # by new workers


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
        start = time.monotonic()
        assert score(found, ("", "aab"), ("", "a" * 60), ("", "b")) == [1, 0, 0]
        assert time.monotonic() - start < LIMIT + 2
        assert score(exact, ("aab", "so aab"), ("aab", "a" * 60)) == [1, 0]
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


def test_the_signals_of_a_job_reach_only_our_own_handlers(checker: MathVerifier) -> None:
    caught: list[int] = []

    def handler(number: int, _: FrameType | None) -> None:
        caught.append(number)

    numbers = (signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, handler) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    stop = threading.Event()

    def shower() -> None:
        """Signal the workers from their first moment on, and this process for SIGALRM."""
        while not stop.wait(0.02):
            os.kill(os.getpid(), signal.SIGALRM)
            for pid in worker_pids():
                os.kill(pid, signal.SIGUSR1)
                os.kill(pid, signal.SIGUSR2)

    checker.close()
    thread = threading.Thread(target=shower)
    thread.start()
    try:
        assert score(checker, ("2", "2"), ("2", HANGS), ("2", "3"), ("2", "2")) == [1, 0, 0, 1]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert [signal.getsignal(number) for number in numbers] == [handler] * 3
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    finally:
        stop.set()
        thread.join()
        for number, old in before.items():
            signal.signal(number, old)
    assert checker.timeouts == 1
    assert caught.count(signal.SIGALRM) > 10
    assert caught.count(signal.SIGUSR1) == 1


def test_answers_for_a_vote(checker: MathVerifier) -> None:
    texts = [r"So \boxed{\frac{1}{2}}", r"\boxed{1/2}.", "It is $3$.", "I do not know", HANGS]
    assert checker.answers(texts) == ["1/2", "1/2", "3", None, "9**(9**(9**9))"]
    tagged = ExactMatch(pattern=r"=(\w+)", ignore_case=True)
    assert tagged.answers(["=A", "a =a", "b"]) == ["a", "a", None]
    assert RegexMatch("a").answers(["a"]) is None  # it returns whether, not which


def test_other_threads_may_verify_at_the_same_time(checker: MathVerifier) -> None:
    results: dict[int, list[float]] = {}

    def work(n: int) -> None:
        results[n] = score(checker, (f"{n}", f"{n}"), (f"{n}", f"{n + 1}"), (f"{n}", HANGS))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [1, 0, 0] for n in range(2)}
    assert checker.timeouts == 2


def test_a_copy_has_the_settings_and_no_workers(checker: MathVerifier) -> None:
    score(checker, ("1", "1"))
    before = worker_pids()
    for twin in (copy.deepcopy(checker), pickle.loads(pickle.dumps(checker))):
        workers = twin.workers
        assert (workers.count, workers.timeout_seconds, twin.timeouts) == (2, LIMIT, 0)
        twin.close()
    assert worker_pids() == before


@pytest.mark.parametrize("size", [1, 100_000])
def test_workers_that_cannot_start_are_an_error_and_not_a_hang(
    checker: MathVerifier, size: int
) -> None:
    # The large batch does not fit in the pipe to the workers, so pebble's thread is stuck in it.
    checker.close()
    checker.workers.prepare = functools.partial(os._exit, 3)
    with pytest.raises(RunStoppedError, match="worker processes die before they check anything"):
        score(checker, *[("1", "1" * size)] * 8)
    checker.close()
    assert worker_pids() == []


SCRIPT = """
import multiprocessing, sys, threading, time
from opd_lightning.verifiers import MathVerifier
assert not {"torch", "sympy", "math_verify", "pebble"} & set(sys.modules)

if __name__ == "__main__":
    from opd_lightning.types import Prompt

    prompt = Prompt(id="p", messages=({"role": "user", "content": "?"},), answer="2")
    verifier = MathVerifier(timeout_seconds=600)
    assert verifier.verify([prompt], ["2"]) == [1.0]
    work = threading.Thread(
        target=verifier.verify, args=([prompt] * 4, [sys.argv[1]] * 4), daemon=True
    )
    work.start()
    time.sleep(0.5)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[2] == "killed":
        time.sleep(600)
"""


def run(folder: Path, response: str, end: str) -> "subprocess.Popen[str]":
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), response, end]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize("response", [HANGS, pytest.param("2", marks=pytest.mark.slow)])
def test_the_program_ends_without_waiting_for_workers(tmp_path: Path, response: str) -> None:
    process = run(tmp_path, response, "ended")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    pids = [int(pid) for pid in output.split()]
    assert len(pids) == 2
    wait_until_gone(pids)


def test_idle_workers_follow_a_killed_program(tmp_path: Path) -> None:
    process = run(tmp_path, "2", "killed")
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.communicate(timeout=60)
    wait_until_gone(pids)
