"""RunCallbacks: all are called, in order, and their attributes are read."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
from lightning.pytorch import Callback
from lightning.pytorch import Trainer as LightningTrainer

import callbacks
from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.mix import RolloutMix
from opd_lightning.errors import UserError
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.training.callback import RunCallback, run_callbacks


class Scale(RunCallback):
    """Multiplies the teacher's share."""

    def __init__(self, factor: float, heard: list[tuple[float, int]] | None = None) -> None:
        self.factor = factor
        self.heard = [] if heard is None else heard

    def before_step(self, trainer: LightningTrainer, step: int) -> None:
        self.heard.append((self.factor, step))

    def mix_at(self, step: int, mix: RolloutMix) -> RolloutMix:
        return replace(mix, teacher=mix.teacher * self.factor if step else mix.teacher)


class Plain(Callback):
    """Has the names and not the base class."""

    runs_last = True

    def before_step(self, trainer: Any, step: int) -> None:
        raise AssertionError

    def mix_at(self, step: int, mix: RolloutMix) -> RolloutMix:
        raise AssertionError


def data(mix: RolloutMix, *given: Callback) -> RolloutDataModule:
    module = RolloutDataModule(mix=mix)
    module.trainer = cast(Any, SimpleNamespace(callbacks=list(given)))
    return module


def test_two_that_move_the_mix_compose() -> None:
    moved = data(RolloutMix(teacher=0.8), Scale(0.5), Plain(), Scale(0.25))
    assert [moved.mix_at(step).teacher for step in (0, 1, 0)] == [0.8, 0.1, 0.8]


def test_they_compose_in_the_order_of_the_trainer() -> None:
    class Set(RunCallback):
        def mix_at(self, step: int, mix: RolloutMix) -> RolloutMix:
            return replace(mix, teacher=0.4)

    mix = RolloutMix(teacher=0.8)
    assert data(mix, Set(), Scale(0.5)).mix_at(1).teacher == 0.2
    assert data(mix, Scale(0.5), Set()).mix_at(1).teacher == 0.4


def test_two_that_listen_are_both_heard() -> None:
    heard: list[tuple[float, int]] = []
    module = data(RolloutMix(), Scale(1.0, heard), Plain(), Scale(2.0, heard))
    module._before_step(3)
    assert heard == [(1.0, 3), (2.0, 3)]


@pytest.mark.parametrize(
    ("declared", "moved", "line"),
    [
        ({}, {"teacher": 0.5}, "got mix.teacher 0.5, but data.mix.teacher is 0.0"),
        ({"teacher": 1.0}, {"teacher": 0.5}, "got responses of the student"),
        ({"guided": 0.5}, {"guided_view": "hint"}, "got mix.guided_view 'hint'"),
    ],
)
def test_authors_that_were_not_prepared_are_refused(
    declared: dict[str, Any], moved: dict[str, Any], line: str
) -> None:
    class Move(RunCallback):
        def mix_at(self, step: int, mix: RolloutMix) -> RolloutMix:
            return replace(mix, **moved)

    with pytest.raises(UserError) as error:
        data(RolloutMix(**declared), Move()).mix_at(7)
    assert str(error.value).startswith(f"Move.mix_at, step 7: {line}")


def test_a_mix_that_is_none_is_refused() -> None:
    class Forgets(RunCallback):
        def mix_at(self, step: int, mix: RolloutMix) -> Any:
            replace(mix, teacher=0.5)

    with pytest.raises(UserError) as error:
        data(RolloutMix(teacher=1.0), Forgets()).mix_at(7)
    assert str(error.value).startswith("Forgets.mix_at, step 7: got nothing (None), expected")


def test_those_that_run_last_do() -> None:
    class Last(RunCallback):
        runs_last = True

    last, plain, first = Last(), Plain(), Scale(1.0)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[last, plain, first])
    given = [c for c in trainer.callbacks if c in (last, plain, first)]  # type: ignore[attr-defined]
    assert given == [plain, first, last]
    assert {last, first} <= set(run_callbacks(trainer))
    assert id(plain) not in map(id, run_callbacks(trainer))


def test_ours_declare_what_they_are() -> None:
    declared = {name for name, value in vars(RunCallback).items() if not name.startswith("__")}
    flags = {n for n in declared if not callable(getattr(RunCallback, n))}
    assert flags == {"moves_ema_teachers", "runs_last", "handles_signals", "charts"}
    for name in callbacks.__all__:
        kind = getattr(callbacks, name)
        assert issubclass(kind, RunCallback)
        ours = {n for n in vars(kind) if not n.startswith("__") and not callable(getattr(kind, n))}
        assert {n for n in ours if not isinstance(vars(kind)[n], property)} <= flags, name


def test_charts_of_a_category_are_put_together() -> None:
    from opd_lightning.run.dashboard import with_charts

    class One(RunCallback):
        charts: ClassVar[Any] = {"Costs": {"a": ["Multiline", ["a$"]]}}

    class Two(RunCallback):
        charts: ClassVar[Any] = {"Costs": {"b": ["Multiline", ["b$"]]}}

    assert with_charts({}, [One(), Two()]) == {
        "Costs": {**One.charts["Costs"], **Two.charts["Costs"]}
    }


def test_state_keys_of_checkpoints_stay() -> None:
    keys = {callbacks.CollapseWatch().state_key, callbacks.CapabilityRetention(["a"]).state_key}
    assert keys == {"CollapseWatch", "CapabilityRetention"}
