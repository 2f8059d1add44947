"""`opd configs`: the YAML files that come with the program, listed, shown and copied."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten

from opd_lightning.errors import UserError, note

USAGE = """usage: opd configs list
       opd configs show NAME
       opd configs copy NAME [DEST]

Configurations that come with the program.

  list               their names, with a line on each
  show NAME          print one, such as lab/opd
  copy NAME [DEST]   copy one, or a folder of them such as lab, to DEST; the default is
                     configs/NAME in the working folder, where the commands in the files and
                     in the documentation look for it

example:
  opd configs copy lab/opd && opd fit --config configs/lab/opd.yaml
"""


def main(args: list[str]) -> None:
    """Run `opd configs` with the words that follow it.

    Args:
        args: `list`, `show NAME` or `copy NAME [DEST]`.

    Raises:
        UserError: Another command or number of words; an unknown name; a file that exists.
    """
    if not args or {"-h", "--help"} & set(args):
        print(USAGE, end="")
        return
    command, *words = args
    commands: dict[str, tuple[Callable[..., None], int, int]] = {
        "list": (list_configs, 0, 0),
        "show": (show, 1, 1),
        "copy": (copy, 1, 2),
    }
    if command not in commands:
        raise UserError(f"opd configs: got {command!r}, expected {', '.join(commands)}")
    run, fewest, most = commands[command]
    if not fewest <= len(words) <= most:
        expected = {0: "nothing", 1: "NAME"}[most] if most < 2 else "NAME and optionally DEST"
        raise UserError(f"opd configs {command}: got {words}, expected {expected} behind it")
    run(*words)


def shipped_folder() -> Path:
    """Return the folder of the YAML files: in the package of a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Return the files' names without their suffix, such as `lab/opd`, sorted."""
    folder = shipped_folder()
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")
    )


def list_configs() -> None:
    """Print every name and the first sentence of the file's comment."""
    folder = shipped_folder()
    width = max(map(len, names()))
    for name in names():
        content = (folder / f"{name}.yaml").read_text(encoding="utf-8")
        comment = re.match(r"(#(?! {2,}).*\n)*", content)
        text = re.sub(r"\n?# ?", " ", comment[0] if comment else "").strip()
        sentence = re.split(r"(?<=[a-z)])\.(\s|$)", text)[0]
        print(f"{name:{width}}  {shorten(sentence, 90, placeholder=' ...')}".rstrip())


def show(name: str) -> None:
    """Print a file as it is."""
    (path,) = _files(name, folders=False)
    sys.stdout.write(path.read_text(encoding="utf-8"))


def copy(name: str, destination: str | None = None) -> None:
    """Copy a file, or all files of a folder; nothing is written if one of them exists.

    Args:
        name: A file or a folder, such as `lab/opd` or `lab`.
        destination: A file or an existing folder for a file, a folder for a folder; None stands
            for the same place under `configs` in the working folder.

    Raises:
        UserError: There is a file in the way.
    """
    files = _files(name)
    folder = shipped_folder() / name
    base = files[0] if files[0].parent == folder.parent else folder
    default = Path("configs", base.relative_to(shipped_folder()))
    to = Path(os.path.expanduser(destination or default))
    if base.is_file() and (to.is_dir() or (destination or "").endswith("/")):
        to = to / base.name
    copies = {path: to / path.relative_to(base) for path in files}
    for path, new in copies.items():
        if new.exists() and new.read_bytes() != path.read_bytes():
            raise UserError(
                f"opd configs copy: {str(new)!r} exists and differs from {name!r}; "
                "move it away, or name another DEST"
            )
    for path, new in copies.items():
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(path.read_bytes())
        except OSError as error:
            raise UserError(f"opd configs copy: cannot write {str(new)!r}: {error}") from error
        note(f"wrote {new}")


def _files(name: str, folders: bool = True) -> list[Path]:
    """Return the files that a name stands for."""
    folder = shipped_folder()
    plain = name.removesuffix(".yaml").rstrip("/")
    if plain in names():
        return [folder / f"{plain}.yaml"]
    inside = [folder / f"{one}.yaml" for one in names() if one.startswith(f"{plain}/")]
    if folders and inside:
        return inside
    raise UserError(
        f"opd configs: got {name!r}, expected a name such as 'lab/opd'; "
        "`opd configs list` prints them all"
    )
