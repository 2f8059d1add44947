"""Programs as responses: right, wrong and hostile ones, in both kinds of sandbox."""

import ctypes
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from opd_lightning.errors import UserError
from opd_lightning.types import Prompt
from opd_lightning.verifiers import CodeVerifier
from opd_lightning.verifiers.code import verifier as verifier_module
from opd_lightning.verifiers.code.sandbox import Kind, Sandbox
from opd_lightning.verifiers.code.tests import parse_tests, program_of, same_output

DOUBLE = "def f(x):\n    return x * 2\n"
TESTS = "assert f(2) == 4\nassert f([1]) == [1, 1]"
LIMIT = 0.5


def prompt(answer: str, number: int = 0) -> Prompt:
    message = {"role": "user", "content": "?"}
    return Prompt(id=str(number), messages=(message,), answer=answer, origin="p.jsonl:3")  # type: ignore[arg-type]


def score(verifier: CodeVerifier, *pairs: tuple[str, str]) -> list[float]:
    prompts = [prompt(answer, i) for i, (_, answer) in enumerate(pairs)]
    return verifier.verify(prompts, [program for program, _ in pairs])


@pytest.fixture(scope="module", params=["bubblewrap", "limits"])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    try:
        Sandbox(kind, packages=False)
    except UserError as error:
        pytest.skip(str(error))
    return kind


@pytest.fixture
def verifier(kind: Kind) -> CodeVerifier:
    return CodeVerifier(timeout_seconds=60, sandbox=kind)


@pytest.fixture
def strict(kind: Kind) -> CodeVerifier:
    return CodeVerifier(timeout_seconds=LIMIT, sandbox=kind)


def doing(line: str, before: str = "") -> str:
    """A program that is right if `line` runs."""
    return f"{before}\ndef f(x):\n    {line}\n    return x * 2\n"


RIGHT = {
    "plain": (DOUBLE, TESTS),
    "fenced": (f"So:\n```python\n{DOUBLE}```\nDone.", TESTS),
    "prints": (f"for i in range(10000): print(i)\n{DOUBLE}", TESTS),
    "own folder": (doing("open('here', 'w').write('1')"), TESTS),
    "threads": (doing("t = Thread(target=int); t.start()", "from threading import Thread"), TESTS),
    "asyncio": (
        "import asyncio\nasync def g(x): return x * 2\ndef f(x): return asyncio.run(g(x))",
        TESTS,
    ),
    "candidate": (
        "def add(a, b): return a + b",
        "def check(c):\n    assert c(1, 2) == 3\ncheck(add)",
    ),
    "exception": (
        "def f(x): raise ValueError('no')",
        "try:\n    f(1)\n    ok = False\nexcept ValueError:\n    ok = True\nassert ok",
    ),
    "in place": ("def f(x): x.sort()", "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]"),
    "a class": (
        "class A:\n  def __init__(s, n=1): s.n = n\n  def more(s, x): return A(s.n + x)",
        "a = A()\nassert a.n == 1\nassert A(2).more(5).n == 7",
    ),
    "collections": (
        "from collections import Counter\ndef f(s): return Counter(s)",
        "assert f('aab') == {'a': 2, 'b': 1}",
    ),
    "floats": (
        "import math\ndef f(x): return math.sqrt(x)",
        "assert math.isclose(f(2), 1.41421356237)\nassert f(4) == 2\n"
        "assert math.isnan(f(math.nan))",
    ),
    "an iterator": ("def f(n):\n  for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2]"),
    "standard input": (
        "def main():\n    print(int(input()) * 2)\nif __name__ == '__main__':\n    main()",
        json.dumps({"inputs": ["3\n", "5"], "outputs": ["6\n", "10"]}),
    ),
    "a list": ("print(input()[::-1])", json.dumps([{"input": "ab", "output": "ba\n"}])),
    "mbpp": (DOUBLE, json.dumps(["assert f(2) == 4", "assert f('a') == 'aa'"])),
    "fn_name": (
        "def two(a, b): return a + b",
        json.dumps({"fn_name": "two", "inputs": [[1, 2], ["a", "b"]], "outputs": [3, "ab"]}),
    ),
    "values of APPS": (
        "def pair(a): return (a, (a,)) if a else {a: 1} if a is not None else []",
        json.dumps(
            {
                "fn_name": "pair",
                "inputs": [[1], [2], [0], [None], [None]],
                "outputs": [[1, [1]], [[2, [2]]], {"0": 1}, [], [[]]],
            }
        ),
    ),
    "a method": (
        "class Solution:\n  def two(self, a): return [a]",
        json.dumps({"fn_name": "two", "inputs": [[1]], "outputs": [[1]]}),
    ),
    "exit": ("print(int(input()) * 2)\nexit()", json.dumps([{"input": "3", "output": "6"}])),
    "an indented block": ("1. So:\n   ```python\n   def f(x):\n     return x * 2\n   ```", TESTS),
    "packages are not there": (
        "try:\n    import torch\nexcept ImportError:\n    def f(x): return x * 2",
        TESTS,
    ),
}
# What a sandbox has to let through; the others are computed alike in each.
CONFINED = (
    *("prints", "own folder", "threads", "asyncio", "standard input"),
    "packages are not there",
)
CASES = json.dumps([{"input": "3", "output": "6"}])
WRONG = {
    "wrong": ("def f(x): return x + 2", TESTS),
    "no program": ("I cannot.", TESTS),
    "empty": ("", TESTS),
    "exit": ("import sys\nsys.exit(0)", TESTS),
    "values of APPS": (
        "def f(x): return [[x]]",
        json.dumps({"fn_name": "f", "inputs": [[1]], "outputs": [[1]]}),
    ),
    "exit in a call": ("import os\ndef f(x): os._exit(0)", TESTS),
    "equal to all": (
        "class E(list):\n  def __eq__(s, o): return True\ndef f(x): return E()",
        TESTS,
    ),
    "truth": (
        "class E:\n  def __bool__(s): return True\ndef f(x): return E()",
        "assert f(1) is True",
    ),
    "patched": (
        "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.all = lambda x: True\n"
        "def f(x): return 0",
        "assert all(f(i) == 2 * i for i in range(3))",
    ),
    "forged": (
        "import os\nfor fd in range(3, 20):\n  try: os.write(fd, b'{\"value\": 4}\\n' * 9)\n"
        "  except OSError: pass\ndef f(x): return 0",
        TESTS,
    ),
    "not a value": ("import sys\ndef f(x): return sys", TESTS),
    "too deep": ("def f(x):\n  a = []\n  for i in range(10**5): a = [a]\n  return a", TESTS),
    "a flood": (doing("os.write(1, b'x' * 10**9)", "import os"), "assert f('x' * 9**9) == 1"),
    "memory": (doing("a = 'x' * 10**11"), TESTS),
    "fork": ("import os\nwhile True: os.fork()", TESTS),
    "a process": (doing("subprocess.run(['true'])", "import subprocess"), TESTS),
    "home": (doing(f"open({str(Path(__file__))!r}).read()"), TESTS),
    "outside": (doing("open('/usr/x', 'w').write('1')"), TESTS),
    "sockets": (doing("socket.socket()", "import socket"), TESTS),
    "the parent": (doing("os.kill(os.getppid(), 9)", "import os"), TESTS),
    "more memory": (
        doing("resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "import resource"),
        TESTS,
    ),
    "another program": ("import os\ndef f(x): os.execv('/bin/true', ['true'])", TESTS),
    "output": (
        "print(6)",
        json.dumps([{"input": "3", "output": "6"}, {"input": "4", "output": "8"}]),
    ),
    "exit code": ("print(6)\nraise SystemExit(3)", CASES),
    "too much output": ("while True: print('x' * 1000)", CASES),
    "slow input": ("while True: pass", CASES),
    "loop": ("while True: pass", TESTS),
    "loop in a call": ("def f(x):\n  while True: pass", TESTS),
    "swallows": (
        "def f(x):\n  while True:\n    try:\n      while True: pass\n"
        "    except BaseException: pass",
        TESTS,
    ),
}


def test_right_programs_score_1() -> None:
    scores = score(CodeVerifier(timeout_seconds=60), *RIGHT.values())
    assert dict(zip(RIGHT, scores, strict=True)) == dict.fromkeys(RIGHT, 1.0)


def test_a_sandbox_lets_right_programs_work(verifier: CodeVerifier) -> None:
    scores = score(verifier, *(RIGHT[name] for name in CONFINED))
    assert dict(zip(CONFINED, scores, strict=True)) == dict.fromkeys(CONFINED, 1.0)


@pytest.fixture
def adopting() -> Iterator[None]:
    """Make this process the parent of all its descendants' orphans."""
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    yield
    libc.prctl(36, 0, 0, 0, 0)


def children() -> list[str]:
    """Return the command lines of this process's children that are programs, zombies left out."""
    lines = []
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in path.read_text().split():
            with suppress(OSError):
                lines.append(Path("/proc", pid, "cmdline").read_text())
    return [line for line in lines if "child.py" in line]


@pytest.mark.usefixtures("adopting")
def test_wrong_and_hostile_programs_score_0_and_leave_nothing(
    strict: CodeVerifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    began = time.monotonic()
    scores = score(strict, *WRONG.values())
    seconds = time.monotonic() - began
    assert dict(zip(WRONG, scores, strict=True)) == dict.fromkeys(WRONG, 0.0)
    slow = sum("loop" in name or name in ("slow input", "swallows") for name in WRONG)
    assert seconds < 1.2 * LIMIT * slow + 20
    assert list(tmp_path.iterdir()) == []
    end = time.monotonic() + 10
    while (left := children()) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []


def test_the_first_failing_test_is_the_feedback(verifier: CodeVerifier) -> None:
    cases = json.dumps([{"input": "2", "output": "4"}, {"input": "3", "output": "6"}])
    pairs = [
        (DOUBLE, TESTS),
        ("def f(x): return 4", TESTS),
        ("print(4)", cases),
        ("def f(x): return 1 / 0", TESTS),
        ("raise SystemExit(3)", cases),
    ]
    prompts = [prompt(answer, i) for i, (_, answer) in enumerate(pairs)]
    programs = [program for program, _ in pairs]
    verifier.verify(prompts, programs)
    said = list(verifier.feedback(prompts, programs))
    assert said == [
        None,
        "assert f([1]) == [1, 1]: got 4",
        "input '3': expected '6', got output '4\\n'",
        "assert f(2) == 4: ZeroDivisionError: division by zero",
        "input '2': expected '4', got exit code 3",
    ]
    verifier.verify(prompts[:1], programs[:1])  # as another thread may
    assert verifier.feedback(prompts[1:2], programs[1:2]) == said[1:2]


def test_partial_scores_are_shares_of_tests() -> None:
    tests = "\n".join(f"assert f({i}) == {2 * i if i < 3 else 0}" for i in range(4))
    cases = json.dumps([{"input": str(i), "output": "2"} for i in (1, 2)])
    pairs = [(DOUBLE, tests), ("print(int(input()) * 2)", cases), ("print(1)", cases)]
    assert score(CodeVerifier(partial=True), *pairs) == [0.75, 0.5, 0.0]


def test_programs_may_import_packages_if_told() -> None:
    program = "import numpy\ndef f(x): return numpy.array(x).sum()"
    tests = "assert f([1, 2]) == 3"
    assert score(CodeVerifier(packages=True), (program, tests)) == [1]
    assert score(CodeVerifier(), (program, tests)) == [0]


def test_programs_of_a_step_run_at_the_same_time() -> None:
    """Four at a time; on a busy machine their starts may take turns."""
    verifier = CodeVerifier(max_workers=4, timeout_seconds=5)
    sleep = "import time\ntime.sleep(0.5)\n" + DOUBLE
    verifier.verify([prompt(TESTS)], [DOUBLE])  # finds the sandbox
    began = time.monotonic()
    assert score(verifier, (sleep, TESTS)) == [1]
    alone = time.monotonic() - began
    began = time.monotonic()
    assert score(verifier, *[(sleep, TESTS)] * 8) == [1] * 8
    assert time.monotonic() - began < 0.75 * 8 * alone


def test_programs_beyond_the_step_s_time_have_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(verifier_module.log, "warning", lambda text, *of: warned.append(text % of))
    verifier = CodeVerifier(max_workers=1, timeout_seconds=30, step_seconds=1)
    scores = score(verifier, ("while True: pass", TESTS), (DOUBLE, TESTS))
    assert all(score != score for score in scores)
    (line,) = warned
    assert "2 of 2 programs are not verified" in line


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("f(2) == 4", "no assert"),
        ("assert f(2", "no Python"),
        ("[]", "expected asserts"),
        ('{"inputs": ["1"], "outputs": []}', "1 'inputs' for 0 'outputs'"),
        ('{"inputs": [], "outputs": []}', "no tests"),
        ('{"inputs": ["1"], "outputs": [" "]}', "empty"),
        ('{"inputs": [1], "outputs": ["1"]}', "texts"),
        ('{"inputs": [1], "outputs": ["1"], "fn_name": "f"}', "arguments"),
        ('{"inputs": [[1]], "outputs": ["1"], "fn_name": "f()"}', "fn_name"),
        ('[{"input": "1"}]', "output"),
        ('[{"input": "1", "output": "1", "testtype": "functional"}]', "fn_name"),
    ],
)
def test_tests_that_cannot_be_read_are_refused_with_the_row(answer: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as refused:
        CodeVerifier().check([prompt(answer)])
    assert str(refused.value).startswith("p.jsonl:3: CodeVerifier cannot read the tests")


def test_numbers_are_checked_and_a_sandbox_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for settings in ({"memory_mb": 1}, {"max_workers": 0}, {"timeout_seconds": 0.0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            CodeVerifier(**settings)
    from opd_lightning.verifiers.code import sandbox

    missing = sandbox.Found(None, "it is not installed")
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda: missing)
    with pytest.raises(UserError, match="it is not installed"):
        Sandbox("bubblewrap", packages=False)
    assert str(Sandbox("auto", packages=False)) == "processes with limits"


def test_programs_are_found_in_responses() -> None:
    assert program_of("print(1)") == "print(1)"
    assert program_of("```\na\n```\ntext\n```Python\nb\n```\n```sh\nc\n```") == "b\n"
    assert program_of("```python\na\n``` and `x`") == "a\n"
    assert program_of("```python\na\n```\nIt prints:\n```\n5\n```\n") == "a\n"
    assert program_of("```\na\n```\n```sh\nc\n```") == "a\n"


def test_outputs_are_compared_by_line() -> None:
    assert same_output("1 \n2\n\n", "1\n2")
    assert not same_output("1\n\n2", "1\n2")
    assert not same_output(" 1", "1")
    assert parse_tests('[{"input": "", "output": "1"}]').cases == (("", "1"),)
