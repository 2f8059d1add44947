"""Pages of the site that are made at build time: API, commands, files beside `docs/`."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

# Files of the repository that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "configurations.md",
    "slurm/README.md": "slurm_variables.md",
    "benchmarks/README.md": "benchmarks.md",
    "experiments/README.md": "experiments.md",
}

# Packages with a page of the API, in the order of the navigation; None stands for the callbacks.
PACKAGES = (
    *("methods", "rules", "losses", "teachers", "rollouts", "verifiers", "evaluation", "data"),
    *("training", "callbacks", "metrics", "run", "checkpoints", "models", "preflight", "serving"),
    *("commands", "terminal", "lab"),
)

COMMANDS = (
    *("", "fit", "validate", "test", "check", "estimate", "sample", "export", "write-responses"),
    *("cache-teacher", "serve", "compare", "configs", "lab", "lab build", "lab demo"),
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation's section of the API."""
    for section in config.nav or []:
        if "API" in section:
            section["API"] = [{package: f"api/{package}.md"} for package in PACKAGES]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    made = {page: (ROOT / source).read_text() for source, page in PAGES.items()}
    made |= {f"api/{package}.md": api_page(package) for package in PACKAGES}
    made["commands.md"] = commands_page()
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: object, config: MkDocsConfig, files: Files) -> str:
    """Point links between files of the repository at their pages."""
    uri = page.file.src_uri  # type: ignore[attr-defined]
    source = {page: source for source, page in PAGES.items()}.get(uri, f"docs/{uri}")
    folder = Path(source).parent

    def link(found: re.Match[str]) -> str:
        path, anchor = found[1], found[2] or ""
        target = os.path.normpath(folder / path)
        if target in PAGES:
            return f"]({PAGES[target]}{anchor})"
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')}{anchor})"
        return found[0]

    return re.sub(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


def api_page(name: str) -> str:
    """Return the page of a package: its docstring, then every module that has one."""
    folder = ROOT / name if name == "callbacks" else ROOT / "opd_lightning" / name
    package = ".".join(folder.relative_to(ROOT).parts)
    summary = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    lines = [f"# {package}", "", summary, ""]
    for path in sorted(folder.rglob("*.py")):
        # Scripts that are run by path are in folders that are no packages.
        if path.name != "__init__.py" and (path.parent / "__init__.py").exists():
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            lines += [f"::: {module}", ""]
    return "\n".join(lines)


def commands_page() -> str:
    """Return the help of every command, from the parsers themselves."""
    lines = ["# Commands", ""]
    for command in COMMANDS:
        name = f"opd {command}".strip()
        lines += [f"## {name}", "", "```text", help_of(command.split()), "```", ""]
    return "\n".join(lines)


def help_of(words: list[str]) -> str:
    """Return the help of one command, as wide as the site's code blocks.

    Raises:
        RuntimeError: The command has no help.
    """
    from opd_lightning.cli import main

    os.environ["COLUMNS"] = "96"
    shown, errors = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(errors):
        try:
            main([*words, "--help"])
        except SystemExit as end:
            code = end.code
    if words == ["serve"] and "vllm" in errors.getvalue().lower():
        return "needs vLLM"
    if code not in (0, None) or not shown.getvalue().strip():
        raise RuntimeError(f"opd {' '.join(words)} --help: {errors.getvalue() or 'empty'}")
    return shown.getvalue().strip().replace(str(Path.home()), "~")
