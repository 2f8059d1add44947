"""A run that is cut short inside of a step goes on from that step's beginning, bit for bit."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from callbacks import EMATeacherUpdate, RngState
from opd_lightning.cli import main
from opd_lightning.data.prompts import PromptSource
from opd_lightning.evaluation.responses import EvaluationSuite
from opd_lightning.methods import OPD, DistillationModule
from opd_lightning.models.student import Student
from opd_lightning.rollouts import HFEngine, Request, Sampling
from opd_lightning.rules import TruncatedImportance
from opd_lightning.teachers import EMATeacher, FrozenTeacher
from opd_lightning.types import Completion, RolloutBatch, TokenScores
from tests.integration.test_fit import CONFIG, MicroBatches, fit, weights

STEPS = 6
PARTS = 3  # micro-batches of a step
PER_EPOCH = 4  # steps: 16 prompts, 4 a step


class FailingTeacher(FrozenTeacher):
    """Stays away when a given micro-batch, counted over the run, asks it."""

    def __init__(self, path: str, at: int = -1) -> None:
        super().__init__(path)
        self.at = at
        self.asked = 0

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        self.asked += 1
        if self.asked == self.at:
            raise ConnectionError("the teacher is away")
        return super().score(batch, view, top_k=top_k)


class FailingEngine(HFEngine):
    """Raises at a given call."""

    def __init__(self, at: int = -1) -> None:
        super().__init__()
        self.at = at
        self.calls = 0

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls += 1
        if self.calls == self.at:
            raise ConnectionError("the engine is gone")
        return super().generate(requests, sampling)


def method(at: int = -1, *, staleness: int = 0) -> OPD:
    return OPD(
        Student("lab/arithmetic/student"),
        FailingTeacher("lab/arithmetic/teacher", at),
        rules=[TruncatedImportance()] if staleness else [],
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=STEPS),
        max_logprob_gap=1e-4,
    )


class Losses(Callback):
    """The loss of every step, and the gradients that the optimiser saw."""

    def __init__(self) -> None:
        self.of_step: dict[int, float] = {}
        self.gradients: dict[int, dict[str, Tensor]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.student.named_parameters()
        self.gradients[trainer.global_step] = {n: p.grad.clone() for n, p in named}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if "loss" in trainer.callback_metrics:
            self.of_step[trainer.global_step - 1] = float(trainer.callback_metrics["loss"])


def train(
    module: DistillationModule, folder: Path, staleness: int, *, steps: int = STEPS, **more: Any
) -> Losses:
    """A run with checkpoints in `folder`."""
    losses = Losses()
    saver = ModelCheckpoint(folder, every_n_train_steps=100, save_last=True)
    fit(
        module,
        steps=steps,
        micro_batches=more.pop("micro_batches", PARTS),
        callbacks=[losses, saver, *more.pop("callbacks", [])],
        train=PromptSource("lab/arithmetic/train.jsonl", limit=16),
        samples_per_prompt=1,
        max_staleness=staleness,
        **more,
    )
    return losses


@cache
def unbroken(folder: Path, staleness: int) -> tuple[Losses, dict[str, Tensor]]:
    """The run that nothing happens to, and its weights."""
    whole = method(staleness=staleness)
    return train(whole, folder, staleness), weights(whole)


def resume_and_compare(folder: Path, whole: Path, staleness: int, first: int) -> None:
    last = str(folder / "last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == first
    resumed = method(staleness=staleness)
    seen = train(resumed, folder, staleness, ckpt_path=last)
    expected, final = unbroken(whole, staleness)
    # The step before is what callbacks can still see when the first micro-batch ends.
    assert seen.of_step == {n: loss for n, loss in expected.of_step.items() if n >= first - 1}
    assert list(seen.gradients) == list(range(first, STEPS))
    for step, gradients in seen.gradients.items():
        torch.testing.assert_close(gradients, expected.gradients[step], atol=0, rtol=0)
    torch.testing.assert_close(weights(resumed), final, atol=0, rtol=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize(
    ("staleness", "step", "part"),
    [
        (0, 2, 2),
        (1, PER_EPOCH, 2),
        *(
            pytest.param(*place, marks=pytest.mark.slow)
            for place in ((0, PER_EPOCH, 1), (0, PER_EPOCH, 3), (0, 5, 3), (1, 1, 2))
        ),
    ],
)
def test_an_absent_teacher_costs_the_step_and_no_more(
    staleness: int, step: int, part: int, tmp_path: Path, whole: Path
) -> None:
    with pytest.raises(ConnectionError, match="the teacher is away"):
        train(method(PARTS * step + part, staleness=staleness), tmp_path, staleness)
    resume_and_compare(tmp_path, whole, staleness, step)


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize("part", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_step_under_a_budget_is_repeated_whole(part: int, tmp_path: Path) -> None:
    """The teacher fails in the first micro-batch of a step or, from `part` 2 on, within it."""
    budget = {"micro_batches": 1, "max_tokens_per_micro_batch": 24}
    counted, module = MicroBatches(), method()
    expected = train(module, tmp_path / "whole", 0, callbacks=[counted], **budget)
    done = sum(counted.of_step[:3])
    assert counted.of_step[3] >= part
    with pytest.raises(ConnectionError, match="the teacher is away"):
        train(method(done + part), tmp_path, 0, **budget)
    last = str(tmp_path / "last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 3
    resumed = method()
    seen = train(resumed, tmp_path, 0, ckpt_path=last, **budget)
    assert list(seen.gradients) == list(range(3, STEPS))
    for step, gradients in seen.gradients.items():
        torch.testing.assert_close(gradients, expected.gradients[step], atol=0, rtol=0)
    torch.testing.assert_close(weights(resumed), weights(module), atol=0, rtol=0)


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize("step", [3, pytest.param(PER_EPOCH, marks=pytest.mark.slow)])
def test_an_engine_that_dies_between_two_steps(step: int, tmp_path: Path, whole: Path) -> None:
    with pytest.raises(ConnectionError, match="the engine is gone"):
        train(method(), tmp_path, 0, engine=FailingEngine(step + 1))
    resume_and_compare(tmp_path, whole, 0, step)


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize("stop", [pytest.param(3, marks=pytest.mark.slow), PER_EPOCH])
def test_rollouts_in_flight_are_in_an_ordinary_checkpoint(
    stop: int, tmp_path: Path, whole: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_last=True, save_top_k=0)
    with pytest.raises(ConnectionError):
        train(method(PARTS * (stop + 1) + 1, staleness=1), tmp_path / "x", 1, callbacks=[saver])
    resume_and_compare(tmp_path, whole, 1, stop)


class Break(Callback):
    """Ends the run in one of its hooks."""

    def __init__(self, hook: str, at: int, how: Callable[[], None]) -> None:
        self.calls = 0
        setattr(self, hook, lambda *_: self._count(at, how))

    def _count(self, at: int, how: Callable[[], None]) -> None:
        self.calls += 1
        if self.calls == at:
            how()


def divide_by_zero() -> None:
    _ = 1 // 0


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Yield a function that sends SIGINT, with Python's handler set."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.usefixtures("in_lab")
def test_ctrl_c(
    tmp_path: Path, ctrl_c: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    press = Break("on_after_backward", 2 * PARTS + 2, ctrl_c)
    with pytest.raises(SystemExit):
        train(method(), tmp_path, 0, callbacks=[press])
    line = f"opd: SIGINT: saved the beginning of step 2: --ckpt_path {tmp_path}"
    assert line in capsys.readouterr().err
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2


@pytest.mark.usefixtures("in_lab")
@pytest.mark.parametrize("hook", ["on_after_backward", "on_train_batch_end"])
def test_what_is_not_a_whole_step_is_not_saved(hook: str, tmp_path: Path) -> None:
    """Before the first step there is nothing; after the optimiser, callbacks are still to come."""
    at = 1 if hook == "on_after_backward" else 2 * PARTS
    stop = Break(hook, at, divide_by_zero)
    with pytest.raises(ZeroDivisionError):
        train(method(), tmp_path, 0, callbacks=[stop])
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("in_lab")
def test_a_resumed_run_keeps_its_last_checkpoint_in_place(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        train(method(PARTS * 2 + 2), tmp_path, 0)
    last = tmp_path / "last.ckpt"
    with pytest.raises(ConnectionError):
        train(method(PARTS * 2 + 2), tmp_path, 0, ckpt_path=str(last))
    assert list(tmp_path.iterdir()) == [last]
    assert torch.load(last, weights_only=True)["global_step"] == 4


@pytest.mark.usefixtures("in_lab")
def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_last="link")
    stop = Break("on_after_backward", 2 * PARTS + 2, divide_by_zero)
    with pytest.raises(ZeroDivisionError):
        fit(method(), steps=STEPS, micro_batches=PARTS, callbacks=[saver, stop])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=2.ckpt"]
    assert not (tmp_path / "last.ckpt").is_symlink()


@pytest.mark.usefixtures("in_lab")
def test_a_last_validation_that_is_repeated_saves_all_of_the_run(tmp_path: Path) -> None:
    """Training does not begin again, so what callbacks restore then is not restored."""

    def run(call: int) -> None:
        prompts = PromptSource("lab/arithmetic/held_out.jsonl", limit=2)
        best = ModelCheckpoint(tmp_path, "best-{step}", monitor="val/sums/score", mode="max")
        last = ModelCheckpoint(tmp_path, every_n_train_steps=100, save_last=True, save_top_k=0)
        fit(
            OPD(
                Student("lab/arithmetic/student"),
                EMATeacher(rate=0.5),
                optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
            ),
            steps=2,
            engine=FailingEngine(call),
            validation={"sums": EvaluationSuite(prompts=prompts)},
            callbacks=[last, best, EMATeacherUpdate(), RngState()],
            trainer={"val_check_interval": 2, "num_sanity_val_steps": 0},
            ckpt_path="last",
        )

    with pytest.raises(ConnectionError):
        run(3)  # the engine's calls: two steps and the validation
    run(-1)
    names = ("last.ckpt", "best-step=2.ckpt")
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in names)
    teachers = [content["ema_teachers"][0]["parameters"] for content in (before, after)]
    torch.testing.assert_close(*teachers, atol=0, rtol=0)
    assert str(after["rng_states"]) == str(before["rng_states"])


FAST = [
    "--trainer.max_steps=6",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=4",  # every second step
    "--trainer.enable_progress_bar=false",
    "--data.train.limit=16",
    "--data.prompts_per_step=4",  # an epoch is four steps
    "--data.validation.sums.prompts.limit=8",
    "--data.validation.sums.batch_size=4",  # two calls of the engine
    "--data.sampling.max_new_tokens=8",
]


def main_run(save_dir: Path, *changes: str) -> None:
    main(["fit", "--config", CONFIG, f"--trainer.logger.init_args.save_dir={save_dir}", *changes])


@cache
def whole_log(save_dir: Path) -> dict[str, list[tuple[int, float]]]:
    main_run(save_dir, *FAST)
    return scalars(save_dir)


# The engine's calls: 1, 2 for steps, 3, 4 for a validation, 5, 6 for steps, 7, 8 for a validation
# at an epoch's end, 9, 10 for steps.
@pytest.mark.parametrize("call", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 8, 9))])
@pytest.mark.usefixtures("in_lab")
def test_the_log_of_a_run_has_no_seam(call: int, tmp_path: Path, whole: Path) -> None:
    """Validation too: cut short, it is made again; made, it is not."""
    engine = f"--data.engine={__name__}.FailingEngine"
    with pytest.raises(ConnectionError):
        main_run(tmp_path, *FAST, engine, f"--data.engine.init_args.at={call}")
    config, last = tmp_path / "config.yaml", tmp_path / "checkpoints" / "last.ckpt"
    main(["fit", "--config", str(config), "--data.engine.init_args.at=-1", f"--ckpt_path={last}"])
    logged = scalars(tmp_path)
    assert [step for step, _ in logged["val/sums/score"]] == [2, 4, 6]
    assert logged == whole_log(whole / "log")


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Everything that a run logged, less what a clock decided."""
    events = EventAccumulator(str(run))
    events.Reload()
    clock = ("time/", "cost/", "tokens_per_second")
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith(clock)
    }
