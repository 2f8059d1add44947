"""`opd lab`: tiny models and data made on the spot, and the demonstration."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from opd_lightning.lab.build import Recipe, build_arithmetic
from opd_lightning.lab.demo import demonstrate
from opd_lightning.quiet import only_warnings


def build(recipe: Recipe = Recipe(), link: str = "lab/arithmetic") -> None:  # noqa: B008
    """Make the arithmetic lab: data, a strong teacher, a weak student. Cached by recipe.

    Args:
        recipe: What to make; every number of it can be set.
        link: Symbolic link to the made folder, which configs/lab names.
    """
    print(build_arithmetic(recipe, Path(link)))


def demo(run: str = "runs/demo", require: float = 0.75) -> None:
    """Distil the lab's teacher into its student and show the result.

    Args:
        run: Run folder to write; must not exist.
        require: Fail if the student's held-out accuracy ends below this.
    """
    demonstrate(Path(run), require)


def main(args: list[str]) -> None:
    """Entry point of `opd lab`."""
    only_warnings()
    auto_cli({"build": build, "demo": demo}, args=args, prog="opd lab")
