"""A run that is killed again and again, and how it compares with one that nothing happened to.

Shared by the test of it and `benchmarks/kills.py`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as ServedEvents,
)
from torch import Tensor

CONFIG = Path(__file__).parents[1] / "configs" / "lab" / "g_opd.yaml"
RUN = Path("run")  # in the folder that a run works in
PHASES = ("start-up", "step", "saving", "validation")
CLOCK = ("time/", "cost/", "tokens_per_second")  # figures that differ from run to run


LATE = "savers"  # who saves a checkpoint is not noted in that one


class Place(NamedTuple):
    """Where a run is: a phase, and optimiser steps made."""

    phase: str
    step: int


class Whereabouts(Callback):
    """Tells who kills where a run is, in a file that outlives it.

    "saving" lasts from the checkpoint's first byte in memory to the next step or validation.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def _at(self, phase: str, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            line = f"{phase} {trainer.global_step}".ljust(40)
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT)
            os.write(handle, line.encode())
            os.close(handle)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            Path(f"{self.path}.resumed").write_text(str(trainer.global_step))
        self._at("step", trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._at("step", trainer)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self._at("validation", trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self._at("step", trainer)

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self._at("saving", trainer)


def settings(
    folder: Path,
    *,
    steps: int,
    every: int = 2,
    keep: int = 2,
    callbacks: Sequence[str] = (),
    **changes: Any,
) -> Path:
    """A config over `CONFIG`, or another of two teachers, with all that a checkpoint must hold.

    Args:
        folder: Where the run will work, and the config goes.
        steps: Of the run; eight are an epoch.
        every: Steps from one checkpoint to the next.
        keep: How many of them, those of least loss; -1 for all.
        callbacks: Class paths of further ones.
        changes: Values by section and name, such as `data__engine`.
    """
    lightning = "lightning.pytorch.callbacks."
    saver, length = f"{lightning}ModelCheckpoint", "val/sums/length"
    often = {"every_n_train_steps": every, "save_top_k": keep, "monitor": "loss"}
    best = {"filename": "best-{step}", "monitor": length, "mode": "max"}
    everything: list[tuple[str, dict[str, Any]]] = [
        (saver, often | {"save_last": True}),
        (saver, best),
        (f"{lightning}EarlyStopping", {"monitor": length, "patience": 1000}),
        (f"{lightning}LearningRateMonitor", {}),
        ("callbacks.EMATeacherUpdate", {}),
        ("callbacks.RolloutLog", {"every_n_steps": 3}),
        ("callbacks.SignalPlots", {"every_n_steps": 3}),
        (f"{__name__}.Whereabouts", {"path": "whereabouts"}),
        *((name, {}) for name in callbacks),
    ]
    reference = {"class_path": "opd_lightning.teachers.EMATeacher", "init_args": {"rate": 0.1}}
    overlay: dict[str, Any] = {
        "model": {
            "init_args": {
                "reference": reference,
                "lr_scheduler": {"init_args": {"total_steps": steps, "pct_start": 0.4}},
                "rules": [{"class_path": "opd_lightning.rules.TruncatedImportance"}],
            }
        },
        "data": {
            "prompts_per_step": 4,
            "samples_per_prompt": 1,
            "sampling": {"max_new_tokens": 12},
            "train": {"limit": 32},
            "validation": {"sums": {"prompts": {"limit": 16}, "batch_size": 8}},
        },
        "trainer": {
            "max_steps": steps,
            "accumulate_grad_batches": 2,
            "val_check_interval": 2 * 5,  # micro-batches: every fifth step
            "enable_progress_bar": False,
            "logger": {"init_args": {"save_dir": str(RUN)}},
            "callbacks": [{"class_path": path, "init_args": args} for path, args in everything],
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        overlay[section][name] = value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.yaml"
    path.write_text(json.dumps(overlay))
    return path


@contextmanager
def started(folder: Path, command: list[str], errors: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process group of its own, with all of which it ends."""
    with errors.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def place(folder: Path) -> Place:
    """Where the run in `folder` was when it last told."""
    with suppress(FileNotFoundError, ValueError):
        phase, step = (folder / "whereabouts").read_text().split()
        return Place(phase, int(step))
    return Place("start-up", -1)


def resumed_at(folder: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):
        return int((folder / "whereabouts.resumed").read_text())
    return None


@dataclass
class Tale:
    """What happened to a run."""

    kills: list[Place] = field(default_factory=list)
    half_written: int = 0  # checkpoints in the middle of which a kill fell
    redone: int = 0  # optimiser steps that were made again
    seconds: float = 0.0
    startup: float = 0.0  # seconds to the first step, of the last start that got so far
    said: list[str] = field(default_factory=list)  # lines of ours on stderr

    def by_phase(self) -> dict[str, int]:
        return dict(Counter(place.phase for place in self.kills))


def run_under_fire(
    folder: Path, command: list[str], *, kills: int, steps: int, random: Random, startup: float = 0
) -> Tale:
    """Run the command, kill it `kills` times, starting it again each time, and let it end.

    Every kill aims at a phase, a few steps after where the run stands, so that about all steps
    are used up; where it fell is what the run had told last.

    Args:
        folder: To run in.
        command: Starts and restarts the run.
        kills: SIGKILLs to the whole process group.
        steps: Of the whole run.
        random: Decides when.
        startup: Seconds in which kills during start-up fall.
    """
    tale, began, reached = Tale(startup=startup), time.monotonic(), 0
    while True:
        aim = _aim(random, reached, steps, kills - len(tale.kills))
        for name in ("whereabouts", "whereabouts.resumed"):
            (folder / name).unlink(missing_ok=True)
        errors = folder / f"log-{len(tale.kills)}.txt"
        with started(folder, command, errors) as process:
            fell = _fire(process, folder, aim, random, tale)
        lines = errors.read_text(errors="replace").splitlines()
        tale.said += [line for line in lines if line.startswith("opd: ")]
        if (again := resumed_at(folder)) is not None:
            tale.redone += reached - again
            reached = again
        if fell is None:
            if process.returncode:
                raise RuntimeError("\n".join(lines[-30:]))
            tale.seconds = time.monotonic() - began
            return tale
        tale.kills.append(fell)
        reached = max(reached, fell.step)
        tale.half_written += len(list((folder / RUN / "checkpoints").glob(".*.writing")))


def _aim(random: Random, reached: int, steps: int, left: int) -> Place | None:
    """Where the next of `left` kills should fall."""
    if not left:
        return None
    (phase,) = random.choices(PHASES, weights=(2, 4, 5, 2))
    ahead = random.randint(0, max(1, 2 * (steps - 2 - reached) // left))
    return Place(phase, min(reached + ahead, steps - 1))


def _fire(
    process: subprocess.Popen[bytes], folder: Path, aim: Place | None, random: Random, tale: Tale
) -> Place | None:
    """Kill the process where `aim` says; where it fell, or None if it ended by itself."""
    began, running = time.monotonic(), False
    fuse = random.uniform(0, tale.startup)
    while process.poll() is None:
        here, seconds = place(folder), time.monotonic() - began
        if here.phase != "start-up" and not running:
            running, tale.startup = True, seconds
        if aim is not None and _hits(aim, here, seconds > fuse):
            time.sleep(random.uniform(0, 0.06 if aim.phase == "saving" else 0.15))
            os.killpg(process.pid, signal.SIGKILL)
            return place(folder) if process.wait() == -signal.SIGKILL else None
        time.sleep(0.0005 if aim else 0.01)
    return None


def _hits(aim: Place, here: Place, fuse_is_over: bool) -> bool:
    if aim.phase == "start-up":
        return fuse_is_over
    # Where the phase does not come for a while, any will do: the run would end meanwhile.
    return here.step >= aim.step and (here.phase == aim.phase or here.step > aim.step + 4)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Everything that a run logged as a number, less what a clock decided."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(CLOCK)
    }


def tensors(run: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Everything else that it logged, texts and pictures, as TensorBoard's server reads it."""
    events = ServedEvents(str(run), size_guidance={"tensors": 0})
    events.Reload()
    return {
        tag: [(e.step, e.tensor_proto.SerializeToString()) for e in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if events.SummaryMetadata(tag).plugin_data.plugin_name != "scalars"
    }


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two checkpoints differ, to the bit; what a clock decided is left out."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{at}: keys {one.keys() ^ other.keys()}"] if one.keys() != other.keys() else []
        for key in one.keys() & other.keys():
            if not str(key).startswith((*CLOCK, LATE)):
                found += differences(one[key], other[key], f"{at}/{key}")
        return found
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{at}: {len(one)} and {len(other)} entries"]
        pairs = zip(one, other, strict=True)
        return [d for i, (x, y) in enumerate(pairs) for d in differences(x, y, f"{at}/{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [f"{at}: tensors differ"]
    both_nan = one != one and other != other
    return [] if one == other or both_nan else [f"{at}: {one!r} and {other!r}"]


def compare(folder: Path, whole: Path) -> list[str]:
    """Where the run in `folder` differs from the one in `whole`: last checkpoint and log."""
    one, other = (
        torch.load(at / RUN / "checkpoints" / "last.ckpt", weights_only=True)
        for at in (folder, whole)
    )
    found = differences(one, other, "last.ckpt")
    readers: dict[str, Callable[[Path], Any]] = {"scalars": scalars, "tensors": tensors}
    for name, read in readers.items():
        found += differences(read(folder / RUN), read(whole / RUN), name)
    return found


def fit_command(*configs: Path, more: tuple[str, ...] = ()) -> list[str]:
    """The one command that starts and restarts a run."""
    named = [word for path in configs for word in ("--config", str(path))]
    return [
        sys.executable, "-m", "opd_lightning", "fit", *named, *more, "--ckpt_path", "last",
    ]  # fmt: skip
