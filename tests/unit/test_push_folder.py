"""Weights on their way to servers, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from opd_lightning.errors import UserError
from opd_lightning.rollouts import push_folder
from opd_lightning.rollouts.push_folder import PushFolder

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
    assert not list(tmp_path.glob("weights-*"))
    folder.write("3-c", WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["weights-3-c"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"push_folder: cannot write to .*file.*with room"
    ) as caught:
        push_folder_of(tmp_path / "file").write("1-a", WEIGHTS)
    assert "\n" not in str(caught.value)
