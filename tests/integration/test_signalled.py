"""A signal to a run: where it is acted on, and that nothing is lost by it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import RngState, SlurmRequeue
from opd_lightning.errors import UserError
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Request, Sampling
from opd_lightning.run import signals
from opd_lightning.run.signals import SignalledError
from opd_lightning.teachers import FrozenTeacher
from opd_lightning.types import Completion
from tests.integration.test_fit import CONFIG, fit, weights
from tests.integration.test_interrupted import (
    PARTS,
    STEPS,
    Break,
    divide_by_zero,
    method,
    resume_and_compare,
    train,
)
from tests.processes import Process, ranks, run_together
from tests.slurm.cluster import until
from tests.slurm.parts import NoisyOPD

USR1, TERM = signal.SIGUSR1, signal.SIGTERM


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(autouse=True)
def deaf_in_the_end() -> Iterator[None]:
    yield
    signals.close()


class SignallingEngine(HFEngine):
    """A signal comes while it writes, at a given call."""

    def __init__(self, at: int, number: signal.Signals) -> None:
        super().__init__()
        self.at = at
        self.number = number

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.at -= 1
        if self.at == 0:
            os.kill(os.getpid(), self.number)
        return super().generate(requests, sampling)


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize("staleness", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_while_it_trains_the_step_is_finished(
    staleness: int, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    come = Break("on_after_backward", 2 * PARTS + 2, lambda: os.kill(os.getpid(), TERM))
    with pytest.raises(SignalledError) as end:
        train(method(staleness=staleness), tmp_path, staleness, callbacks=[SlurmRequeue(), come])
    assert end.value.code == 143
    assert capsys.readouterr().err.count("opd: SIGTERM: saved the beginning of step 3") == 1
    resume_and_compare(tmp_path, whole, staleness, 3)


@pytest.mark.usefixtures("in_lab")
def test_while_it_writes_the_rollouts_are_finished(tmp_path: Path, whole: Path) -> None:
    engine = SignallingEngine(4, USR1)  # for step 3, counted from 0
    with pytest.raises(SignalledError) as end:
        train(method(), tmp_path, 0, callbacks=[SlurmRequeue()], engine=engine)
    assert end.value.code == 138
    resume_and_compare(tmp_path, whole, 0, 3)


@pytest.mark.usefixtures("in_lab")
def test_in_its_last_step_a_run_is_left_alone(tmp_path: Path) -> None:
    come = Break("on_after_backward", STEPS * PARTS, lambda: os.kill(os.getpid(), USR1))
    train(method(), tmp_path, 0, callbacks=[SlurmRequeue(), come])


@pytest.mark.usefixtures("in_lab")
def test_a_run_without_a_folder_to_save_in_is_refused() -> None:
    with pytest.raises(UserError, match="got no ModelCheckpoint"):
        fit(method(), callbacks=[SlurmRequeue()])


# As a program ----------------------------------------------------------------------------


def begin(lab: Path, folder: Path, callbacks: list[Any], *, count: int = 1) -> list[Process]:
    """The processes of an `opd fit` in a folder of its own."""
    words = command(lab, folder, callbacks, processes=count)
    return ranks("opd_lightning", *words, count=count, cwd=folder)


def begin_to_import(lab: Path, folder: Path, callbacks: list[Any]) -> subprocess.Popen[str]:
    """The same by a real start, once it notes signals."""
    run = subprocess.Popen(
        [sys.executable, "-m", "opd_lightning", *command(lab, folder, callbacks)],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(lambda: is_caught(run.pid, TERM), "the run's start")
    return run


def command(lab: Path, folder: Path, callbacks: list[Any], *, processes: int = 1) -> list[str]:
    (folder / "lab").symlink_to(lab / "lab")
    saver = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}
    changes = {
        "data": {"prompts_per_step": 4, "sampling": {"max_new_tokens": 6}, "validation": None},
        "trainer": {
            "max_steps": 5,
            "devices": processes,
            "strategy": "ddp" if processes > 1 else "auto",
            "logger": {"init_args": {"save_dir": "run"}},
            "callbacks": [*callbacks, saver],
        },
    }
    (folder / "changes.yaml").write_text(yaml.safe_dump(changes))
    return ["fit", "--config", CONFIG, "--config", "changes.yaml", "--ckpt_path", "last"]


def is_caught(process: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


PAUSE: dict[str, Any] = {
    "class_path": "tests.slurm.parts.Pause",
    "init_args": {"hook": "on_after_backward", "step": 2, "seconds": 60},
}


def test_while_libraries_are_imported_the_answer_is_immediate(
    untrained_lab: Path, tmp_path: Path
) -> None:
    run = begin_to_import(untrained_lab, tmp_path, [{"class_path": "callbacks.SlurmRequeue"}])
    run.send_signal(TERM)
    _, said = run.communicate(timeout=240)
    assert run.returncode == 143, said
    assert said.splitlines() == ["opd: SIGTERM: ended before it was done"]


NOTHING = "no step was finished since the start, so there is nothing to save"
SAVED = "saved the beginning of step 2: --ckpt_path "


@pytest.mark.parametrize(
    ("hook", "step", "number", "line"),
    [
        ("setup", 0, signal.SIGINT, NOTHING),
        ("on_after_backward", 2, TERM, SAVED),
        pytest.param("on_after_backward", 2, signal.SIGHUP, SAVED, marks=pytest.mark.slow),
    ],
)
def test_without_the_callback_one_line_says_what_is_saved(
    hook: str, step: int, number: signal.Signals, line: str, untrained_lab: Path, tmp_path: Path
) -> None:
    pause = {**PAUSE, "init_args": {"hook": hook, "step": step, "seconds": 60}}
    (run,) = begin(untrained_lab, tmp_path, [pause])
    until((tmp_path / "waits-0").exists, "the pause")
    run.send_signal(number)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 128 + number, said
    assert f"\nopd: {number.name}: {line}" in "\n" + said
    assert "Traceback" not in said
    assert "KeyboardInterrupt" not in said


def paused(folder: Path) -> bool:
    return all((folder / f"waits-{rank}").exists() for rank in (0, 1))


@pytest.mark.slow  # the line of one process is tested above, two processes below
def test_several_processes_save_nothing_on_their_own(untrained_lab: Path, tmp_path: Path) -> None:
    run = begin(untrained_lab, tmp_path, [PAUSE], count=2)
    until(lambda: paused(tmp_path), "the pause")
    for one in run:
        one.send_signal(signal.SIGINT)
    said = "".join(one.stderr for one in run_together(run, timeout=120))
    assert [one.returncode for one in run] == [130, 130], said
    line = "opd: SIGINT: nothing saved: of several processes, one alone cannot; resume"
    assert said.count(line) == 1
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_several_processes_save_together_without_slurm(untrained_lab: Path, tmp_path: Path) -> None:
    pause = {**PAUSE, "init_args": {**PAUSE["init_args"], "seconds": 3}}
    callbacks = [{"class_path": "callbacks.SlurmRequeue"}, pause]
    run = begin(untrained_lab, tmp_path, callbacks, count=2)
    until(lambda: paused(tmp_path), "the pause")
    run[1].send_signal(TERM)  # one of them is enough
    said = "".join(one.stderr for one in run_together(run, timeout=120))
    assert [one.returncode for one in run] == [143, 143], said
    assert said.count("opd: SIGTERM: saved the beginning of step 3 as ") == 1
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


# Random numbers --------------------------------------------------------------------------


def noisy(folder: Path, seed: int, *callbacks: Any, ckpt_path: str | None = None) -> Any:
    """The weights after a run whose method draws from the global generators."""
    seed_everything(seed, verbose=False)
    saver = ModelCheckpoint(folder, every_n_train_steps=100, save_last=True)
    module = NoisyOPD(
        Student("lab/arithmetic/student"),
        FrozenTeacher("lab/arithmetic/teacher"),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
    )
    fit(module, steps=3, micro_batches=PARTS, callbacks=[saver, *callbacks], ckpt_path=ckpt_path)
    return weights(module)


@pytest.mark.usefixtures("in_lab")
def test_random_numbers_go_on_where_the_step_began(
    tmp_path: Path,
) -> None:
    expected = noisy(tmp_path / "whole", 1, RngState())
    stop = Break("on_after_backward", 2 * PARTS + 2, divide_by_zero)
    with pytest.raises(ZeroDivisionError):
        noisy(tmp_path, 1, RngState(), stop)
    last = str(tmp_path / "last.ckpt")
    resumed = noisy(tmp_path / "with", 2, RngState(), ckpt_path=last)
    torch.testing.assert_close(resumed, expected, atol=0, rtol=0)
    without = noisy(tmp_path / "without", 2, ckpt_path=last)
    assert differ(without, expected)

    checkpoint = torch.load(last, weights_only=True)
    checkpoint["rng_states"] *= 2
    torch.save(checkpoint, last)
    assert differ(noisy(tmp_path / "two", 2, RngState(), ckpt_path=last), expected)


def differ(some: Any, others: Any) -> bool:
    return any(not torch.equal(some[name], others[name]) for name in others)
