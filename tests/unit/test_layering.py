"""The house keeps its shape: imports point one way, files stay small, `callbacks` is ours."""

import ast
from pathlib import Path

import pytest

import callbacks

ROOT = Path(__file__).parents[2]
PACKAGES = ("opd_lightning", "callbacks")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))

# What each floor must not reach up to.
ABOVE = {
    "types.py": ("losses", "rollouts", "teachers", "verifiers", "data", "methods", "cli", "lab"),
    "losses": (
        "rules",
        "rollouts",
        "teachers",
        "verifiers",
        "data",
        "methods",
        "student",
        "cli",
        "lab",
    ),
    "rollouts": ("losses", "teachers", "data", "methods", "student", "cli", "lab"),
    "serving": ("losses", "rules", "teachers", "data", "methods", "student", "cli", "lab"),
    "rules": ("rollouts", "verifiers", "data", "methods", "student", "cli", "lab"),
    "teachers": ("losses", "rules", "rollouts", "data", "methods", "cli", "lab"),
    "harness": ("losses", "rules", "teachers", "data", "methods", "student", "cli", "lab"),
    "verifiers": ("losses", "rollouts", "teachers", "data", "methods", "student", "cli", "lab"),
    "data": ("losses", "teachers", "methods", "cli", "lab"),
    "methods": ("rollouts", "cli", "lightning_cli", "lab"),
    "lightning_cli.py": ("cli", "lab"),
    "lab": ("cli",),
}


def imports(path: Path) -> set[str]:
    """Modules imported when the program runs; imports for the type checker do not count."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    package, *inside = path.relative_to(ROOT).parts
    seen = imports(path)
    if package == "opd_lightning":
        assert not [name for name in seen if name.split(".")[0] == "callbacks"]
        forbidden = tuple(f"opd_lightning.{room}" for room in ABOVE.get(inside[0], ()))
        assert not [n for n in seen for room in forbidden if n == room or n.startswith(room + ".")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    shared = path.name in ("base.py", "composed.py")
    limit = 150 if path.parts[-2] in ("methods", "callbacks") and not shared else 250
    assert lines <= limit, f"{path} has {lines} lines; one concept a file"


def test_the_readme_lists_every_file() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## The house") :]
    missing = [p.name for p in FILES if f" {p.name} " not in tree and p.name != "__init__.py"]
    assert not missing, "one line each in the README's tree"


def test_callbacks_is_our_package() -> None:
    assert Path(callbacks.__file__).parent == ROOT / "callbacks", callbacks.__file__
