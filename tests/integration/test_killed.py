"""SIGKILL at random moments, and the same command again: the run ends as if nothing had happened.

`benchmarks/kills.py` does so hundreds of times, on a trained lab, with other engines and ranks.
"""

from pathlib import Path
from random import Random

import pytest

from tests.comparing import compare, scalars
from tests.full_run import CONFIG, RUN, fit_command, settings
from tests.killing import run_under_fire

STEPS = 6
KILLS = 1


@pytest.mark.timeout(900)
def test_a_run_that_is_killed_ends_as_one_that_is_not(untrained_lab: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        path = settings(folder, steps=STEPS)
        (folder / "lab").symlink_to(untrained_lab / "lab")
    command, random = fit_command(CONFIG, path), Random(0)
    quiet = run_under_fire(whole, command, kills=0, steps=STEPS, random=random)
    logged = scalars(whole / RUN)
    assert [step for step, _ in logged["loss"]] == list(range(STEPS))
    assert [step for step, _ in logged["val/sums/length"]] == [5]
    tale = run_under_fire(
        killed, command, kills=KILLS, steps=STEPS, random=random, startup=quiet.startup
    )
    assert len(tale.kills) == KILLS, tale
    assert not compare(killed, whole), tale
