"""Progress: bars for terminals, lines for logs, and nothing that is no news."""

from __future__ import annotations

import io
import re
import sys
import warnings

import pytest

from opd_lightning import progress, quiet
from opd_lightning.progress import Progress

SRUN = "The `srun` command is available on your system but is not used. HINT: If your intention"


class Terminal(io.StringIO):
    """What looks like one."""

    def isatty(self) -> bool:
        return True


def told(monkeypatch: pytest.MonkeyPatch, *, every: int = 1, stays: bool = True) -> list[str]:
    """The lines that a log gets of ten responses, one after the other."""
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress("generate", 10, "response", every=every, stays=stays) as bar:
        for number in range(10):
            bar.set_postfix_str(f"loss {number}", refresh=False)
            bar.update(1)
    return log.getvalue().splitlines()


def test_a_line_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    lines = told(monkeypatch, every=4)
    assert [line.split(",")[0] for line in lines] == [f"generate {done}/10" for done in (4, 8, 10)]
    rate = r"[\d.,]+ responses/s"
    assert re.fullmatch(rf"generate 4/10, loss 3, {rate}, \d\d:\d\d left", lines[0])
    assert re.fullmatch(rf"generate 10/10, loss 9, {rate}, \d\d:\d\d in all", lines[-1])


def test_the_end_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    lines = told(monkeypatch, every=5)
    assert [line.split(",")[0] for line in lines] == ["generate 5/10", "generate 10/10"]


def test_lines_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = told(monkeypatch)
    assert line.startswith("generate 10/10, ")
    assert not told(monkeypatch, stays=False)  # a short stage inside of another


def test_a_stage_that_did_nothing_has_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with Progress("generate", 10, "response"):
        pass
    with Progress("generate", 10, "response", disable=True) as bar:
        bar.update(10)
    assert log.getvalue() == ""


def test_a_stage_inside_of_another_moves_no_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    with Progress("step", 1, "step") as outer:
        with Progress("evaluate", 10, "response") as inner:
            inner.update(10)
        outer.update(1)
    lines = log.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["evaluate 10/10", "step 1/1"]
    assert "\x1b" not in log.getvalue()


def test_slow_stages_have_seconds_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("step", 10, "step") as bar:
        bar.start_t -= 20.0
        bar.n = 4
        known = bar.format_dict
    assert known["speed"] == "5 s a step"
    assert known["left"] == "00:30 left"


def test_who_watches_sees_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("generate", 10, "response") as bar:
        bar.update(10)
    shown = terminal.getvalue()
    assert "\r" in shown
    assert "100%" in shown
    assert "responses/s" in shown
    assert Progress.of_long_calls()


def test_a_task_of_srun_writes_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("generate", 10, "response") as bar:
        bar.update(10)
    assert terminal.getvalue().startswith("generate 10/10")
    assert not Progress.of_long_calls()


@pytest.mark.parametrize("in_a_job", [False, True])
def test_srun_is_missed_inside_of_jobs_alone(
    in_a_job: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if in_a_job:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet.quiet_libraries()
        warnings.warn(SRUN, stacklevel=1)
    assert len(caught) == in_a_job
