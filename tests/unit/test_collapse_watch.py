"""CollapseWatch on figures made by hand: what is out of its band, and what is done about it."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import CollapseWatch
from callbacks.collapse_rules import Band, Disagreement, Entropy, Length, Repetition, Truncation
from callbacks.collapse_tracks import Track
from callbacks.good_checkpoints import GoodCheckpoints, StepBack
from opd_lightning.commands.lightning_cli import OPDCLI
from opd_lightning.commands.trainer import Trainer as OurTrainer
from opd_lightning.errors import CollapseError, UserError
from opd_lightning.training.base import DistillationModule
from opd_lightning.training.learning_rates import scaled

CONFIG = Path(__file__).parents[2] / "configs" / "lab" / "opd.yaml"
HEALTHY = {
    "response/truncated": 0.02,
    "response/repetitive": 0.0,
    "entropy/student": 0.4,
    "response/length": 300.0,
    "signal/log_ratio_abs_mean": 0.3,
}


def outside(band: Band, values: Sequence[float], start_steps: int = 3) -> list[int]:
    """For how long the figure has been out of its band, after every step."""
    track = Track(band, start_steps)
    lengths = []
    for step, value in enumerate(values):
        track.add(value, step)
        lengths.append(track.outside)
    return lengths


# Bands --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("band", "start", "bounds"),
    [
        (Truncation(), 0.0, (-math.inf, 0.3)),
        (Truncation(), 0.4, (-math.inf, 0.6)),  # the wider of 0.3 and 1.5 x 0.4
        (Truncation(rise=None), 0.4, (-math.inf, 0.3)),
        (Truncation(highest=None), 0.4, (-math.inf, 0.6)),
        (Repetition(), 0.0, (-math.inf, 0.1)),
        (Entropy(), 0.5, (0.01, 1.5)),
        (Entropy(lowest=0.005), 0.5, (0.005, 1.5)),
        (Length(), 100.0, (20.0, 400.0)),
        (Length(fall=None, highest=50.0, rise=None), 100.0, (-math.inf, 50.0)),
        (Disagreement(), 0.0, (-math.inf, 1.0)),  # its own teacher, at first
        (Disagreement(), 0.5, (-math.inf, 1.5)),
    ],
)
def test_bounds(band: Band, start: float, bounds: tuple[float, float]) -> None:
    assert band.bounds(start) == pytest.approx(bounds)


@pytest.mark.parametrize(
    ("band", "values", "expected"),
    [
        (Length(), [90, 100, 110, 399, 401, 500, 400, 20, 19], [0, 0, 0, 0, 1, 2, 0, 0, 1]),
        # The start is not judged by bounds that depend on it.
        (Truncation(), [0.9, 0.0, 0.1, 0.3, 0.29, 0.31], [0, 0, 0, 0, 0, 1]),
        (Entropy(), [0.5, 0.5, 0.5, 0.009, 1.51], [0, 0, 0, 1, 2]),  # either side counts
        # No number is in no band, and no part of a start.
        (Entropy(), [math.nan, 0.5, 0.5, 0.5, math.inf, 0.5], [1, 1, 1, 1, 2, 0]),
    ],
)
def test_steps_out_of_the_band(band: Band, values: list[float], expected: list[int]) -> None:
    assert outside(band, values) == expected


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Length(patience=0), "Length: patience is 0, expected 1 or more"),
        (lambda: Length(fall=None, rise=None), "Length: got no bound at all"),
        (lambda: Entropy(lowest=-1.0), "expected numbers of 0 or more"),
        (lambda: Entropy(lowest=math.nan), "expected numbers of 0 or more"),
        (lambda: StepBack(slow_down=0.0), "a factor in"),
        (lambda: CollapseWatch(start_steps=0), "start_steps 0"),
        (lambda: CollapseWatch("warn", None, None, None, None, None), "got 0 rules"),
    ],
)
def test_knobs_are_checked(make: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        make()


# The watch ----------------------------------------------------------------------------------


class Run:
    """A trainer that only logs; its checkpoints are files with nothing in them."""

    def __init__(self, watch: CollapseWatch, folder: Path) -> None:
        self.watch = watch
        self.logs: Sequence[str] = tuple(HEALTHY)
        self.module = SimpleNamespace(rate_scales={}, step_figures={})
        self.logged: list[dict[str, float]] = []
        self.saved: list[int] = []
        self.trainer = SimpleNamespace(
            global_step=0,
            is_global_zero=True,
            strategy=None,
            checkpoint_callback=ModelCheckpoint(folder),
            save_checkpoint=self._save,
            log_every_n_steps=1,
            loggers=[SimpleNamespace(log_metrics=self._log, save=lambda: None)],
        )
        self.begin()

    def begin(self) -> None:
        self.watch.on_train_start(
            cast(Trainer, self.trainer), cast(DistillationModule, self.module)
        )

    def step(self, **changes: float) -> None:
        """A step of two micro-batches."""
        self.logged.append({})
        figures = HEALTHY | {name.replace("_", "/", 1): value for name, value in changes.items()}
        self.module.step_figures = {name: figures[name] for name in self.logs}
        self._hook()
        self.trainer.global_step += 1
        self._hook()

    def steps(self, count: int, **changes: float) -> None:
        for _ in range(count):
            self.step(**changes)

    def _hook(self) -> None:
        self.watch.on_train_batch_end(
            cast(Trainer, self.trainer), cast(DistillationModule, self.module)
        )

    def _log(self, figures: dict[str, float], step: int) -> None:
        assert step == len(self.logged) - 1
        self.logged[-1] |= figures

    def _save(self, path: Path, weights_only: bool) -> None:
        assert not weights_only
        path.touch()
        self.saved.append(self.trainer.global_step)


def test_an_honest_run_hears_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(CollapseWatch("stop"), tmp_path)
    for step in range(100):  # it gets surer and longer, and now and then a step is odd
        odd = 3.0 if step % 10 in (5, 6) else 1.0
        run.step(
            entropy_student=0.4 * 0.97**step,
            response_length=300 * 1.005**step * odd,
            response_truncated=0.02 * 1.02**step,
            signal_log_ratio_abs_mean=0.3 * 0.99**step * odd,
        )
    assert capsys.readouterr().err == ""
    assert {step["collapse/out_of_band"] for step in run.logged} <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"response_truncated": 0.9}, "Truncation: response/truncated is 0.9"),
        ({"response_repetitive": 0.3}, "Repetition: response/repetitive is 0.3"),
        ({"entropy_student": 0.001}, "Entropy: entropy/student is 0.001"),
        ({"entropy_student": 4.0}, "Entropy: entropy/student is 4"),
        ({"response_length": 2000.0}, "Length: response/length is 2e+03"),
        ({"response_length": 10.0}, "Length: response/length is 10"),
        ({"signal_log_ratio_abs_mean": 1.1}, "Disagreement: signal/log_ratio_abs_mean is 1.1"),
    ],
)
def test_every_rule_warns_once_a_time(
    changes: dict[str, float], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(CollapseWatch(), tmp_path)
    run.steps(10)
    run.steps(4, **changes)
    assert capsys.readouterr().err == ""
    run.steps(30, **changes)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"opd: step 14: {named}, out of its band (")
    assert "for 5 steps" in line
    assert "look at rollouts, and if they are bad, lower the learning rate" in line
    assert [step["collapse/out_of_band"] for step in run.logged] == [0.0] * 10 + [1.0] * 34
    run.steps(1)
    run.steps(9, **changes)
    assert capsys.readouterr().err.startswith(f"opd: step 49: {named}")


def test_rules_that_can_never_be_broken_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(CollapseWatch(), tmp_path)
    run.logs = ("response/truncated", "response/repetitive", "entropy/student")
    run.steps(6, response_truncated=0.8)
    # Nothing of the teacher's signal: there may be no teacher.
    high, missing = capsys.readouterr().err.splitlines()
    assert "Truncation: response/truncated began at 0.8, so that it can never leave" in high
    assert "Length: the first 3 steps do not log response/length; set the rule to null" in missing


def test_a_rule_can_be_switched_off(tmp_path: Path) -> None:
    run = Run(CollapseWatch("stop", truncation=None), tmp_path)
    run.steps(20, response_truncated=1.0)
    run = Run(CollapseWatch("stop"), tmp_path)
    run.steps(3)
    run.steps(4, response_truncated=1.0)
    with pytest.raises(CollapseError, match=r"step 7: Truncation.*before step 3") as caught:
        run.step(response_truncated=1.0)
    assert caught.value.raised_by_all  # type: ignore[attr-defined]


def test_steps_without_a_figure_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as whole steps of recorded responses, which nobody truncates."""

    def step(**changes: float) -> None:
        run.logs = tuple(HEALTHY)
        run.step(**changes)
        run.logs = ("entropy/student",)
        run.steps(4)

    run = Run(CollapseWatch(), tmp_path)
    for _ in range(3):
        step()
    for _ in range(5):
        assert "for 5 steps" not in capsys.readouterr().err
        step(response_truncated=0.6)
    (line,) = capsys.readouterr().err.splitlines()  # once, not at every step without the figure
    assert "step 35: Truncation: response/truncated is 0.6" in line
    broken = [index for index, it in enumerate(run.logged) if it["collapse/out_of_band"]]
    assert broken == [15, 20, 25, 30, 35]
    run = Run(CollapseWatch("stop"), tmp_path)
    for _ in range(3):
        step()
    for _ in range(4):
        step(response_truncated=0.6)
    with pytest.raises(CollapseError, match=r"step 35: .* for 5 steps.*before step 15"):
        step(response_truncated=0.6)


def test_no_step_is_good_until_the_figure_is_back(tmp_path: Path) -> None:
    run = Run(CollapseWatch("step_back", step_back=StepBack(every_n_steps=4)), tmp_path)
    run.steps(4)
    run.step(response_truncated=0.6)
    run.logs = ("entropy/student",)
    run.steps(20)
    assert run.saved == [0, 4]
    run.logs = tuple(HEALTHY)
    run.steps(4)
    assert run.saved == [0, 4, 29]


def test_what_it_knows_is_saved(tmp_path: Path) -> None:
    """Interrupted anywhere, it decides at the same step."""
    series: list[dict[str, float]] = [{}] * 6 + [{"entropy_student": 0.0}] * 5
    for cut in range(1, len(series)):
        run = Run(CollapseWatch("stop"), tmp_path)
        for changes in series[:cut]:
            run.step(**changes)
        file = io.BytesIO()
        torch.save(run.watch.state_dict(), file)
        file.seek(0)
        again = CollapseWatch("stop", repetition=None)  # its state is left alone
        again.load_state_dict(torch.load(file, weights_only=True))
        run.watch = again
        run.begin()
        for changes in series[cut:-1]:
            run.step(**changes)
        with pytest.raises(CollapseError, match="step 10"):
            run.step(**series[-1])


# Good checkpoints ---------------------------------------------------------------------------


def test_two_checkpoints_of_calm_stretches_are_kept(tmp_path: Path) -> None:
    run = Run(CollapseWatch("step_back", step_back=StepBack(every_n_steps=4)), tmp_path)

    def there() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    assert run.saved == [0]
    run.steps(8)
    assert run.saved == [0, 4, 8]
    assert there() == ["good-step=4.ckpt", "good-step=8.ckpt"]
    run.steps(3)
    run.step(response_truncated=0.9)  # one step is out of its band: the stretch begins anew
    run.steps(3)
    assert run.saved == [0, 4, 8]
    run.step()
    assert run.saved == [0, 4, 8, 16]
    assert run.watch.good is not None
    assert run.watch.good.steps == [8, 16]
    assert run.watch.good.state_dict() == {"steps": [8, 16], "calm": 0}
    (tmp_path / "good-step=8.ckpt").unlink()
    run.begin()
    assert run.watch.good.steps == [16]


def test_a_run_that_is_resumed_from_its_start_keeps_that(tmp_path: Path) -> None:
    run = Run(CollapseWatch("step_back", step_back=StepBack(every_n_steps=4)), tmp_path)
    again = CollapseWatch("step_back", step_back=StepBack(every_n_steps=4))
    again.load_state_dict(run.watch.state_dict())  # the newest checkpoint is that of step 0
    run.watch = again
    run.begin()
    run.steps(4)
    assert run.saved == [0, 4]
    assert again.good is not None
    assert again.good.steps == [0, 4]
    assert (tmp_path / "good-step=0.ckpt").exists()


def test_a_good_checkpoint_comes_after_the_figures_of_its_steps(tmp_path: Path) -> None:
    """A run that is killed right after it goes on behind these steps."""
    run = Run(CollapseWatch("step_back", step_back=StepBack(every_n_steps=4)), tmp_path)
    logged: list[int] = []

    def save(path: Path, weights_only: bool) -> None:
        logged.append(sum("collapse/out_of_band" in figures for figures in run.logged))

    run.trainer.save_checkpoint = save
    run.steps(8)
    assert logged == [4, 8]


def test_a_run_without_checkpoints_cannot_step_back() -> None:
    trainer = SimpleNamespace(checkpoint_callback=None)
    with pytest.raises(UserError, match=r"enable_checkpointing on, or choose 'stop'"):
        GoodCheckpoints(1).check(cast(Trainer, trainer))


# What they rest on --------------------------------------------------------------------------


def test_the_watch_comes_after_whoever_has_a_part_in_the_step() -> None:
    first, last = Callback(), Callback()
    watch = CollapseWatch()
    trainer = OurTrainer(accelerator="cpu", logger=False, callbacks=[first, watch, last])
    order: Iterable[Any] = trainer.callbacks  # type: ignore[attr-defined]
    assert [c for c in order if c in (first, watch, last)] == [first, last, watch]


def test_scaled_rates_leave_the_schedule_alone() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)  # from the last rate
    moved = []
    for _ in range(4):
        before = weight.item()
        weight.grad = -torch.ones(1)
        with scaled([optimizer], 0.1):
            optimizer.step()
        schedule.step()
        moved.append(weight.item() - before)
    assert moved == pytest.approx([0.1 * (1 / 3 + n / 6) for n in range(4)])
    with pytest.raises(RuntimeError), scaled([optimizer], 0.1):
        raise RuntimeError
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)


def test_every_threshold_is_in_the_yaml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(OPDCLI, "_run_subcommand", lambda self, subcommand: None)
    (tmp_path / "watch.yaml").write_text(
        "trainer:\n  callbacks:\n    - class_path: callbacks.CollapseWatch\n      init_args:\n"
        "        action: step_back\n        repetition: null\n        truncation: {highest: 0.3}\n"
        "        length: {rise: null, patience: 9}\n        disagreement: {highest: 2.0}\n"
        "        step_back: {at_most: 1}\n"
    )
    cli = OPDCLI(["fit", "--config", str(CONFIG), "--config", str(tmp_path / "watch.yaml")])
    callbacks: Iterable[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (watch,) = [c for c in callbacks if isinstance(c, CollapseWatch)]
    assert [track.band for track in watch.tracks] == [
        Truncation(highest=0.3),
        Entropy(),
        Length(rise=None, patience=9),
        Disagreement(highest=2.0),
    ]
    assert watch.settings == StepBack(at_most=1)
