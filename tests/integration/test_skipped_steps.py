"""A step whose loss or gradient is not finite moves nothing; too many in a row end the run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from callbacks import EMATeacherUpdate
from opd_lightning.errors import EngineMismatchError, RunStoppedError, UserError
from opd_lightning.methods import GOPD, OPD
from opd_lightning.models.student import Student
from opd_lightning.processes import Ranks
from opd_lightning.rollouts import HFEngine, Request, Sampling
from opd_lightning.rules import PrefixWindow, SkipFirst
from opd_lightning.rules.base import Rates, Rule, Scored, Signal
from opd_lightning.teachers import EMATeacher, FrozenTeacher
from opd_lightning.training.skipped_steps import check_weights
from opd_lightning.types import Completion, RolloutBatch, TokenScores
from tests.integration.test_fit import fit, weights

pytestmark = pytest.mark.usefixtures("in_lab")

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
}


class OddTeacher(FrozenTeacher):
    """Teacher with a wrong log-prob for one token of the first row, at given steps."""

    def __init__(self, path: str, steps: Sequence[int], value: float = float("nan")) -> None:
        super().__init__(path)
        self.steps = steps
        self.value = value

    def score(self, batch: RolloutBatch, view: str, *, top_k: int = 0) -> TokenScores:
        scores = super().score(batch, view, top_k=top_k)
        if batch.totals.step not in self.steps:
            return scores
        logprobs = scores.logprobs.clone()
        logprobs[0, 0] = self.value
        return replace(scores, logprobs=logprobs)


class Moved(Callback):
    """Callback that records the steps that changed weights or optimiser state."""

    def __init__(self) -> None:
        self.of_step: dict[int, bool] = {}
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step not in self.of_step:
            self._before = self._state(trainer, module)
            self.of_step[trainer.global_step] = False
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step > max(self.of_step):
            now = self._state(trainer, module)
            same = len(now) == len(self._before) and all(map(torch.equal, now, self._before))
            self.of_step[trainer.global_step - 1] = not same

    def _state(self, trainer: Any, module: Any) -> list[Tensor]:
        remembered = trainer.optimizers[0].state.values()
        tensors = [x for s in remembered for x in s.values() if isinstance(x, Tensor)]
        return [x.detach().clone() for x in (*module.student.parameters(), *tensors)]


def method(
    steps: Sequence[int], value: float = float("nan"), family: type[OPD] = OPD, **more: Any
) -> OPD:
    return family(
        Student("lab/arithmetic/student"),
        OddTeacher("lab/arithmetic/teacher", steps, value),
        **{
            "optimizer": OPTIMISERS["adamw"],
            "lr_scheduler": lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=8),
            "max_logprob_gap": 1e-4,
            **more,
        },
    )


@pytest.mark.parametrize(
    ("optimizer", "value"),
    [
        ("adamw", float("nan")),
        ("adamw", float("-inf")),
        pytest.param("adamw foreach", float("nan"), marks=pytest.mark.slow),
        ("adamw fused", float("nan")),
        ("sgd", float("nan")),
    ],
)
def test_nothing_moves_and_the_run_goes_on(
    optimizer: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Moved()
    seen = fit(
        method([0, 2], value, optimizer=OPTIMISERS[optimizer]),
        steps=4,
        micro_batches=2,
        callbacks=[moved],
        trainer={"gradient_clip_val": 1.0},
    )
    assert moved.of_step == {0: False, 1: True, 2: False, 3: True}
    assert moved.rates == sorted(moved.rates)  # the schedule goes on
    assert len(set(moved.rates)) == 4
    assert [logged["optim/skipped_steps"] for logged in seen.logged] == [1, 1, 2, 2]
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 2
    assert lines[1].startswith("opd: step 2 skipped: its loss is ")
    assert "log-probs of the teacher are not finite on" in lines[1]
    assert "(1 in a row, 3 end the run; 2 in this run)" in lines[1]


class Odd(Rule):
    """A rule whose weights of step 0 are not finite."""

    name = "odd"

    def apply(
        self, signal: Signal, scored: Scored, observed: Tensor | None = None
    ) -> tuple[Signal, Rates]:
        factor = float("nan") if scored.batch.totals.step == 0 else 1.0
        return replace(signal, weight=signal.weight * factor), {}


class OddLoss(OPD):
    """A method whose loss of step 0 is infinite."""

    def token_loss(
        self,
        student: TokenScores,
        signal: Signal,
        scored: Scored,
        values: Mapping[str, Tensor],
    ) -> Tensor:
        found = super().token_loss(student, signal, scored, values)
        return found * float("inf") if scored.batch.totals.step == 0 else found


@pytest.mark.parametrize("aggregation", ["token-mean", "mask-mean"])  # the latter scores ahead
def test_the_part_whose_values_are_not_finite_is_named(
    aggregation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = [PrefixWindow(tokens=4), Odd(), SkipFirst(tokens=1)]
    fit(method([], rules=rules, aggregation=aggregation), steps=1, micro_batches=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert ", the signal of Odd is not finite on " in line
    assert line.count("not finite") == 1


def test_a_loss_that_is_not_finite_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    fit(method([], family=OddLoss), steps=1)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert ", the loss of OddLoss is not finite on " in line


def test_a_gradient_alone_is_enough() -> None:
    """The loss is finite, the student's backward pass is not."""

    class Spoil(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 1:
                next(pl_module.student.parameters()).grad[0, 0] = float("inf")

    moved = Moved()
    fit(method([]), callbacks=[moved, Spoil()])
    assert moved.of_step == {0: True, 1: False, 2: True}


def test_a_loss_scale_that_overflows_does_not_end_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under float16 the first scale may be too large by many halvings."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**110, backoff_factor=2.0**-25)
    moved = Moved()
    fit(
        method([5], max_logprob_gap=1.0),
        steps=6,
        callbacks=[moved],
        trainer={"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]},
    )
    assert moved.of_step == {step: step == 4 for step in range(6)}
    assert scaler.get_scale() == 2.0 ** (110 - 5 * 25)
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert lines[0] == (
        "opd: step 0 skipped: its gradient overflows float16 at a loss scale of 1.29807e+33, "
        "which is lowered (1 in this run)"
    )
    assert lines[-1].startswith("opd: step 5 skipped: its loss is nan")
    assert "(1 in a row, 3 end the run; 5 in this run)" in lines[-1]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_fused_optimisers_are_clipped_and_skipped_as_others(precision: str, algorithm: str) -> None:
    """Lightning leaves unscaling to them, and so refuses to clip."""

    def train(optimizer: str) -> tuple[dict[str, Tensor], list[float], list[float]]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaled = scaler if precision == "16-mixed" else None
        plugin = MixedPrecision(precision, "cpu", scaled)  # type: ignore[arg-type]
        clipped = 0.1 if algorithm == "norm" else 1e-3
        module = method([1], max_logprob_gap=1.0, optimizer=OPTIMISERS[optimizer])
        seen = fit(
            module,
            steps=3,
            trainer={
                "plugins": [plugin],
                "gradient_clip_val": clipped,
                "gradient_clip_algorithm": algorithm,
            },
        )
        norms = [logged["optim/gradient_norm"] for logged in seen.logged]
        skipped = [logged["optim/skipped_steps"] for logged in seen.logged]
        return weights(module), norms, skipped

    own, norms, skipped = train("sgd fused")
    other, other_norms, other_skipped = train("sgd")
    torch.testing.assert_close(own, other)
    assert norms == pytest.approx(other_norms, nan_ok=True)
    assert norms[0] > 0.1  # so that it is clipped
    assert skipped == other_skipped == [0, 1, 1]


def test_too_many_in_a_row_end_the_run_and_a_resumed_one_keeps_the_count(tmp_path: Path) -> None:
    def run(steps: Sequence[int], ckpt_path: str | None = None) -> list[float]:
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
        module = method(steps, stop_after_skips=2)
        seen = fit(module, steps=6, callbacks=[saver], ckpt_path=ckpt_path)
        return [logged["optim/skipped_steps"] for logged in seen.logged]

    last = tmp_path / "last.ckpt"
    for attempt in (None, str(last)):  # the resumed one ends at once
        with pytest.raises(RunStoppedError, match=r"step 4: .* that makes 2 in a row"):
            run([1, 3, 4], attempt)
        saved = torch.load(last, weights_only=True)
        assert saved["global_step"] == 4
        assert saved["skipped_steps"] == {"total": 2, "in_a_row": 1}
    assert run([], str(last)) == [2, 2]


def test_ema_teachers_are_unharmed() -> None:
    ema = EMATeacher(rate=0.5)
    module = GOPD(
        Student("lab/arithmetic/student"), OddTeacher("lab/arithmetic/teacher", [1]), ema, scale=1.5
    )
    fit(module, callbacks=[EMATeacherUpdate()])
    assert all(p.isfinite().all() for p in ema.model().parameters())


class OddEngine(HFEngine):
    """Gives a log-prob that is none."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        first, *others = super().generate(requests, sampling)
        return [first._replace(logprobs=[float("nan"), *first.logprobs[1:]]), *others]


def test_an_engine_without_numbers_is_not_believed() -> None:
    message = "step 0: the engine's log-probs are not finite on .* of the tokens that it sampled"
    with pytest.raises(EngineMismatchError, match=message):
        fit(method([]), engine=OddEngine())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_weights_that_are_not_finite_are_neither_saved_nor_pushed(
    micro_batches: int, tmp_path: Path
) -> None:
    engine = HFEngine()
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    module = method(
        [],
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(
            o, lambda step: 1e-2 if step < 1 else float("inf")
        ),
    )
    message = "step 1: the optimiser left weights that are not finite, 'model.* among them"
    with pytest.raises(RunStoppedError, match=message):
        fit(module, engine=engine, micro_batches=micro_batches, callbacks=[saver])
    assert engine.version == -1  # closed; pushed to at steps 0 and 1
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert all(x.isfinite().all() for x in saved["state_dict"].values())


def test_a_broken_model_is_not_pushed() -> None:
    module = method([])
    weights(module)  # loads it
    with torch.no_grad():
        next(module.student.parameters())[0, 0] = float("nan")
    with pytest.raises(RunStoppedError, match=r"weights to push: 'model.* is not finite in torch"):
        fit(module)


def test_the_number_of_skips_must_be_one_at_least() -> None:
    with pytest.raises(UserError, match="stop_after_skips: got 0, expected at least 1"):
        method([], stop_after_skips=0)


@pytest.mark.parametrize("held", [[], [torch.ones(3)]])
def test_a_process_with_an_empty_shard_checks_the_others(held: list[Tensor]) -> None:
    """As of a LoRA of rank 8 over 16 processes."""
    student = nn.ParameterList([torch.empty(0, 4), *held])
    ranks = Ranks(rank=0, world_size=1, sum=lambda x: x, gather=lambda x: [x])
    check_weights(3, student, ranks)
    for weight in held:
        weight[1] = torch.inf
        with pytest.raises(RunStoppedError, match=r"step 3: .* not finite, '1' among them"):
            check_weights(3, student, ranks)
