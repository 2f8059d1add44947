"""docs/scaling.md has the figures of the program that it names, and its configurations are read."""

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from opd_lightning.lightning_cli import OPDCLI

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text()
NAMES = ["models", "memory", "activations", "others", "engines", "traffic", "push", "balance",
         "plans", "one GPU", "a node", "eight nodes"]  # fmt: skip


@cache
def program() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_what_the_program_prints(name: str) -> None:
    assert list(program().TABLES) == NAMES
    assert program().TABLES[name]() in PAGE


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_the_page_s_configurations_are_accepted(
    block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "plan.yaml"
    overlay.write_text(block)
    files = ("--config", str(ROOT / "configs" / "opd.yaml"), "--config", str(overlay))
    with pytest.raises(SystemExit) as ended:
        OPDCLI(["fit", *files, "--print_config"])
    assert not ended.value.code
    assert "accumulate_grad_batches" in capsys.readouterr().out
