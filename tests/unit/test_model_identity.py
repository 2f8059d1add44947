"""Equal content has the same name in any folder; other content has another."""

import shutil
from pathlib import Path

import pytest

from opd_lightning.errors import UserError
from opd_lightning.models.identity import model_identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 4096)  # 1 MiB
    return made


def test_a_copy_is_the_same(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    (copy / "README.md").write_text("another text")
    assert model_identity(str(copy)) == model_identity(str(folder))
    assert len(model_identity(str(folder))) == len("opd-") + 12


@pytest.mark.parametrize("offset", [0, 2**20 - 1, (2**20 - 4096) * 20 // 63])
def test_other_weights_are_another(folder: Path, offset: int) -> None:
    before = model_identity(str(folder))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(offset)
        file.write(b"\x99")
    assert model_identity(str(folder)) != before


def test_another_size_or_config_is_another(folder: Path) -> None:
    names = {model_identity(str(folder))}
    (folder / "config.json").write_text('{"rope_theta": 1}')
    names.add(model_identity(str(folder)))
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    names.add(model_identity(str(folder)))
    assert len(names) == 3


def test_a_small_file_is_read_whole(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"ab")
    before = model_identity(str(folder))
    (folder / "model.safetensors").write_bytes(b"ac")
    assert model_identity(str(folder)) != before


def test_no_weights_is_a_mistake(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no config\.json and weights"):
        model_identity(str(folder))


@pytest.mark.parametrize("path", ["nobody/has-this-model", "/no/such/folder"])
def test_an_unknown_name_is_a_mistake(path: str) -> None:
    with pytest.raises(UserError, match="neither a folder nor"):
        model_identity(path)
