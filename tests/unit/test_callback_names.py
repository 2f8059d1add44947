"""`callbacks.X` and `opd_lightning_callbacks.X` mean the same, in a checkout and from a wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A package of three files stands for the callbacks, so that nothing heavy is imported.
CALLBACKS = {"__init__.py": "from .ema import EMA", "ema.py": "class EMA: pass"}


def installation(root: Path, name: str) -> Path:
    """Make a folder with `opd_lightning` as far as names go, and its callbacks by `name`."""
    names = root / "opd_lightning" / "commands" / "callback_names.py"
    names.parent.mkdir(parents=True)
    names.write_text((ROOT / "opd_lightning" / "commands" / "callback_names.py").read_text())
    package(root, name, CALLBACKS)
    return root


def package(root: Path, name: str, files: dict[str, str]) -> None:
    (root / name).mkdir(parents=True)
    for file, text in files.items():
        (root / name / file).write_text(text)


def run(code: str, *path: Path) -> str:
    """Run code in a Python without site-packages, `path` in front of everything."""
    lines = f"import sys\nsys.path[:0] = {[str(p) for p in path]!r}\n"
    lines += "from opd_lightning.commands.callback_names import *\ninstall_callback_names()\n"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-P", "-c", lines + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["callbacks", "opd_lightning_callbacks"])
@pytest.mark.parametrize("first", ["callbacks", "opd_lightning_callbacks"])
def test_both_names_give_the_same_classes(name: str, first: str, tmp_path: Path) -> None:
    code = f"import {first}.ema, callbacks.ema as a, opd_lightning_callbacks.ema as b\n"
    code += "import callbacks, opd_lightning_callbacks\n"
    code += "assert a is b and callbacks is opd_lightning_callbacks\n"
    code += "import importlib; importlib.reload(a)\n"
    assert run(code + "print(a.__spec__.name)", installation(tmp_path, name)) == f"{name}.ema"


@pytest.mark.parametrize("name", ["callbacks", "opd_lightning_callbacks"])
def test_another_package_keeps_its_name(name: str, tmp_path: Path) -> None:
    root = installation(tmp_path / "ours", name)
    package(tmp_path / "theirs", "callbacks", {"__init__.py": "THEIRS = 1"})
    code = "import callbacks; assert callbacks.THEIRS and not hasattr(callbacks, 'EMA')\n"
    code += "import opd_lightning_callbacks as b; assert b.EMA.__module__ == b.__name__ + '.ema'\n"
    code += "print(explain_taken_name('class_path \\'callbacks.EMA\\': no attribute'))\n"
    code += (
        "print(explain_taken_name('callbacks.Other'), explain_taken_name('lightning.callbacks'))"
    )
    line, others = run(code, tmp_path / "theirs", root).splitlines()
    assert line == (
        "class_path: got 'callbacks.EMA', but 'callbacks' is another package here "
        f"({tmp_path}/theirs/callbacks/__init__.py); write 'opd_lightning_callbacks.EMA'"
    )
    assert others == "None None"


def test_other_errors_are_not_explained(tmp_path: Path) -> None:
    code = "print(explain_taken_name('callbacks.EMA: wrong type'))"
    assert run(code, installation(tmp_path, "callbacks")) == "None"
    # From a wheel, where the name is an alias.
    assert run(code, installation(tmp_path / "wheel", "opd_lightning_callbacks")) == "None"
