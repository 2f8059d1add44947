"""Mutated inputs are used whole, or refused in one line; cases that once were not stay so."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest

from tests.fuzz.__main__ import Fuzzer, cases, fuzz
from tests.fuzz.kinds import KINDS

# Of seed 0, the first ones: the same on a fast machine and a slow one.  `make fuzz` runs more.
INPUTS = {
    "configurations": 3,
    "prompt_files": 3,
    "model_folders": 4,
    "checkpoints": 2,
    "requests": 100,
    "responses": 10,
}


FuzzerOf = Callable[[str], Fuzzer]


@pytest.fixture(scope="module")
def fuzzer_of() -> Iterator[FuzzerOf]:
    """Return a function from kinds to fuzzers, which are prepared once: that may train a run."""
    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(Fuzzer(name)))


@pytest.mark.parametrize("name", [name for name in KINDS if [*cases(name)]])
def test_kept_cases(name: str, fuzzer_of: FuzzerOf) -> None:
    fuzzer = fuzzer_of(name)
    broken = {case: fuzzer.run(given)[1] for case, given in cases(name)}
    assert {case: found for case, found in broken.items() if found} == {}


@pytest.mark.parametrize("name", KINDS)
def test_new_inputs(name: str, fuzzer_of: FuzzerOf) -> None:
    tally = fuzz(fuzzer_of(name), inputs=INPUTS[name])
    assert tally.inputs == INPUTS[name]
    assert tally.rules == {}
