"""The figures that docs/metrics.md lists."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def listed() -> list[str]:
    """Return the names in the first column of the page's tables, such as `term/<term>`."""
    rows = re.findall(r"^\| (`[^|]*`) \|", PAGE.read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def unlisted(logged: set[str]) -> set[str]:
    """Return the figures of a run that the page does not have."""
    known = [re.sub(r"<\w+>", "[^/]+", name) for name in listed()]
    return {name for name in logged if not any(re.fullmatch(one, name) for one in known)}
