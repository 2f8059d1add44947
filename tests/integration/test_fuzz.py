"""Mutated inputs are used whole, or refused in one line; cases that once were not stay so."""

import pytest

from tests.fuzz.__main__ import Fuzzer, cases, fuzz
from tests.fuzz.kinds import KINDS

# Of seed 0, the first ones: the same on a fast machine and a slow one.  `make fuzz` runs more.
INPUTS = {
    "configurations": 10,
    "prompt_files": 6,
    "model_folders": 12,
    "checkpoints": 3,
    "requests": 150,
    "responses": 25,
}


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
    tally = fuzz(name, inputs=INPUTS[name])
    assert tally.inputs == INPUTS[name]
    assert tally.rules == {}
