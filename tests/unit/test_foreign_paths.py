"""A checkpoint is data from outside: no path in it removes anything but checkpoints of the run."""

import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.good_checkpoints import GoodCheckpoints
from tests.toy_run import train


class Forge(Callback):
    """Writes other paths into the state of every ModelCheckpoint that is saved."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for key, state in checkpoint["callbacks"].items():
            if key.startswith("ModelCheckpoint"):
                state |= self.fields


@pytest.mark.parametrize("kind", ["dots", "link", "absolute"])
@pytest.mark.parametrize("field", ["best_model_path", "best_k_models", "last_model_path"])
def test_a_foreign_folder_survives_the_next_save(
    tmp_path: Path, kind: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    precious.mkdir()
    (precious / "data").write_text("x")
    if kind == "link":
        os.symlink(tmp_path, run / "out")
    path = {"dots": f"{run}/../precious", "link": f"{run}/out/precious", "absolute": str(precious)}
    fields: dict[str, Any] = {field: path[kind]}
    monitored = {"monitor": "loss", "save_top_k": 1, "save_last": True}
    saver = monitored if field != "best_model_path" else {"save_last": True}
    if field == "best_k_models":
        fields = {"best_k_models": {path[kind]: 9.0}, "kth_best_model_path": path[kind]}
    train(run, 1, saver=saver, callbacks=[Forge(**fields)])
    trainer, _ = train(run, 3, saver=saver)
    assert (precious / "data").read_text() == "x"
    assert trainer.global_step == 3
    assert "outside of" in capsys.readouterr().err
    assert (run / "last.ckpt").exists()


def test_paths_of_the_run_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = {"monitor": "loss", "save_top_k": 2, "save_last": True}
    train(tmp_path, 2, saver=saver)
    trainer, _ = train(tmp_path, 4, saver=saver)
    assert "outside of" not in capsys.readouterr().err
    keeper: Any = trainer.checkpoint_callback
    assert {Path(p).parent for p in keeper.best_k_models} == {tmp_path}
    assert len(list(tmp_path.glob("step=*.ckpt"))) == 2


def test_steps_are_numbers_before_they_are_files() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        GoodCheckpoints(1).load_state_dict({"steps": ["../../x"], "calm": 0})
