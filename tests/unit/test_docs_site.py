"""Nothing of the documentation stays out of its site."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAV = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
HOOKS = (ROOT / "docs" / "hooks.py").read_text()


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert not pages - set(re.findall(r"[a-z_]+\.md", NAV))


def test_every_package_has_a_page() -> None:
    packages = {path.parent.name for path in (ROOT / "opd_lightning").glob("*/__init__.py")}
    assert packages | {"callbacks"} == set(
        re.findall(r'"([a-z]+)"', HOOKS.partition("PACKAGES = (")[2].partition("\n)")[0])
    )


def test_nothing_is_fetched_from_elsewhere() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings
    assert "http" not in settings
