"""Mutated inputs are used whole, or refused in one line; cases that once were not stay so."""

import pytest

from tests.fuzz.__main__ import Fuzzer, cases, fuzz
from tests.fuzz.kinds import KINDS

SECONDS = 10.0  # for each kind, after it has started


@pytest.mark.parametrize("name", KINDS)
def test_kept_cases(name: str) -> None:
    given = [*cases(name)]
    if not given:
        pytest.skip("none is kept")
    with Fuzzer(name) as fuzzer:
        broken = {case: fuzzer.run(one)[1] for case, one in given}
    assert {case: found for case, found in broken.items() if found} == {}


@pytest.mark.parametrize("name", KINDS)
def test_new_inputs(name: str) -> None:
    tally = fuzz(name, seconds=SECONDS)
    assert tally.inputs > 0
    assert tally.rules == {}
