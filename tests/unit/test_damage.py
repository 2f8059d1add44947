"""Damage to any bytes of a checkpoint gives one line of this program, not of a library."""

import copy
import io
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy

from opd_lightning.checkpoints import whole
from opd_lightning.checkpoints.matching import check_kinds, check_shapes
from opd_lightning.commands.export import load_student
from opd_lightning.errors import UserError
from opd_lightning.models.student import Student
from tests.conftest import TinyModelDir
from tests.toy_run import Toy, train

CUT = "it is cut short, or was not written by `opd fit`"
CHANGED = "bytes of it are missing or were changed"
FOREIGN = "it holds something else than the state of a run"
OTHER_BYTES = r"['\"][^ ]*['\"] in it has other bytes than were written"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`last.ckpt`, a file, and in `shards` another, a folder."""
    folder = tmp_path_factory.mktemp("saved")
    train(folder, 1, ckpt_path=None)
    try:
        shards = ModelParallelStrategy(1, 1, save_distributed_checkpoint=True)
        train(folder / "shards", 1, ckpt_path=None, strategy=shards)
    finally:
        dist.destroy_process_group()
    return folder


def refusal(path: Path) -> str:
    """Return the message about a damaged checkpoint."""
    with pytest.raises(UserError) as refused:
        whole(path)
    line = str(refused.value)
    assert "\n" not in line
    start = f"--ckpt_path: {str(path)!r} is damaged or no checkpoint: "
    reason, end = line.removeprefix(start).rsplit("; ", 1)
    assert line.startswith(start)
    assert end == "name another of the run's, or give 'last', its newest whole one"
    return reason


def without(name: str) -> Callable[[bytes, Path], None]:
    """Leave an entry of the archive out."""

    def damage(content: bytes, path: Path) -> None:
        path.write_bytes(content)
        with zipfile.ZipFile(path) as archive:
            kept = {e: archive.read(e) for e in archive.namelist() if not e.endswith(name)}
        with zipfile.ZipFile(path, "w") as archive:
            for entry, data in kept.items():
                archive.writestr(entry, data)

    return damage


def part(share: float) -> Callable[[bytes, Path], None]:
    return lambda content, path: path.write_bytes(content[: int(len(content) * share)])  # type: ignore[return-value]


def holding(what: Any) -> Callable[[bytes, Path], None]:
    return lambda _, path: torch.save(what, path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda _, path: None, "'copy.ckpt' is missing"),
        *((part(share), CUT) for share in (0, 0.1, 0.5, 0.99)),
        (lambda content, path: path.write_bytes(bytes(len(content))), CUT),
        (lambda _, path: path.write_text("a text\n"), CUT),
        (lambda _, path: path.write_bytes(pickle.dumps({"global_step": 1})), CUT),
        (without("data.pkl"), "'data.pkl' in it is missing"),
        (without("data/0"), CHANGED),
        (without("version"), CHANGED),
        (holding([1, 2]), FOREIGN),
        (holding(torch.zeros(3)), FOREIGN),
        (holding({"weight": torch.zeros(3)}), FOREIGN),
        (holding({"global_step": 1}), FOREIGN),
        (holding({"global_step": 1, "state_dict": {"weight": 1}}), FOREIGN),
        (holding({"global_step": 1, "state_dict": {}, "more": Toy}), r"more than .*toy_run\.Toy"),
    ],
)
def test_a_file(
    damage: Callable[[bytes, Path], None], reason: str, saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "copy.ckpt"
    damage((saved / "last.ckpt").read_bytes(), path)
    assert re.search(reason, refusal(path))


def anew(content: bytes, path: Path) -> None:
    """Written by another program, which changed a number."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    torch.save({**state, "epoch": 7}, path)


def test_a_file_that_was_written_anew_says_so(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "copy.ckpt"
    anew((saved / "last.ckpt").read_bytes(), path)
    assert not whole(path).is_sealed
    assert whole(saved / "last.ckpt").is_sealed
    assert whole(saved / "shards" / "last.ckpt").is_sealed
    train(tmp_path, 2, ckpt_path=path)
    assert "was changed since" in capsys.readouterr().err
    train(tmp_path, 2, ckpt_path=saved / "last.ckpt")
    assert "was changed since" not in capsys.readouterr().err


def test_a_seal_of_another_content_is_damage(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.ckpt"
    content = (saved / "last.ckpt").read_bytes()
    anew(content, path)
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(path, "a") as other:
        other.comment = archive.comment
    assert refusal(path) == CHANGED


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("state_dict", {"layers.0.weight": torch.zeros(8, 1)}, "is not there"),
        ("optimizer_states", [], "lacks the state of the optimiser"),
        ("optimizer_states", [{"state": 1, "param_groups": 1}], "optimiser"),
        ("loops", {"fit_loop": 3}, "loops"),
        ("callbacks", {"ModelCheckpoint": 1}, None),
        ("callbacks", 7, "callback"),
        ("savers", 7, "callback"),
        ("pytorch-lightning_version", "x", "cannot be restored"),
        ("written_by", 7, FOREIGN),
        ("written_by", {"processes": "two"}, FOREIGN),
    ],
)
def test_a_state_that_cannot_be_restored(
    key: str, value: Any, told: str | None, saved: Path, tmp_path: Path
) -> None:
    state = torch.load(saved / "last.ckpt", weights_only=True)
    torch.save({**state, key: value}, tmp_path / "copy.ckpt")
    if told is None:  # of a callback that this run does not have
        train(tmp_path, 2, ckpt_path=tmp_path / "copy.ckpt")
        return
    with pytest.raises(UserError, match=told) as refused:
        train(tmp_path, 2, ckpt_path=tmp_path / "copy.ckpt")
    assert "\n" not in str(refused.value)


def test_how_an_optimiser_computes_is_this_run_s(saved: Path, tmp_path: Path) -> None:
    state = torch.load(saved / "last.ckpt", weights_only=True)
    state["optimizer_states"][0]["param_groups"][0] |= {"capturable": True, "fused": True}
    torch.save(state, tmp_path / "copy.ckpt")
    trainer, _ = train(tmp_path, 2, ckpt_path=tmp_path / "copy.ckpt")
    (group,) = trainer.optimizers[0].param_groups
    assert (group["capturable"], group["fused"]) == (False, None)


def test_a_scheduler_s_or_optimiser_s_values_of_another_kind_are_refused() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    for fresh in (scheduler.state_dict(), optimizer.state_dict()["param_groups"][0]):
        check_kinds("here", {**copy.deepcopy(fresh), "added": 1}, fresh)
        for key, value in fresh.items():
            if key != "params" and value is not None:
                with pytest.raises(TypeError, match=rf"^here\.{key}: got dict, expected "):
                    check_kinds("here", {**fresh, key: {}}, fresh)
    with pytest.raises(TypeError, match=r"^here: got Tensor, expected float"):
        check_kinds("here", torch.zeros(3), 1.0)
    check_kinds("here", torch.zeros(()), 1.0)
    with pytest.raises(TypeError, match=r"^here\.betas\.1: got str, expected float"):
        check_kinds("here", {"betas": (0.9, "x")}, {"betas": (0.9, 0.999)})


def test_moments_of_another_shape_are_refused() -> None:
    weights = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(()))]
    for kind in (torch.optim.AdamW, torch.optim.Adafactor, torch.optim.RMSprop):
        optimizer = kind(weights)
        sum(weight.sum() for weight in weights).backward()  # type: ignore[union-attr]
        optimizer.step()
        state = optimizer.state_dict()["state"]
        check_shapes(state, optimizer)
        name = next(name for name, value in state[0].items() if value.numel() > 1)
        with pytest.raises(ValueError, match=rf"^optimizer\.0\.{name}: got shape \[2\]"):
            check_shapes({0: {**state[0], name: torch.zeros(2)}}, optimizer)
        others: tuple[Any, ...] = (None, False, {}, 1.0)
        for other in others:
            with pytest.raises(
                TypeError, match=rf"^optimizer\.0\.{name}: got {type(other).__name__}"
            ):
                check_shapes({0: {**state[0], name: other}}, optimizer)
    plain = torch.optim.SGD(weights, lr=0.1)
    plain.step()
    check_shapes(plain.state_dict()["state"], plain)


def test_what_has_no_end_is_not_read(saved: Path, tmp_path: Path) -> None:
    device, pipe = tmp_path / "device.ckpt", tmp_path / "pipe.ckpt"
    device.symlink_to("/dev/zero")
    os.mkfifo(pipe)
    shards = tmp_path / "shards.ckpt"
    shutil.copytree(saved / "shards" / "last.ckpt", shards)
    (shards / "manifest.json").unlink()
    (shards / "manifest.json").symlink_to("/dev/zero")
    for path in (device, pipe, shards):
        assert "is a pipe or a device" in refusal(path)


def test_any_flipped_bits(saved: Path, tmp_path: Path) -> None:
    """In what no checksum covers, such as dates, they change nothing."""
    content = (saved / "last.ckpt").read_bytes()
    directory = content.find(b"PK\x01\x02")
    path, random = tmp_path / "flipped.ckpt", Random(0)
    reasons = []
    for _ in range(150):
        flipped = bytearray(content)
        for _ in range(random.choice((1, 4))):
            place = random.choice(
                (random.randrange(directory), random.randrange(directory, len(content)))
            )
            flipped[place] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        try:
            whole(path)
        except UserError:
            reasons.append(refusal(path))
    known = f"{CUT}|{CHANGED}|{OTHER_BYTES}|'data.pkl' in it is missing"
    assert [reason for reason in reasons if not re.fullmatch(known, reason)] == []
    assert len(reasons) > 75


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.pt", "manifest.json"])
def test_a_folder_of_shards(name: str, saved: Path, tmp_path: Path) -> None:
    def refusal_after(damage: Callable[[Path], Any]) -> str:
        folder = tmp_path / damage.__name__
        shutil.copytree(saved / "shards" / "last.ckpt", folder)
        damage(folder / name)
        return refusal(folder)

    def gone(file: Path) -> None:
        file.unlink()

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:10])

    assert whole(saved / "shards" / "last.ckpt").step == 1
    assert refusal_after(gone) == f"{name!r} is missing"
    if name == "manifest.json":
        assert refusal_after(cut) == CHANGED
    else:
        assert re.fullmatch(rf"{name!r} has 10 of \d+ bytes", refusal_after(cut))
        assert re.fullmatch(OTHER_BYTES, refusal_after(flipped))


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": 1}', '{"files": {"a": 1}}'])
def test_a_manifest_of_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert refusal(tmp_path) == CHANGED


def test_a_run_says_the_same(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.ckpt"
    without("data/0")((saved / "last.ckpt").read_bytes(), path)
    with pytest.raises(UserError, match=CHANGED):
        train(tmp_path, 2, ckpt_path=path)


def test_another_student_is_named_by_its_first_weight(
    tiny_model_dir: TinyModelDir, tmp_path: Path
) -> None:
    student = Student(str(tiny_model_dir()))
    student.load()
    weights = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    torch.save({"global_step": 3, "state_dict": weights}, tmp_path / "3.ckpt")
    assert load_student(student, str(tmp_path / "3.ckpt")).step == 3
    wider = Student(str(tiny_model_dir(hidden_size=128)))
    with pytest.raises(UserError, match=r"is of shape \[.*64\] there and of shape \[.*128\] in"):
        load_student(wider, str(tmp_path / "3.ckpt"))
    with pytest.raises(UserError, match="holds no student"):
        load_student(student, str(_without_student(tmp_path / "0.ckpt")))


def _without_student(path: Path) -> Path:
    torch.save({"global_step": 0, "state_dict": {"layers.weight": torch.zeros(2)}}, path)
    return path
