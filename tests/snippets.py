"""Files in a page of the documentation: fenced blocks with a title."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r'```\w+ title="([^"]+)"\n(.*?)```', re.DOTALL)


def files(page: str) -> dict[str, str]:
    """Return the texts of a page's files by name."""
    found = BLOCK.findall((ROOT / "docs" / page).read_text())
    assert len(dict(found)) == len(found), "two blocks of a page have the same title"
    return dict(found)


def write(page: str, folder: Path) -> None:
    """Write the files of a page to a folder."""
    for name, text in files(page).items():
        (folder / name).write_text(text)
