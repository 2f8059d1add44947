"""The first command of a process imports its libraries without garbage collections."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator

import pytest

from opd_lightning import cli
from opd_lightning.commands import lightning_cli
from opd_lightning.terminal.imports import without_collections


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether collections were enabled at each freeze."""
    calls: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(gc.isenabled()))
    yield calls
    gc.enable()


@pytest.mark.parametrize("freeze", [False, True])
def test_collections_are_disabled_in_the_block_alone(freeze: bool, frozen: list[bool]) -> None:
    with without_collections(freeze=freeze):
        assert not gc.isenabled()
    assert gc.isenabled()
    assert frozen == [False] * freeze


def test_an_import_that_fails_leaves_them_enabled() -> None:
    with pytest.raises(ImportError), without_collections():
        importlib.import_module("opd_lightning.nowhere")
    assert gc.isenabled()


def test_who_disabled_collections_keeps_them_disabled(frozen: list[bool]) -> None:
    gc.disable()
    with without_collections():
        pass
    assert not gc.isenabled()


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_command_of_a_process_freezes_what_it_imported(
    is_first: bool, frozen: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[bool] = []
    monkeypatch.setattr(lightning_cli, "OPDCLI", lambda words: began.append(gc.isenabled()))
    if is_first:
        monkeypatch.setattr(cli, "PYTORCH", "a.library.that.is.not.imported")
    cli.main(["fit"])
    assert frozen == [False] * is_first
    assert began == [True]
