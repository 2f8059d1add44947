"""Checkpoints after a kill, a full disk or damage, and their handling."""

import os
import pickle
import resource
import shutil
import struct
import subprocess
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, StepLR

from opd_lightning.checkpoints import save_last, whole
from opd_lightning.checkpoints.staging import commit, recover, staging_path
from opd_lightning.errors import CheckpointError, UserError
from tests.toy_run import Toy, train

Err = pytest.CaptureFixture[str]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def flip(path: Path) -> None:
    """Change one bit of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size * ("/data/" in e.filename))
    content = bytearray(path.read_bytes())
    start = entry.header_offset
    start += 30 + sum(struct.unpack("<HH", content[start + 26 : start + 30]))
    content[start] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Written whole or not at all --------------------------------------------------------------


class Kill(BaseException):
    """Nothing is tidied up after it."""


@contextmanager
def killed_at(operation: int) -> Iterator[None]:
    """Nothing reaches the disk from the given operation on."""
    done = 0

    def mortal(act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done >= operation:
                if act is torch.save and isinstance(args[1], Path | str):
                    Path(args[1]).write_bytes(b"half")
                elif act is torch.save:
                    args[1].write(b"half")
                raise Kill
            return act(*args, **kwargs)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for place, name in (
            (os, "rename"),
            (os, "replace"),
            (os, "unlink"),
            (os, "remove"),
            (os, "symlink"),
            (shutil, "rmtree"),
            (torch, "save"),
        ):
            patch.setattr(place, name, mortal(getattr(place, name)))
        yield


@pytest.mark.parametrize("save_last", [True, pytest.param("link", marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_no_finished_step(save_last: Any, tmp_path: Path) -> None:
    saver, folder, begun = {"save_last": save_last}, tmp_path / "run", tmp_path / "begun"
    train(folder, 2, saver=saver)
    shutil.copytree(folder, begun, symlinks=True)
    for operation in range(1, 100):
        shutil.rmtree(folder)
        shutil.copytree(begun, folder, symlinks=True)
        try:
            with killed_at(operation):
                train(folder, 4, saver=saver)
        except Kill:
            pass
        else:
            break
        module = Toy()
        trainer, _ = train(folder, 5, module=module, saver=saver)
        assert trainer.global_step == 5
        assert len(module.losses) <= 3, "a step that was on the disk was made again"
        assert not [name for name in names(folder) if name.startswith(".")]
        assert step_of(folder / "last.ckpt") == 5
    assert operation > 8


@pytest.mark.parametrize("kinds", ["folder folder", "folder file", "file folder", "file file"])
def test_a_kill_while_names_change_leaves_the_old_or_the_new(kinds: str, tmp_path: Path) -> None:
    def write(path: Path, kind: str, text: str) -> None:
        if kind == "folder":
            path.mkdir()
            path = path / "shard"
        path.write_text(text)

    before, after = kinds.split()
    for operation in range(1, 20):
        folder = tmp_path / str(operation)
        folder.mkdir()
        target = folder / "last.ckpt"
        write(target, before, "old")
        write(staging_path(target), after, "new")
        try:
            with killed_at(operation):
                commit(target)
            finished = True
        except Kill:
            finished = False
        recover(folder)
        assert names(folder) == ["last.ckpt"]
        content = (target / "shard" if target.is_dir() else target).read_text()
        assert content == "new" if finished else content in ("old", "new")
        if finished:
            break
    assert operation > 1


def test_what_a_link_names_is_not_written_through(tmp_path: Path) -> None:
    train(tmp_path, 2, saver={"save_last": "link"})
    assert (tmp_path / "last.ckpt").is_symlink()
    trainer, _ = train(tmp_path, 3, saver={"every_n_train_steps": 100})
    assert save_last(trainer) == tmp_path / "last.ckpt"
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert step_of(tmp_path / "last.ckpt") == 3
    assert step_of(tmp_path / "step=2.ckpt") == 2


class Puts(Callback):
    """Callback that adds to the checkpoint."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["what"] = self.what


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"step 1: could not write .*more than .*toy_run\.Toy"
    ):
        train(tmp_path, 2, callbacks=[Puts(Toy)])
    assert not names(tmp_path)


class Holds(Callback):
    """Callback with a state, which the first step replaces."""

    def __init__(self, first: Any, then: Any = 0.0) -> None:
        self.state, self.then = first, then

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def on_train_batch_end(self, *_: Any) -> None:
        self.state = self.then


def test_a_state_that_cannot_be_saved_is_refused_before_it_costs_anything(tmp_path: Path) -> None:
    late = {"every_n_train_steps": 100}
    module = Toy()
    with pytest.raises(UserError, match=r"callbacks: Holds\.state_dict: .*deque.*; return tensors"):
        train(tmp_path, 3, module=module, saver=late, callbacks=[Holds(deque())])
    assert not hasattr(module, "layers")  # weights are not loaded
    with pytest.raises(UserError, match=r"Holds\.state_dict: .*numpy.*; return tensors"):
        train(tmp_path, 3, module=module, saver=late, callbacks=[Holds(0.0, np.float64(1))])
    assert len(module.losses) == 1
    train(tmp_path, 3, callbacks=[Holds({"a": [torch.ones(2), "b", None]}, (1, True))])


def stop_at(folder: Path, reason: str) -> None:
    """Run whose third checkpoint is too large for the disk."""
    train(folder, 2)
    trainer, module = train(folder, 2)
    module.extra = torch.nn.Parameter(torch.zeros(1 << 18))
    with pytest.raises(CheckpointError) as ended:
        trainer.save_checkpoint(folder / "last.ckpt")
    line = str(ended.value)
    assert line.startswith(f"step 2: could not write '{folder}/last.ckpt': {reason}, ")
    assert "bytes are free there; " in line
    assert "\n" not in line
    assert names(folder) == ["last.ckpt", "step=2.ckpt"]
    assert whole(folder / "last.ckpt").step == 2


def test_a_quota(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        stop_at(tmp_path, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        stop_at(tmp_path, "No space left on device")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    module = Toy()
    with pytest.raises(UserError, match=r"ModelCheckpoint\.dirpath: .* is no folder"):
        train(tmp_path / "runs" / "checkpoints", 1, module=module)
    assert not module.losses  # it is found before the first step


# Read again -------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_one_is_named_and_the_one_before_taken(
    damage: Callable[[Path], None], tmp_path: Path, capsys: Err
) -> None:
    train(tmp_path, 3, saver={"save_top_k": -1})
    for name in ("last.ckpt", "step=3.ckpt"):
        damage(tmp_path / name)
    capsys.readouterr()
    module = Toy()
    train(tmp_path, 4, module=module, saver={"save_top_k": -1})
    assert len(module.losses) == 2, "it goes on from step 2"
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("opd: ")]
    assert len(said) == 2
    assert all("is passed over: " in line for line in said)
    assert step_of(tmp_path / "last.ckpt") == 4


def test_the_newest_is_the_one_of_the_most_steps(tmp_path: Path) -> None:
    train(tmp_path, 3, saver={"save_top_k": -1})
    os.utime(tmp_path / "step=1.ckpt", (2e9, 2e9))  # a clock jumped
    for name in ("last.ckpt", "step=3.ckpt"):
        os.utime(tmp_path / name, (1, 1))
    module = Toy()
    train(tmp_path, 4, module=module)
    assert len(module.losses) == 1


def test_last_does_not_return_to_a_branch_that_was_left(tmp_path: Path, capsys: Err) -> None:
    every = {"save_top_k": -1}
    train(tmp_path, 4, saver=every)
    # Killed before its first save, and resumed with the usual command.
    with pytest.raises(Kill):
        train(
            tmp_path, 4, saver=every, ckpt_path=tmp_path / "step=2.ckpt", callbacks=[KillsAtOnce()]
        )
    assert names(tmp_path) == ["left-1", "step=1.ckpt", "step=2.ckpt"]
    assert names(tmp_path / "left-1") == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]
    assert (
        f"3 of the branch that it leaves are moved to {str(tmp_path / 'left-1')!r}"
        in capsys.readouterr().err
    )
    module = Toy()
    train(tmp_path, 3, saver=every, module=module)
    assert len(module.losses) == 1
    # Back to the first branch.
    train(tmp_path, 5, saver=every, ckpt_path=tmp_path / "left-1" / "step=4.ckpt")
    assert names(tmp_path) == ["last.ckpt", "left-1", "left-2", "step=5.ckpt"]
    assert names(tmp_path / "left-2") == ["last.ckpt", *(f"step={n}.ckpt" for n in (1, 2, 3))]


def test_a_requeued_job_goes_on_from_what_it_saved_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Err
) -> None:
    every = {"save_top_k": -1}
    train(tmp_path, 4, saver=every)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    began = tmp_path / "step=1.ckpt"
    for restarts, steps, made in ((0, 3, 2), (1, 4, 1), (2, 5, 1)):  # the same checkpoint each time
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        module = Toy()
        train(tmp_path, steps, saver=every, ckpt_path=began, module=module)
        assert len(module.losses) == made
        assert ("was requeued, and resumes" in capsys.readouterr().err) == (restarts > 0)


class Scores(Callback):
    """Logs a given score after every step."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        score = torch.tensor(self.scores[trainer.global_step - 1])
        trainer.callback_metrics["score"] = score


@pytest.mark.parametrize("keep", [1, 2])
def test_a_best_one_that_the_branch_removed_counts_no_more(
    keep: int, tmp_path: Path, capsys: Err
) -> None:
    """Going back to step 3: step 2 was the best of its time, and step 4 has replaced it."""

    def run(steps: int, *scores: float, ckpt_path: str | Path = "last") -> Any:
        best = {"filename": "best-{step}", "monitor": "score", "mode": "max", "save_last": None}
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer, _ = train(
            tmp_path,
            steps,
            saver=best | {"save_top_k": keep},
            callbacks=[Scores(*scores), every],
            ckpt_path=ckpt_path,
        )
        return trainer.checkpoint_callback

    run(5, 0.1, 0.9, 0.8, 0.95, 0.97)
    capsys.readouterr()
    saver = run(5, 0.1, 0.9, 0.8, 0.6, 0.7, ckpt_path=tmp_path / "step=3.ckpt")
    assert "best-step=2.ckpt' and 1 more among" in capsys.readouterr().err or keep == 1
    expected = [tmp_path / f"best-step={step}.ckpt" for step in (5, 4)[:keep]]
    assert [Path(path) for path in sorted(saver.best_k_models, reverse=True)] == expected
    assert all(path.exists() for path in expected)
    assert Path(saver.best_model_path) == expected[0]
    assert float(saver.best_model_score) == pytest.approx(0.7)
    # Back to the first branch, whose files were moved.
    left = tmp_path / "left-1" / "step=5.ckpt"
    saver = run(6, 0.1, 0.9, 0.8, 0.95, 0.97, 0.5, ckpt_path=left)
    assert [*saver.best_k_models] == [saver.best_model_path] == [f"{tmp_path}/best-step=6.ckpt"]
    assert Path(saver.best_model_path).exists()


class KillsAtOnce(Callback):
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        raise Kill


def test_a_run_without_a_whole_one_starts_from_the_beginning(tmp_path: Path, capsys: Err) -> None:
    (tmp_path / ".last.ckpt.writing").write_text("of a run that was killed")
    module = Toy()
    train(tmp_path, 1, module=module)
    assert len(module.losses) == 1
    assert capsys.readouterr().err.count("opd: no whole checkpoint is there yet") == 1
    assert names(tmp_path) == ["last.ckpt", "step=1.ckpt"]


def test_checkpoints_do_not_pile_up_over_resumes(tmp_path: Path) -> None:
    for steps in range(1, 5):
        train(tmp_path, steps, saver={"save_last": None})
        assert names(tmp_path) == [f"step={steps}.ckpt"]
    for steps in range(5, 8):
        monitored = {"monitor": "loss", "save_top_k": 2, "mode": "min"}
        train(tmp_path / "best", steps, saver=monitored, ckpt_path="last")
    assert len(names(tmp_path / "best")) == 3


def test_a_damaged_one_that_was_named_is_refused(tmp_path: Path) -> None:
    train(tmp_path, 2)
    flip(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"'.*last\.ckpt' is damaged .* has other bytes"):
        train(tmp_path, 3, ckpt_path=tmp_path / "last.ckpt")


def test_a_program_is_not_run(tmp_path: Path) -> None:
    train(tmp_path, 1)
    ran = tmp_path / "ran"
    bomb = Puts(None)
    bomb.__class__ = type("Bomb", (), {"__reduce__": lambda _: (os.mkdir, (str(ran),))})
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    torch.save({**content, "more": bomb}, tmp_path / "last.ckpt")
    (tmp_path / "old.ckpt").write_bytes(pickle.dumps(bomb))
    for name in ("last", "old"):
        with pytest.raises(UserError, match=r"more than tensors and plain|not written by `opd fit"):
            train(tmp_path, 2, ckpt_path=tmp_path / f"{name}.ckpt")
    assert not ran.exists()


def test_a_disk_that_does_not_answer_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, 1)

    def no_answer(*_: Any) -> None:
        raise OSError(5, "Input/output error", "last.ckpt")

    monkeypatch.setattr("opd_lightning.checkpoints.reading.load", no_answer)
    monkeypatch.setattr("opd_lightning.checkpoints.reading.zipfile.is_zipfile", no_answer)
    with pytest.raises(CheckpointError, match=r"could not read 'last\.ckpt': Input/output error"):
        train(tmp_path, 2)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Toy(width=9), r"'layers\.0\.bias' is of shape \[8\] there and of shape \[9\] in this run"),
        (Toy(optimizer=lambda p: torch.optim.SGD(p, lr=1.0)), "optimiser AdamW, got SGD"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(module: Toy, message: str, tmp_path: Path) -> None:
    train(tmp_path, 1)
    with pytest.raises(UserError, match=message):
        train(tmp_path, 2, module=module)


@pytest.mark.parametrize("before", [{}, {"fused": True}, {"foreach": False}])
@pytest.mark.parametrize("now", [{}, {"fused": True}, {"foreach": False}])
def test_another_implementation_of_the_optimiser_is_taken(
    before: dict[str, Any], now: dict[str, Any], tmp_path: Path
) -> None:
    for steps, options in ((1, before), (2, now)):
        module = Toy(optimizer=partial(torch.optim.AdamW, lr=1e-2, **options))
        trainer, _ = train(tmp_path, steps, module=module)
    group = trainer.optimizers[0].param_groups[0]
    assert {name: group[name] for name in now} == now


class Scheduled(Toy):
    """With a schedule of the learning rate."""

    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def falling(optimizer: Optimizer) -> Any:
    return StepLR(optimizer, 1, 0.5)


def rising(optimizer: Optimizer) -> Any:
    return LinearLR(optimizer, 0.5)


def test_another_schedule_is_refused_and_none_keeps_the_rate(tmp_path: Path) -> None:
    train(tmp_path, 2, module=Scheduled(falling))
    with pytest.raises(UserError, match="was written with scheduler StepLR, got LinearLR"):
        train(tmp_path, 3, module=Scheduled(rising))
    trainer, _ = train(tmp_path, 3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-2 / 4
    train(tmp_path, 4, module=Scheduled(falling))  # a first one


def test_weights_alone_are_no_state_to_go_on_from(tmp_path: Path) -> None:
    train(tmp_path, 1, saver={"save_weights_only": True})
    with pytest.raises(UserError, match="holds weights alone"):
        train(tmp_path, 2)


def test_last_passes_weights_alone_over(tmp_path: Path) -> None:
    def weights() -> Callback:
        often: dict[str, Any] = {"every_n_train_steps": 3, "save_top_k": -1}
        return ModelCheckpoint(tmp_path, "weights-{step}", save_weights_only=True, **often)

    saver = {"every_n_train_steps": 2, "save_last": None}
    train(tmp_path, 3, saver=saver, callbacks=[weights()])
    assert names(tmp_path) == ["step=2.ckpt", "weights-step=3.ckpt"]
    module = Toy()
    train(tmp_path, 4, saver=saver, callbacks=[weights()], module=module)
    assert len(module.losses) == 2


def test_a_state_without_loops_is_none_to_go_on_from(tmp_path: Path) -> None:
    """It would begin again at step 0, with later weights."""
    train(tmp_path, 1)
    (path,) = tmp_path.rglob("last.ckpt")
    content = torch.load(path, weights_only=True)
    del content["loops"]
    torch.save(content, path)
    with pytest.raises(UserError, match="lacks the state of the optimiser or the loops"):
        train(tmp_path, 2, ckpt_path=str(path))


def test_another_method_is_said(tmp_path: Path, capsys: Err) -> None:
    train(tmp_path, 1)
    train(tmp_path, 2, module=type("Other", (Toy,), {})())
    assert "is of a run with Toy, this one has Other" in capsys.readouterr().err


def test_a_run_that_keeps_none_has_no_last(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, 1)
    for keeper in trainer.checkpoint_callbacks:
        trainer.callbacks.remove(keeper)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="got no ModelCheckpoint"):
        save_last(trainer)
