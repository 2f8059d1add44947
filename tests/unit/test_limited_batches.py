"""Limits of batches: the whole number 1 is one batch, 1.0 is all of them."""

from types import SimpleNamespace
from typing import Any

import pytest

from callbacks import CapabilityRetention
from opd_lightning.commands.lightning_cli import _Parser
from opd_lightning.commands.trainer import Trainer
from opd_lightning.data.prompts import PromptSource
from opd_lightning.errors import UserError
from opd_lightning.evaluation.responses import EvaluationSuite
from opd_lightning.run.datamodule import RolloutDataModule
from opd_lightning.verifiers import ExactMatch


def test_a_whole_number_stays_one() -> None:
    parser = _Parser(prog="opd")
    parser.add_lightning_class_args(Trainer, "trainer")
    names = [f"limit_{stage}_batches" for stage in ("train", "val", "test")]
    for given, kind in (("1", int), ("1.0", float), ("0.5", float), ("3", int)):
        found = parser.parse_args([f"--trainer.{name}={given}" for name in names]).trainer
        assert [repr(found[name]) for name in names] == [repr(kind(given))] * 3


def test_retention_needs_all_batches() -> None:
    suites = {name: EvaluationSuite(prompts=PromptSource(name)) for name in ("a", "b")}
    trainer: Any = SimpleNamespace(
        datamodule=RolloutDataModule(validation=suites, verifier=ExactMatch()),
        enable_validation=True,
        limit_val_batches=1.0,
    )
    CapabilityRetention(["a"]).setup(trainer, None, "fit")
    trainer.limit_val_batches = 1
    with pytest.raises(UserError, match="limit_val_batches is 1, expected"):
        CapabilityRetention(["a"]).setup(trainer, None, "fit")
