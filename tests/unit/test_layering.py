"""The tree keeps its shape: imports point down, files stay short, the package root stays small."""

import ast
import re
import warnings
from functools import cache
from pathlib import Path

import callbacks
from tests.sources import parsed

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "opd_lightning"
FILES = sorted(p for name in ("opd_lightning", "callbacks") for p in (ROOT / name).rglob("*.py"))

# From bottom to top. A module imports from its own layer and from those before it, and nothing
# else; imports under TYPE_CHECKING and inside functions count.
LAYERS = [
    "terminal",
    "errors",
    "types",
    "seeding",
    "timing",
    "processes",
    "losses",
    "verifiers",
    "metrics",
    "checkpoints",
    "models",
    "serving",
    "rollouts",
    "teachers",
    "rules",
    "data",
    "evaluation",
    "training",
    "run",
    "preflight",
    "methods",
    "commands",
    "lab",
    "cli",
    "__main__",
]
# Old paths of classes that configurations name; nothing of ours imports them.
SHIMS = {"student", "hsdp"}
LONG, TOO_LONG = 300, 400  # lines


@cache
def imports(path: Path) -> set[str]:
    """Every module and name that a file imports, wherever the statement stands."""
    names: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # of callbacks alone, which has another name in a wheel
                assert "callbacks" in path.parts[-2:], f"{path}: a relative import"
                continue
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def layers_of(path: Path) -> set[str]:
    """The layers of `opd_lightning` that a file imports from."""
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("opd_lightning.")}
    return {"cli" if layer == "main" else layer for layer in ours} - {"__version__"}


def test_imports_point_down() -> None:
    for path in FILES:
        check_imports(path)


def check_imports(path: Path) -> None:
    package, *inside = path.relative_to(ROOT).parts
    assert not layers_of(path) & SHIMS or path.stem in SHIMS, path
    if package == "callbacks":
        assert not layers_of(path) & {"lab", "cli", "__main__"}, path
        return
    assert not [name for name in imports(path) if name.split(".")[0] == "callbacks"], path
    layer = inside[0].removesuffix(".py")
    if layer in SHIMS or layer == "__init__":
        return
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert not layers_of(path) & above, f"{path}: {layer} must not import what stands above it"


# What GPU images often lack. Only commands, plots and what runs beside vLLM or lm-eval may need
# them at import, so that a method can be trained without (see `benchmarks/gpu.py`).
OPTIONAL = {"jsonargparse", "docstring_parser", "datasets", "pyarrow", "math_verify", "pebble",
            "matplotlib", "vllm", "lm_eval", "trl"}  # fmt: skip
NEED_THEM = {"commands", "lab", "serving/serve.py", "serving/worker.py",
             "serving/transfer_receiver.py", "rollouts/transfer_sender.py",
             "evaluation/harness"}  # fmt: skip


@cache
def imports_at_once(path: Path) -> set[str]:
    """Modules and names that a file imports outside of functions and TYPE_CHECKING."""
    names: set[str] = set()
    nodes: list[ast.AST] = [parsed(path)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return names


def packages_at_once(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports_at_once(path)}


def files_of(name: str) -> list[Path]:
    """Our files that the import of a module, or of a name in one, runs."""
    inside = [ROOT.joinpath(*name.split(".")[:n]) for n in range(1, name.count(".") + 2)]
    found = [path for one in inside for path in (one / "__init__.py", one.with_suffix(".py"))]
    return [path for path in found if path in FILES]


def test_engines_are_imported_without_the_libraries_that_they_start() -> None:
    """Whatever module is imported with them; each of these libraries takes seconds."""
    waiting, seen = files_of("opd_lightning.rollouts"), set[Path]()
    while waiting:
        path = waiting.pop()
        assert not packages_at_once(path) & {"transformers", "vllm", "lightning"}, path
        seen.add(path)
        reached = {file for name in imports_at_once(path) for file in files_of(name)}
        waiting += reached - seen - {*waiting}
    assert len(seen) > 20


def test_what_trains_imports_without_optional_packages() -> None:
    for path in FILES:
        inside = str(path.relative_to(ROOT)).removeprefix("opd_lightning/")
        if not inside.startswith(tuple(NEED_THEM)):
            assert not packages_at_once(path) & OPTIONAL, path


def test_modules_that_need_optional_packages_are_there() -> None:
    for inside in NEED_THEM:
        place = PACKAGE / inside
        files = place.rglob("*.py") if place.is_dir() else [place]
        assert any(packages_at_once(path) & OPTIONAL for path in files), inside


def test_every_layer_has_a_place() -> None:
    inside = {p.name.removesuffix(".py") for p in PACKAGE.iterdir()}
    assert inside - {"__init__", "__pycache__", "py.typed"} - SHIMS == set(LAYERS)


def test_files_stay_short() -> None:
    for path in FILES:
        lines = len(path.read_text().splitlines())
        if lines > LONG:
            warnings.warn(f"{path.relative_to(ROOT)} has {lines} lines", stacklevel=1)
        assert lines <= TOO_LONG, f"{path}: {lines} lines; split it by concept"


def test_the_package_root_stays_small() -> None:
    modules = {p.stem for p in PACKAGE.glob("*.py")} - SHIMS
    assert modules == {
        "__init__",
        "__main__",
        "cli",
        "errors",
        "processes",
        "seeding",
        "timing",
        "types",
    }


def test_methods_are_published_methods() -> None:
    """What all methods share is in `training/`: a file of `methods/` defines one family."""
    for path in (PACKAGE / "methods").glob("*.py"):
        classes = [n for n in parsed(path).body if isinstance(n, ast.ClassDef)]
        assert path.stem == "__init__" or classes


def test_the_readme_has_a_line_for_every_package() -> None:
    readme = (ROOT / "README.md").read_text()
    packages = [p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()]
    missing = [name for name in packages if f"{name}/" not in readme]
    assert not missing


def test_the_architecture_page_names_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = {n for n in re.findall(r"`([\w/]+(?:/|\.py))`", page) if not n.startswith("tests/")}
    assert len(named) > 40
    assert not [n for n in named if not ((PACKAGE / n).exists() or (ROOT / n).exists())]


def defined(place: Path) -> set[str]:
    """Names of the functions and classes of a file or package."""
    files = place.rglob("*.py") if place.is_dir() else [place]
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    nodes = (node for path in files for node in ast.walk(parsed(path)))
    return {node.name for node in nodes if isinstance(node, kinds)}


def test_pages_name_functions_that_exist() -> None:
    """`file` (`function`, ...) in the table of a step, `function` in `file` in the README."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    pairs = [
        (place, name)
        for place, names in re.findall(r"`([\w/]+(?:/|\.py))` \(((?:`\w+`[^)]*)+)\)", page)
        for name in re.findall(r"`(\w+)`", names)
    ]
    for row in (ROOT / "README.md").read_text().splitlines():
        packages = re.findall(r"`(?:opd_lightning/)?(\w+)/`", row)
        for name, file in re.findall(r"`(\w+)` in `(\w+\.py)`", row):
            (place,) = (p for p in packages if (PACKAGE / p / file).exists())
            pairs.append((f"{place}/{file}", name))
    assert len(pairs) > 40
    assert not [(p, name) for p, name in pairs if name not in defined(PACKAGE / p)]


def test_callbacks_is_our_package() -> None:
    assert Path(callbacks.__file__).parent == ROOT / "callbacks", callbacks.__file__
