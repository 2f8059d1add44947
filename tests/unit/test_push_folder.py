"""Weights on their way to servers, on disk."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from opd_lightning.errors import PushLostError, UserError
from opd_lightning.models.folder_format import FolderFormat
from opd_lightning.models.source import ModelSource
from opd_lightning.rollouts import VLLMServerEngine, push_folder
from opd_lightning.rollouts.push_folder import SUBFOLDER, PushFolder
from tests.engine_contract import reference_model
from tests.http_server import Server

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


def test_a_folder_that_cannot_be_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    folder = push_folder_of(tmp_path)
    folder.write("1-a", WEIGHTS)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(UserError, match=r"cannot write to .*Permission denied; give a folder"):
        push_folder_of(tmp_path)
    with caplog.at_level(logging.WARNING):
        folder.close()  # after the run, which has succeeded
    assert "pushed weights are left in" in caplog.text


class Restarting(Server):
    """Stand-in for a server that is started again whenever it first loads a version."""

    def __init__(self, restarts: int) -> None:
        self.restarts = restarts
        self.label = "default"
        super().__init__(self._answer_to)

    def _answer_to(self, asked: dict[str, Any]) -> tuple[int, Any]:
        if asked["path"] == "/update_weight_version":
            self.label = asked["new_version"]
        if asked["path"] == "/collective_rpc" and self.restarts and self.label != "default":
            self.restarts -= 1
            self.label = "default"
            return 500, {"error": "it died"}
        return 200, {"success": True, "weight_version": self.label}


@pytest.mark.parametrize("restarts", [1, 2])
def test_a_server_that_is_started_again_in_a_push_is_pushed_to_again(
    restarts: int, tiny_model_dir: Any, tmp_path: Path
) -> None:
    source = ModelSource(str(tiny_model_dir()))
    server = Restarting(restarts)
    engine = VLLMServerEngine([server.url], push_folder=str(tmp_path), patience=20.0)
    engine._format = FolderFormat.of(source, torch.float32)
    assert engine._push_method is not None
    engine._push_method.start(engine.servers, engine._format.tensors)
    weights = list(reference_model(tiny_model_dir()).named_parameters())
    try:
        if restarts == 1:
            engine.load_weights(3, weights)
            assert engine.version == 3
            assert server.label.startswith("3-")
        else:
            with pytest.raises(PushLostError, match="was started again during a push"):
                engine.load_weights(3, weights)
            assert engine.version == -1
    finally:
        engine.close()
        server.stop()
