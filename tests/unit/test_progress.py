"""Progress: bars for terminals, lines for logs, and nothing that is no news."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.logging import tqdm as transformers_tqdm

from opd_lightning.terminal import progress, quiet
from opd_lightning.terminal.library_bars import LibraryBar, shown_as, vllm_bar
from opd_lightning.terminal.progress import Progress

SRUN = "The `srun` command is available on your system but is not used. HINT: If your intention"


class Terminal(io.StringIO):
    """Stream that is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Clock that a test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


class Log:
    """Return the text written to stderr since the last call."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def read(self) -> str:
        return self._capsys.readouterr().err


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Log:
    return Log(capsys)


@pytest.fixture
def terminal(log: Log, monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    return log


def told(clock: Clock, log: Log, seconds: float, **how: Any) -> list[str]:
    """The lines of ten responses, one after the other, each of so many seconds."""
    with Progress("generate", 10, "response", **how) as stage:
        for number in range(10):
            clock.now += seconds
            stage.figures = f"loss {number}"
            stage.update()
    return log.read().splitlines()


def test_a_line_every_so_many_steps(clock: Clock, log: Log) -> None:
    assert told(clock, log, 12.0, every=4) == [
        "generate 4/10 responses, loss 3, 12 s a response, 01:12 left",
        "generate 8/10 responses, loss 7, 12 s a response, 00:24 left",
        "generate 10/10 responses, loss 9, 12 s a response, 02:00 in all",
    ]


def test_the_end_is_told_once(clock: Clock, log: Log) -> None:
    lines = told(clock, log, 12.0, every=5)
    assert [line.split(" responses")[0] for line in lines] == ["generate 5/10", "generate 10/10"]


def test_lines_are_apart(clock: Clock, log: Log) -> None:
    (line,) = told(clock, log, 0.01)
    assert line == "generate 10/10 responses, loss 9, 100 responses/s, 00:00 in all"


def test_a_stage_within_another_has_a_line_a_minute(clock: Clock, log: Log) -> None:
    lines = told(clock, log, 25.0, within=True)
    assert [line.split(" ")[1] for line in lines] == ["3/10", "6/10", "9/10"]
    assert not told(clock, log, 5.9, within=True)  # 59 seconds, and nothing at the end


def test_a_stage_that_did_nothing_has_no_line(log: Log) -> None:
    with Progress("generate", 10, "response"):
        pass
    with Progress("generate", 10, "response", disable=True) as stage:
        stage.update(10)
    assert log.read() == ""


def test_other_ranks_say_nothing(clock: Clock, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_is_first", lambda: False)
    assert not told(clock, log, 12.0)


def test_what_was_done_before_has_no_rate(clock: Clock, log: Log) -> None:
    with Progress("step", 2000, "step", done=1500) as stage:
        for _ in range(2):
            clock.now += 20.0
            stage.update(100)
    assert log.read().splitlines()[-1] == "step 1,700/2,000, 5 steps/s, 01:00 left"


def test_start_up_is_no_part_of_the_time_left(clock: Clock, log: Log) -> None:
    with Progress("step", 200, "step") as stage:
        for seconds in (44.0, 16.0, 14.0):  # the engine starts within the first step
            clock.now += seconds
            stage.update()
    assert log.read().splitlines() == [
        "step 1/200, ? steps/s, ? left",
        "step 2/200, 16 s a step, 52:48 left",
        "step 3/200, 15 s a step, 49:15 left",
    ]


def test_the_time_left_follows_the_recent_rate(clock: Clock, log: Log) -> None:
    with Progress("step", 1000, "step") as stage:
        for seconds in (1.0, *[1.0] * progress.RECENT, *[4.0] * progress.RECENT):
            clock.now += seconds
            stage.update()
    assert log.read().splitlines()[-1] == "step 201/1,000, 4 s a step, 53:16 left"


def test_what_is_not_to_be_done_counts_no_more(clock: Clock, log: Log) -> None:
    with Progress("generate", 100, "token step") as stage:
        clock.now += 20.0
        stage.update(10)
        stage.shorten(50)
        stage.update(10)
    assert log.read().splitlines()[-1].startswith("generate 20/50 token steps, ")


def test_who_watches_sees_a_bar(terminal: Log) -> None:
    with Progress("generate", 10, "response") as stage:
        stage.update(10)
    shown = terminal.read()
    assert "\r" in shown
    assert "generate: 100%|" in shown
    assert "10/10 responses, " in shown
    assert shown.rstrip().endswith("in all")  # tqdm pads what got shorter


def test_a_stage_within_another_shows_once_it_is_long(clock: Clock, terminal: Log) -> None:
    with Progress("learn", 4, "micro-batch", within=True) as stage:
        clock.now += 4.9
        stage.update()
        assert terminal.read() == ""
        clock.now += 5.0
        stage.update()
        shown = terminal.read()
        assert "learn:  50%|" in shown
        assert "2/4 micro-batches, 5 s a micro-batch, 00:10 left" in shown
    assert re.fullmatch(r"\r +\r", terminal.read())  # wiped out


def test_a_task_of_srun_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert progress.is_watched()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert not progress.is_watched()


def test_threads_do_not_mix_their_lines(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.0)

    def work(label: str) -> None:
        with Progress(label, 200, "response") as stage:
            for _ in range(200):
                stage.update()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, ["generate", "learn", "score", "evaluate"]))
    line = re.compile(r"(generate|learn|score|evaluate) [\d]+/200 responses, .+ (left|in all)")
    lines = log.read().splitlines()
    assert len(lines) == 800
    assert all(line.fullmatch(one) for one in lines)


def test_bars_of_transformers_are_ours(clock: Clock, log: Log) -> None:
    with shown_as("load student", "tensor"):
        for _ in transformers_tqdm([1, 2, 3], desc="Loading weights"):
            clock.now += 40.0
    assert log.read() == ("load student 2/3 tensors, 40 s a tensor, 00:40 left\n")
    assert not isinstance(transformers_tqdm([1]), LibraryBar)  # outside they are theirs


def test_bars_of_vllm_are_ours(clock: Clock, log: Log) -> None:
    make = vllm_bar("generate")
    prompts = ["a", "b"]
    assert make(prompts, desc="Rendering prompts") is prompts
    bar = make(total=3, desc="Processed prompts", dynamic_ncols=True, postfix="")
    clock.now += 40.0
    assert bar.format_dict["elapsed"] == 40.0
    bar.update()
    clock.now += 40.0
    bar.update()
    bar.close()
    assert log.read() == "generate 2/3 responses, 40 s a response, 00:40 left\n"


def test_no_library_draws_into_a_log(tmp_path: Path) -> None:
    own = {k: v for k, v in os.environ.items() if not k.startswith(("TQDM_", "HF_HUB_DISABLE"))}
    program = (
        "from opd_lightning.terminal.quiet import quiet_libraries; quiet_libraries()\n"
        "from opd_lightning.terminal.progress import Progress\n"
        "import tqdm, tqdm.auto\n"
        "with Progress('step', 3, 'step') as stage:\n"
        "    for _ in stage.each(tqdm.tqdm(tqdm.auto.tqdm(range(3)))): pass\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, check=True)
    assert re.fullmatch(rb"step 3/3, [\d,.]+ steps/s, 00:00 in all\n", done.stderr)


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
