"""Weights on their way to servers, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from opd_lightning.errors import UserError
from opd_lightning.rollouts import push_folder
from opd_lightning.rollouts.push_folder import SUBFOLDER, PushFolder

WEIGHTS = [(f"layer.{i}", torch.randn(8, 4).t()) for i in range(5)]  # not contiguous


def push_folder_of(folder: Path, dtype: torch.dtype = torch.float32) -> PushFolder:
    push = PushFolder(folder)
    push.start(cast(Any, None), {name: tensor.to("meta", dtype) for name, tensor in WEIGHTS})
    return push


def test_what_is_written_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_folder, "SHARD_BYTES", 2 * 8 * 4 * 4)
    written = push_folder_of(tmp_path).write("3-a", WEIGHTS)
    files = sorted(written.iterdir())
    assert [len(load_file(file)) for file in files] == [2, 2, 1]
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS)


def test_it_is_written_in_the_servers_precision(tmp_path: Path) -> None:
    (file,) = push_folder_of(tmp_path, torch.bfloat16).write("3-a", WEIGHTS).iterdir()
    assert torch.equal(load_file(file)["layer.0"], WEIGHTS[0][1].bfloat16())


def test_nobody_sees_half_a_version(tmp_path: Path) -> None:
    folder = push_folder_of(tmp_path)
    folder.write("1-a", WEIGHTS)

    def broken() -> object:
        yield WEIGHTS[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        folder.write("2-b", broken())  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("weights-*"))
    folder.write("3-c", WEIGHTS)
    assert [path.name for path in (tmp_path / SUBFOLDER).iterdir()] == ["weights-3-c"]


def test_only_pushed_weights_are_deleted(tmp_path: Path) -> None:
    for name in ("weights-7b-instruct", "draft-of-a-paper", "weights-7-0badcafe"):
        (tmp_path / name).mkdir()
    (tmp_path / "weights-7b-instruct" / "model.safetensors").touch()
    theirs = sorted(tmp_path.rglob("*"))
    killed = push_folder_of(tmp_path)
    killed.write("1-a", WEIGHTS)
    folder = push_folder_of(tmp_path)
    assert sorted(tmp_path.rglob("*")) == theirs  # what a killed run had pushed is gone
    folder.write("2-b", WEIGHTS)
    folder.close()
    assert sorted(tmp_path.rglob("*")) == theirs


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"push_folder: cannot write to .*file.*with room"
    ) as caught:
        push_folder_of(tmp_path / "file").write("1-a", WEIGHTS)
    assert "\n" not in str(caught.value)
